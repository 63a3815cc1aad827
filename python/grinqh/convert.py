"""Conversion of a model on the disk into a folder that `from_pretrained` loads."""

from __future__ import annotations

import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from grinqh.benchmark import versions
from grinqh.calibration import calibrate
from grinqh.config import GrinqhConfig
from grinqh.device import find_device
from grinqh.errors import InputError
from grinqh.model import packed_bytes, packed_layers, stored_bits
from grinqh.source import Source
from grinqh.texts import CALIBRATION_TEXT_NAME, calibration_text, read_text
from grinqh.unconverted import full_precision

CALIBRATION_TOKENS = 8192


@dataclass(frozen=True)
class Conversion:
    """What a conversion made."""

    source: str
    out: str
    layers: int  # converted
    weights: int  # in them
    stored_bits: float  # of them, per weight, without scales
    packed_bytes: int  # of them, scales and tables included
    total_bytes: int  # of the weight files, with all that stayed at full precision
    full_precision: list[str]  # the matrices that are not converted: name, number and shape
    calibration: str
    calibration_tokens: int
    device: str  # where it was converted and calibrated

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def convert(
    source: str | Path,
    out: str | Path,
    config: GrinqhConfig | None = None,
    *,
    calibration: str | Path | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    force: bool = False,
    command: str = "grinqh.convert",
    on_start: Callable[[], None] | None = None,
) -> Conversion:
    """Quantizes, calibrates and saves a model, with its tokenizer and a model card.

    The folder appears when everything in it is written, and not before.

    Args:
        source: a Hugging Face folder with safetensors, or a GGUF file.
        out: the folder to make.
        config: what to convert and how; None for the defaults.
        calibration: a UTF-8 text file; None for the help topics of Python.
        calibration_tokens: how much of it to use, about.
        dtype: of what stays at full precision; "auto" for the source's own.
        device: where weights are packed and the model is calibrated: "cpu", "cuda", "cuda:N", or "auto" for the first
            NVIDIA GPU if there is one; None for the CPU.
        force: replace a converted model that is there already.
        command: what the model card gives as the command that made it.
        on_start: called when all that can be checked beforehand was, and the weights are about to be read.

    Raises:
        InputError: see `Source`; a device that is not there; an `out` that exists or cannot be written; a weight that
            is NaN or infinite; experts of a mixture that `config` does not name (see `GrinqhConfig`).
    """
    config = GrinqhConfig() if config is None else config
    device = find_device(device)
    checked = Source(source)
    text = calibration_text() if calibration is None else read_text(calibration)
    text_name = CALIBRATION_TEXT_NAME if calibration is None else Path(calibration).name
    with _new_folder(Path(out), force) as folder:
        if on_start is not None:
            on_start()
        model: Any = checked.load_quantized(config, dtype, device)
        report = calibrate(model, text, checked.tokenizer, max_tokens=calibration_tokens)
        model.to("cpu")  # in canonical order, as the file: on a GPU there would be two copies
        model.save_pretrained(folder)
        checked.copy_companions(folder)
        layers = packed_layers(model).values()
        conversion = Conversion(
            source=checked.name,
            out=str(out),
            layers=len(layers),
            weights=sum(layer.weights for layer in layers),
            stored_bits=stored_bits(model),
            packed_bytes=packed_bytes(model),
            total_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
            full_precision=full_precision(model),
            calibration=text_name,
            calibration_tokens=report.tokens,
            device=str(device),
        )
        (folder / "README.md").write_text(_model_card(conversion, config, command), encoding="utf-8")
        _make_weights_as_readable_as(folder / "README.md", folder)
    return conversion


@contextmanager
def _new_folder(out: Path, force: bool) -> Iterator[Path]:
    """A folder to fill, that takes the name `out` when all went well and is removed when not."""
    if out.exists() or out.is_symlink():
        if not force:
            raise InputError(f"OUT {out} exists: give another name, or --force to replace a converted model")
        if not out.is_dir() or not (out / "config.json").is_file():
            raise InputError(f"OUT {out} is no model folder: --force replaces nothing else")
    parent = out.resolve().parent
    if not parent.is_dir():
        raise InputError(f"OUT {out}: the folder {parent} does not exist")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"OUT {out}: the folder {parent} is not writable")
    partial = parent / f"{out.name}.partial-{uuid.uuid4().hex[:8]}"
    try:
        partial.mkdir()
    except OSError as error:
        raise InputError(f"OUT {out}: the folder {parent} is not writable ({error.strerror})") from error
    try:
        yield partial
        if force and out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _make_weights_as_readable_as(other: Path, folder: Path) -> None:
    """Gives the weight files the mode of another file: safetensors makes them for their owner alone."""
    for file in folder.glob("*.safetensors"):
        file.chmod(stat.S_IMODE(other.stat().st_mode))


def _model_card(conversion: Conversion, config: GrinqhConfig, command: str) -> str:
    widths = ", ".join(map(str, config.plane_widths))
    left = "; ".join(f"`{weights}`" for weights in conversion.full_precision)
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"""---
library_name: transformers
tags:
- grinqh
---

# {Path(conversion.out).name}

{conversion.source}, converted with [GRINQH](https://arxiv.org/abs/2606.23419) for decoding at a number of bits per
weight that is chosen at run time.

```python
import grinqh
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{Path(conversion.out).name}")
grinqh.set_bits(model, 3.0)
```

| | |
|---|---|
| made by | `{command}` |
| with | {used} |
| converted | {conversion.layers} linear layers, {conversion.weights:,} weights |
| stored bits | {conversion.stored_bits:.3f} per converted weight, in planes of {widths} bits; block {config.block} |
| at full precision | {left} |
| size | {conversion.total_bytes / 1e6:,.1f} MB, of which {conversion.packed_bytes / 1e6:,.1f} MB are converted layers |
| calibration | {conversion.calibration_tokens:,} tokens of {conversion.calibration} |

The licence is that of the original model.
"""
