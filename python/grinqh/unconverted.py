"""Weights that a conversion leaves at full precision: experts are refused unless they are named, the rest is listed."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator

from torch import nn

from grinqh.config import GrinqhConfig, matches
from grinqh.errors import InputError
from grinqh.linear import GrinqhLinear


def check_unconverted(model: nn.Module, config: GrinqhConfig) -> None:
    """Refuses stacks of matrices that a conversion would leave out, and warns of single matrices.

    The experts of a mixture are stacks: parameters [experts, .., ..]. What `modules_to_not_convert` names, by the name
    of the parameter or of its module, is meant to be left out.

    Raises:
        InputError: stacks that are not named: their names, number and shape, and how to proceed.

    Warns:
        UserWarning: matrices that are not named (a mixture's routers, say).
    """
    unnamed = [
        (name, parameter)
        for name, parameter in other_weights(model)
        if not any(named(pattern, name) for pattern in config.modules_to_not_convert or [])
    ]
    stacks = [(name, parameter) for name, parameter in unnamed if _is_stack(parameter)]
    if stacks:
        values = sum(parameter.numel() for _, parameter in stacks)
        total = sum(parameter.numel() for parameter in model.parameters())
        patterns = sorted({_pattern(name) for name, _ in stacks})
        raise InputError(
            f"{type(model).__name__} keeps weights in stacks of matrices, as the experts of a mixture, and only "
            f"torch.nn.Linear is converted: {'; '.join(grouped(stacks))}, {values / total:.0%} of its parameters. To "
            f"leave them at full precision and convert the rest, name them in modules_to_not_convert (--exclude): "
            f"{patterns}"
        )
    if unnamed:
        listed = "; ".join(grouped(unnamed))
        warnings.warn(f"left at full precision, only torch.nn.Linear is converted: {listed}", stacklevel=3)


def other_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that look like weights of linear layers, but belong to none that can be converted.

    Embeddings and convolutions are not meant.
    """
    for module_name, module in model.named_modules():
        if type(module) is nn.Linear or isinstance(module, GrinqhLinear | nn.Embedding | nn.modules.conv._ConvNd):
            continue
        for name, parameter in module.named_parameters(module_name, recurse=False):
            if parameter.ndim >= 2 and min(parameter.shape[-2:]) > 1:
                yield name, parameter


def named(pattern: str, parameter: str) -> bool:
    """Whether a pattern (see `grinqh.config.matches`) means a parameter or the module that holds it."""
    return matches(pattern, parameter) or matches(pattern, parameter.rpartition(".")[0])


def full_precision(model: nn.Module) -> list[str]:
    """The matrices of a converted model that are not packed, embeddings and heads among them, as `grouped` gives."""
    packed = {id(p) for module in model.modules() if isinstance(module, GrinqhLinear) for p in module.parameters()}
    return grouped((name, p) for name, p in model.named_parameters() if p.ndim >= 2 and id(p) not in packed)


def grouped(parameters: Iterable[tuple[str, nn.Parameter]]) -> list[str]:
    """One text for the parameters that differ only in numbers in their names: `layers.*.up (2 of shape [4, 8])`."""
    groups: dict[tuple[str, str], int] = {}
    for name, parameter in parameters:
        group = _pattern(name), str(list(parameter.shape))
        groups[group] = groups.get(group, 0) + 1
    return [f"{pattern} ({count} of shape {shape})" for (pattern, shape), count in groups.items()]


def _pattern(name: str) -> str:
    """The name with * for each part that is a number; it matches the name."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _is_stack(parameter: nn.Parameter) -> bool:
    return parameter.shape[:-2].numel() > 1  # [1, .., ..] is a single matrix, [.., ..] has the product 1, too
