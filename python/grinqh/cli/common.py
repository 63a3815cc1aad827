"""What the commands share: loading a converted model, values of options, output."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from grinqh.device import describe_device
from grinqh.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def calm_libraries() -> None:
    """Leaves stderr to our own words: one line for each warning, no bars where nobody watches."""
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        from transformers.utils import logging
    except ImportError:
        return  # commands that need it say so
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def need_transformers() -> None:
    """Refuses to go on without the package that loads models."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise InputError("this command needs the package transformers: pip install 'grinqh[hf]'") from error


def converted_config(folder: Path) -> dict[str, Any]:
    """config.json of a converted model; refuses anything else."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} is no converted model: it holds no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or (config.get("quantization_config") or {}).get("quant_method") != "grinqh":
        raise InputError(f"{folder} is no converted model: make one with `grinqh convert {folder} OUT`")
    return config


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Declares --device, which `grinqh.device.find_device` reads."""
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto, the first NVIDIA GPU, else the CPU)"
    )


def say_device(device: torch.device) -> None:
    """One line on stderr that says what runs."""
    print(f"device: {describe_device(device)}", file=sys.stderr)


def load_converted(folder: Path, device: torch.device, stored_bits: float | None = None) -> PreTrainedModel:
    """A converted model on a device, ready to run."""
    need_transformers()
    converted_config(folder)
    from grinqh import from_pretrained

    placement: dict[str, Any] = {} if device.type == "cpu" else {"device_map": str(device)}
    try:
        return from_pretrained(folder, stored_bits=stored_bits, **placement)
    except InputError:
        raise
    except Exception as error:  # a damaged file makes itself known in many ways
        raise InputError(f"cannot load {folder}: {error}") from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise InputError(f"cannot load the tokenizer in {folder}: {error}") from error
    return tokenizer


def numbers(text: str) -> list[float]:
    """Type of an option: numbers with commas between them."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers with commas between them, as 4,3,2.5") from error


def positive(text: str) -> int:
    """Type of an option: a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return value


def print_json(value: Any) -> None:
    """A result for programs."""
    print(json.dumps(value, indent=1))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A result for people: columns lined up to the right, the first to the left."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        first, *others = zip(row, widths, strict=True)
        print("  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip())


def shown(value: float | None, digits: int = 3) -> str:
    """A number for a table; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"
