"""Conversion of a model on the disk into a folder that `from_pretrained` loads."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from grinqh import heads
from grinqh.benchmark import versions
from grinqh.calibration import calibrate
from grinqh.config import GrinqhConfig, ReadBits
from grinqh.device import find_device
from grinqh.errors import InputError
from grinqh.evaluate import Reference, evaluate, token_windows
from grinqh.model import packed_bytes, packed_layers, stored_bits
from grinqh.resume import KeptLayers, fingerprint
from grinqh.shards import shard_bytes
from grinqh.source import Source
from grinqh.texts import CALIBRATION_TEXT_NAME, calibration_text, read_text
from grinqh.unconverted import full_precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CALIBRATION_TOKENS = 8192
EVALUATION_WINDOW, EVALUATION_WINDOWS = 512, 8  # enough for a model card; `grinqh ppl` does it thoroughly


@dataclass(frozen=True)
class Evaluation:
    """What the converted model does on a text, every token graded."""

    text: str
    windows: str
    read_bits: float  # realised
    perplexity: float
    reference_perplexity: float  # of the model at full precision


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
    rotated_heads: int  # attention layers whose heads were rotated
    device: str  # where it was converted and calibrated
    read_bits: ReadBits  # the dial's setting after loading
    evaluation: Evaluation | None

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
    rotate_heads: bool | None = None,
    evaluation: str | Path | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    max_shard_size: int | str | None = None,
    force: bool = False,
    resume: bool = True,
    command: str = "grinqh.convert",
    on_start: Callable[[], None] | None = None,
) -> Conversion:
    """Quantizes, calibrates and saves a model, with its tokenizer and a model card.

    The folder appears when everything in it is written, and not before. Until then packed layers are kept in
    `<out>.packing`; a conversion that follows an interrupted one, of the same source with the same settings, goes on
    with them.

    Args:
        source: a Hugging Face folder with safetensors, or a GGUF file.
        out: the folder to make.
        config: what to convert and how; None for the defaults.
        calibration: a UTF-8 text file; None for the help topics of Python.
        calibration_tokens: how much of it to use, about.
        rotate_heads: whether attention heads may be rotated first (`grinqh.rotate_heads`): better at equal read bits,
            worse where few are stored. None: if `config.stored_bits` is None. v_proj and o_proj then stay at full
            precision until the rest is packed, and adapters of the original model do not fit them any more.
        evaluation: a UTF-8 text file on which the model card gives the perplexity; None for none. The full-precision
            model is loaded for it, beside the converted one.
        dtype: of what stays at full precision; "auto" for the source's own.
        device: where weights are packed and the model is calibrated: "cpu", "cuda", "cuda:N", or "auto" for the first
            NVIDIA GPU if there is one; None for the CPU.
        max_shard_size: bytes of a weight file at most, as a number or as "5GB"; None for transformers' own.
        force: replace a converted model that is there already.
        resume: whether to keep packed layers for the next conversion and to use those of the last.
        command: what the model card gives as the command that made it.
        on_start: called when all that can be checked beforehand was, and the weights are about to be read.

    Raises:
        InputError: see `Source`; a device that is not there; an `out` that exists or cannot be written; a weight that
            is NaN or infinite; experts of a mixture that `config` does not name (see `GrinqhConfig`); a
            `max_shard_size` that is no size.
    """
    shards = {} if max_shard_size is None else {"max_shard_size": shard_bytes(max_shard_size)}
    config = GrinqhConfig() if config is None else config
    device = find_device(device)
    checked = Source(source)
    text = calibration_text() if calibration is None else read_text(calibration)
    evaluation_text = None if evaluation is None else (Path(evaluation).name, read_text(evaluation))
    text_name = CALIBRATION_TEXT_NAME if calibration is None else Path(calibration).name
    facts: list[Any] = [checked.fingerprint(), config.to_dict(), str(dtype), versions()["grinqh"]]
    if rotate_heads is None:
        rotate_heads = config.stored_bits is None
    if rotate_heads:  # on which the weights then depend
        facts += [fingerprint(text), calibration_tokens]
    rotated: list[str] = []

    def rotate(model: Any) -> None:
        rotated.extend(heads.rotate_heads(model, text, checked.tokenizer, max_tokens=calibration_tokens))

    kept = KeptLayers(Path(out), fingerprint(facts), enabled=resume)
    with _new_folder(Path(out), force) as folder, kept:
        if on_start is not None:
            on_start()
        with kept.in_use():
            model: Any = checked.load_quantized(config, dtype, device, rotate if rotate_heads else None)
        if kept.taken:
            print(f"{kept.taken} layers were packed by an earlier run and are used again", file=sys.stderr)
        report = calibrate(model, text, checked.tokenizer, max_tokens=calibration_tokens)
        quality = None if evaluation_text is None else _evaluate(model, checked, dtype, device, *evaluation_text)
        model.to("cpu")  # in canonical order, as the file: on a GPU there would be two copies
        model.save_pretrained(folder, **shards)
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
            rotated_heads=len(rotated),
            device=str(device),
            read_bits=config.read_bits,
            evaluation=quality,
        )
        (folder / "README.md").write_text(_model_card(conversion, config, command), encoding="utf-8")
        _make_weights_as_readable_as(folder / "README.md", folder)
    kept.discard()
    return conversion


def _evaluate(
    model: PreTrainedModel, source: Source, dtype: torch.dtype | str, device: torch.device, name: str, text: str
) -> Evaluation:
    windows = token_windows(source.tokenizer, text, EVALUATION_WINDOW, EVALUATION_WINDOWS)
    (score,) = evaluate(model, windows, reference=Reference(lambda: source.load_model(dtype, device)))
    if score.read_bits is None or score.reference_perplexity is None:
        raise AssertionError("every token was graded and compared")
    return Evaluation(name, windows.describe(), score.read_bits, score.perplexity, score.reference_perplexity)


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
    read_bits = conversion.read_bits
    settings = read_bits.items() if isinstance(read_bits, Mapping) else [("", read_bits)]
    dial = ", ".join(f"{bits:g} {pattern and f'for `{pattern}`'}".strip() for pattern, bits in settings)
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
| read bits | {dial}: the dial's setting after loading |
| size | {conversion.total_bytes / 1e6:,.1f} MB, of which {conversion.packed_bytes / 1e6:,.1f} MB are converted layers |
| calibration | {conversion.calibration_tokens:,} tokens of {conversion.calibration} |
| heads | rotated in {conversion.rotated_heads} attention layers: adapters of the original do not fit v and o |
{_perplexity_row(conversion.evaluation)}
The licence is that of the original model.
"""


def _perplexity_row(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return ""
    return (
        f"| perplexity | {evaluation.perplexity:.2f} at {evaluation.read_bits:.2f} read bits, "
        f"{evaluation.reference_perplexity:.2f} at full precision; {evaluation.windows}, of {evaluation.text}; "
        "every token graded |\n"
    )
