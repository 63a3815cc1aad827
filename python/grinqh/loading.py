"""`grinqh.from_pretrained`: loads a converted language model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grinqh.config import QUANT_METHOD, GrinqhConfig, ReadBits
from grinqh.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def from_pretrained(
    path: str | Path,
    *,
    read_bits: ReadBits | None = None,
    stored_bits: float | None = None,
    exact_budget: bool | None = None,
    max_graded_rows: int | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Loads a converted causal language model: transformers' `AutoModelForCausalLM.from_pretrained` plus the dial.

    Args:
        path: directory that `save_pretrained` or `grinqh convert` wrote, or a name on the Hub.
        read_bits: the dial (see `grinqh.set_bits`); None for the setting that the model records.
        stored_bits: low planes beyond so many bits per weight are not read from the disk; None for all.
        exact_budget: see `grinqh.set_bits`.
        max_graded_rows: see `grinqh.GrinqhConfig`.
        kwargs: whatever else transformers' `from_pretrained` takes.

    Raises:
        InputError: not a GRINQH model, tensors that contradict its config, or a setting out of range.
    """
    from transformers import AutoModelForCausalLM, PreTrainedConfig

    recorded = PreTrainedConfig.get_config_dict(path, **kwargs)[0].get("quantization_config") or {}
    if recorded.get("quant_method") != QUANT_METHOD:
        raise InputError(
            f"{path} is not a GRINQH model: its config.json has quant_method {recorded.get('quant_method')!r}"
        )
    settings = GrinqhConfig(
        read_bits=read_bits, stored_bits=stored_bits, exact_budget=exact_budget, max_graded_rows=max_graded_rows
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")  # meant, here
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, quantization_config=settings, **kwargs)
    return model
