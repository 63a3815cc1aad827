"""Reading a GGUF file as an ordinary full-precision model, through transformers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from grinqh.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAGIC = b"GGUF"
# Older ones load tokenizers without their BOS token, and up to 5.17 merge the tokens of those that list no merges (as
# Gemma's) in a wrong order: such a model would be calibrated and saved with another tokenizer than its own.
LEAST_TRANSFORMERS = (5, 23)


def is_gguf(path: Path) -> bool:
    """Whether the path is to be read as a GGUF file: by its name, or by its first bytes."""
    if not path.is_file():
        return False
    if path.suffix.lower() == ".gguf":
        return True
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def check_gguf(path: Path) -> None:
    """Refuses a file that is no GGUF, or that the installed packages cannot read; loading finds other damage."""
    for package in ("gguf", "accelerate", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"reading a GGUF file needs the package {package}: pip install 'grinqh[gguf]'")
    installed = importlib.metadata.version("transformers")
    if tuple(int(number) for number in re.findall(r"\d+", installed)[:2]) < LEAST_TRANSFORMERS:
        least = ".".join(map(str, LEAST_TRANSFORMERS))
        raise InputError(
            f"reading a GGUF file needs transformers {least} or later, {installed} is installed and gets tokenizers "
            "wrong: pip install --upgrade 'grinqh[gguf]'"
        )
    with path.open("rb") as file:
        magic = file.read(len(MAGIC))
    if magic != MAGIC:
        raise InputError(f"cannot read GGUF file {path}: it begins with {magic!r}, not with {MAGIC!r}")


def load_gguf_model(path: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    """The model of a GGUF file, its weights dequantized."""
    from transformers import AutoModelForCausalLM, GgufConfig

    model: PreTrainedModel
    try:
        with _no_bar_unless_watched():
            model = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=dtype
            )
    except Exception as error:  # unknown architectures, missing metadata: transformers has many ways to say so
        raise InputError(f"cannot read GGUF file {path}: {error}") from error
    return model


def load_gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:
        raise InputError(f"cannot read the tokenizer of GGUF file {path}: {error}") from error
    return tokenizer


@contextmanager
def _no_bar_unless_watched() -> Iterator[None]:
    """Keeps stderr clean where it is no terminal: transformers shows a bar for GGUF files everywhere."""
    with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
        yield
