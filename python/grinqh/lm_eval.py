"""The model type "grinqh" for lm-evaluation-harness, and its command line: `python -m grinqh.lm_eval`.

    python -m grinqh.lm_eval --model_args pretrained=DIR,read_bits=3 --tasks ...

takes the options of `lm_eval`; `--model grinqh` is understood.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grinqh.config import QUANT_METHOD, GrinqhConfig
from grinqh.errors import InputError
from grinqh.model import graded, model_config

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    _MISSING = f"grinqh.lm_eval needs the package lm_eval: pip install 'grinqh[eval]' ({error})"
    if __name__ != "__main__":
        raise ImportError(_MISSING) from error
    print(_MISSING, file=sys.stderr)
    sys.exit(2)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register_model("grinqh")
class GrinqhLM(HFLM):
    """A converted model, its tokens graded as in decoding.

    Log-likelihoods are computed with every row graded on its own, however long the text. Generated answers come from
    transformers' `generate`: prompts above `max_graded_rows` rows are read in full, tokens are graded.

    Args:
        pretrained: folder of a converted model, or a name on the Hub; or a loaded model, whose dial stays as it is.
        read_bits: the dial, a number (see `grinqh.set_bits`); None for the setting that the model records.
        stored_bits: low planes beyond so many bits per weight are not read from the disk; None for all.
        exact_budget: see `grinqh.set_bits`; None as the model records.
        arguments: what else the harness's model type "hf" takes.

    Raises:
        InputError: not a GRINQH model, a setting out of range, or settings for a loaded model.
    """

    def __init__(
        self,
        pretrained: str | Path | PreTrainedModel,
        read_bits: float | None = None,
        stored_bits: float | None = None,
        exact_budget: bool | None = None,
        **arguments: Any,
    ) -> None:
        self._settings = GrinqhConfig(read_bits=read_bits, stored_bits=stored_bits, exact_budget=exact_budget)
        if isinstance(pretrained, str | Path):
            pretrained = str(pretrained)
        elif given := self._settings.get_loading_attributes():
            raise InputError(f"{', '.join(given)}: cannot be set for a loaded model, call grinqh.set_bits before")
        super().__init__(pretrained, **arguments)

    def _create_model(self, pretrained: str, *arguments: Any, **keywords: Any) -> None:
        # As grinqh.from_pretrained does it, but with the harness's own placement on devices.
        recorded = getattr(self.config, "quantization_config", None) or {}
        if recorded.get("quant_method") != QUANT_METHOD:
            raise InputError(
                f"{pretrained} is not a GRINQH model: its config.json has quant_method {recorded.get('quant_method')!r}"
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")  # meant, here
            super()._create_model(pretrained, *arguments, **keywords | {"quantization_config": self._settings})

    def _model_call(self, *arguments: Any, **keywords: Any) -> Any:
        with graded(self.model):
            return super()._model_call(*arguments, **keywords)

    def _model_generate(self, context: Any, *arguments: Any, **keywords: Any) -> Any:
        most = model_config(self.model).max_graded_rows
        if len(context) > most:
            raise InputError(
                f"batch_size is {len(context)}, must be at most {most} where answers are generated: "
                "larger batches would be read in full"
            )
        return super()._model_generate(context, *arguments, **keywords)


def main() -> int:
    """Runs the harness's command line; returns the exit code."""
    arguments = sys.argv[1:]
    command = ["run"] if arguments[:1] == ["run"] else []
    rest = arguments[len(command) :]
    named = any(argument in ("--model", "-M") or argument.startswith("--model=") for argument in rest)
    if rest and rest[0].startswith("-") and not named:
        rest = ["--model", "grinqh", *rest]
    sys.argv[1:] = command + rest
    try:
        cli_evaluate()
    except InputError as error:
        print(f"grinqh.lm_eval: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
