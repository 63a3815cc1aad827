"""Full-precision models on the disk: a Hugging Face folder or a GGUF file, loaded alike."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from grinqh.checkpoint import read_specs
from grinqh.config import GrinqhConfig
from grinqh.device import find_device
from grinqh.errors import InputError
from grinqh.gguf import check_gguf, is_gguf, load_gguf_model, load_gguf_tokenizer
from grinqh.model import quantize_model
from grinqh.streaming import leaving_heads, pack_loaded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What a model needs besides config and weights; copied as they are.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "LICENSE*",
)


class Source:
    """A causal language model to convert or to compare with. Making one checks its files, without reading the weights.

    Raises:
        InputError: no such path, no model, a model that is quantized already, or a file that is damaged or cut short.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise InputError(f"{path} does not exist: give a Hugging Face folder or a GGUF file")
        self.gguf = is_gguf(self.path)
        if self.gguf:
            check_gguf(self.path)
        elif self.path.is_dir():
            _check_config(self.path / "config.json")
            for file in weight_files(self.path):
                read_specs(file)
        else:
            raise InputError(f"{path} is neither a Hugging Face folder nor a GGUF file")

    @property
    def name(self) -> str:
        """The last part of the path, without the suffix of a file."""
        path = self.path.resolve()
        return path.stem if self.gguf else path.name

    def load_model(
        self, dtype: torch.dtype | str = "auto", device: torch.device | str | None = None
    ) -> PreTrainedModel:
        """The model at full precision, on a device (None: the CPU); "auto" is the type that it is stored in."""
        device = find_device(device)
        if self.gguf:
            return self._from_gguf(dtype, device)
        return self._from_pretrained(device, dtype=dtype)

    def load_quantized(
        self,
        config: GrinqhConfig,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
        rotate_heads: Callable[[PreTrainedModel], object] | None = None,
    ) -> PreTrainedModel:
        """The model with its linear layers packed, not yet calibrated.

        From a folder, weights are packed as they are read, one at a time; transformers dequantizes a GGUF file whole.

        Args:
            config: what to convert and how.
            dtype: see `load_model`.
            device: where weights are packed and the model is left, as `grinqh.device.find_device` takes it; None for
                the CPU.
            rotate_heads: is called with the model while what `grinqh.rotate_heads` changes is at full precision.

        Raises:
            InputError: a device that is not there, or a model that cannot be loaded or converted.
        """
        device = find_device(device)
        if rotate_heads is None:
            if self.gguf:
                return quantize_model(self._from_gguf(dtype, device), config)
            return self._from_pretrained(device, dtype=dtype, quantization_config=config)
        with leaving_heads():
            if self.gguf:
                model = pack_loaded(self._from_gguf(dtype, device), config)
            else:
                model = self._from_pretrained(device, dtype=dtype, quantization_config=config)
        rotate_heads(model)
        return pack_loaded(model, config, check=False)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        if self.gguf:
            return load_gguf_tokenizer(self.path)
        from transformers import AutoTokenizer

        tokenizer: PreTrainedTokenizerBase
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path)
        except Exception as error:
            raise InputError(f"cannot load the tokenizer in {self.path}: {error}") from error
        return tokenizer

    def copy_companions(self, folder: Path) -> None:
        """Puts tokenizer and generation config into a folder: a Hugging Face folder's files as they are."""
        if self.gguf:
            self.tokenizer.save_pretrained(folder)
            return
        for pattern in COMPANIONS:
            for file in sorted(self.path.glob(pattern)):
                if file.is_file():
                    shutil.copyfile(file, folder / file.name)

    def fingerprint(self) -> str:
        """Tells this model from others, by the places, sizes and times of its weight files and its config."""
        files = [self.path] if self.gguf else [self.path / "config.json", *weight_files(self.path)]
        facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def _from_gguf(self, dtype: torch.dtype | str, device: torch.device) -> PreTrainedModel:
        model: Any = load_gguf_model(self.path, dtype)
        return model if device.type == "cpu" else model.to(device)

    def _from_pretrained(self, device: torch.device, **options: Any) -> PreTrainedModel:
        from transformers import AutoModelForCausalLM

        if device.type != "cpu":
            options["device_map"] = str(device)
        model: PreTrainedModel
        try:
            model, loading = AutoModelForCausalLM.from_pretrained(self.path, output_loading_info=True, **options)
        except InputError:
            raise
        except Exception as error:  # unknown architectures, missing tensors: transformers has many ways to say so
            raise InputError(f"cannot load {self.path}: {error}") from error
        missing = sorted(loading["missing_keys"])
        if missing:  # transformers has put random numbers in their place
            raise InputError(
                f"the weight files in {self.path} lack {len(missing)} of the model's tensors: {missing[0]}"
            )
        return model


def _check_config(path: Path) -> None:
    config = read_json(path)
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method:
        raise InputError(f"{path.parent} is quantized already ({method}): give the full-precision model")


def read_json(path: Path) -> dict[str, Any]:
    """An object in a JSON file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path.parent} is no model folder: it holds no {path.name}") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, must hold an object")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, one or several."""
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{folder / INDEX} has no weight_map")
        files = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        files = [folder / WEIGHTS]
    for file in files:
        if not file.is_file():
            raise InputError(f"{folder} holds no {file.name}: weights must be in safetensors files")
    return files
