"""Linear layers that see the same input become one: an input is graded once, and one kernel does the work.

A model's own code calls `self.q_proj(x)`, `self.k_proj(x)` and `self.v_proj(x)`. The fused layer is a new child of the
same parent, `qkv_proj`, and the old names hold `FusedPart`s: the first to be called runs the fused layer, and the
others take their slices of what it returned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from grinqh.config import GrinqhConfig, matches

SIBLINGS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


class FusedLinear(nn.Linear):
    """Several linear layers put together; `sections` are their numbers of outputs."""

    sections: tuple[int, ...]


class FusedPart(nn.Module):
    """Takes the place of a linear layer that became a part of a fused one; it has no tensors of its own."""

    def __init__(self, outputs: FusedOutputs, index: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.index = index
        self.in_features = in_features
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        """Maps x [..., in_features] to [..., out_features]; a view, whose last dimension alone is contiguous."""
        return self.outputs.part(self.index, x)

    def extra_repr(self) -> str:
        """What it is a part of, for printing."""
        return f"in_features={self.in_features}, out_features={self.out_features}, part of {self.outputs.name}"


class FusedOutputs:
    """What the parts of a fused layer share: its outputs for an input, until every part has taken its slice.

    Outputs are kept only while the parent's forward runs, and returned only for the very same tensor. So a part that
    is called alone, in another order, twice or with another input runs the fused layer itself, and nothing that can
    change between two calls of the model (the dial, gradients switched on) makes a kept output wrong. The one thing
    asked of the parent's code is that it does not change an input in place between the calls of its parts.
    """

    def __init__(self, parent: nn.Module, name: str, sizes: list[int]) -> None:
        self.parent = parent
        self.name = name  # of the fused layer in the parent, where it may be replaced
        self.sizes = sizes
        self.running = False
        self.kept: tuple[Tensor, dict[int, Tensor]] | None = None  # an input, and the slices not yet taken
        parent.register_forward_pre_hook(self.begin)
        parent.register_forward_hook(self.end, always_call=True)

    def begin(self, *_: object) -> None:
        """The parent's forward begins."""
        self.running, self.kept = True, None

    def end(self, *_: object) -> None:
        """The parent's forward has ended, or failed."""
        self.running, self.kept = False, None

    def part(self, index: int, x: Tensor) -> Tensor:
        """The slice of that index of the fused layer's output for x."""
        kept = self.kept
        if kept is not None and kept[0] is x and index in kept[1]:
            part = kept[1].pop(index)
            if not kept[1]:
                self.kept = None
            return part
        y: Tensor = getattr(self.parent, self.name)(x)
        parts = dict(enumerate(y.split(self.sizes, dim=-1)))
        part = parts.pop(index)
        self.kept = (x, parts) if self.running else None
        return part


class Group(NamedTuple):
    """Sibling layers to be fused."""

    parent: str
    fused: str  # name of the fused layer in the parent
    parts: tuple[str, ...]  # names in the parent, in the order of their outputs

    @property
    def names(self) -> list[str]:
        """Full names of the parts."""
        return [self._full(part) for part in self.parts]

    @property
    def fused_name(self) -> str:
        """Full name of the fused layer."""
        return self._full(self.fused)

    def _full(self, name: str) -> str:
        return f"{self.parent}.{name}" if self.parent else name


def fuse_linears(model: nn.Module, config: GrinqhConfig, layers: dict[str, nn.Linear]) -> None:
    """Fuses sibling `torch.nn.Linear` layers, in place; a model on the meta device will do.

    Args:
        model: any module.
        config: says what stays apart (see `groups`).
        layers: those to be converted, by name; changed to hold the fused layers in place of their parts, so that the
            full-precision weights of no more than one group are in memory twice.
    """
    for group in list(groups(model, config, layers)):
        parent = model.get_submodule(group.parent)
        linears = [layers.pop(name) for name in group.names]
        if not hasattr(parent, group.fused):  # else: a parent of several names, which came up by another
            fused = concatenated(linears)
            parent.add_module(group.fused, fused)
            outputs = FusedOutputs(parent, group.fused, list(fused.sections))
            for index, (part, linear) in enumerate(zip(group.parts, linears, strict=True)):
                setattr(parent, part, FusedPart(outputs, index, linear.in_features, linear.out_features))
        layers[group.fused_name] = getattr(parent, group.fused)


def groups(model: nn.Module, config: GrinqhConfig, layers: Mapping[str, nn.Linear]) -> Iterator[Group]:
    """The groups of layers that are fused: complete, of equal inputs, all with a bias or all without.

    Layers that `overrides` names stay apart, and so do layers that several parents share.
    """
    parents: dict[int, set[int]] = {}
    for name, linear in layers.items():
        parents.setdefault(id(linear), set()).add(id(model.get_submodule(name.rpartition(".")[0])))
    kept_apart = [*config.overrides, *(config.modules_to_not_convert or [])]
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in layers):
        for fused, parts in SIBLINGS.items():
            group = Group(parent, fused, parts)
            linears = [layers[name] for name in group.names if name in layers]
            traits = {
                (linear.in_features, linear.bias is None, linear.weight.dtype, linear.weight.device)
                for linear in linears
            }
            if (
                len(linears) == len(parts)
                and len(traits) == 1
                and len({id(linear) for linear in linears}) == len(parts)
                and all(len(parents[id(linear)]) == 1 for linear in linears)
                and not hasattr(model.get_submodule(parent), fused)
                and not any(matches(p, name) for p in kept_apart for name in [*group.names, group.fused_name])
            ):
                yield group


def sections_of(linear: nn.Linear) -> tuple[int, ...]:
    """Numbers of outputs of the layers that a linear layer was put together from; none if it was not."""
    return linear.sections if isinstance(linear, FusedLinear) else ()


def concatenated(linears: list[nn.Linear]) -> FusedLinear:
    """One linear layer whose outputs are those of the given ones, one after the other."""
    first = linears[0]
    bias = first.bias is not None
    fused = FusedLinear(first.in_features, sum(linear.out_features for linear in linears), bias, device="meta")
    fused.sections = tuple(linear.out_features for linear in linears)
    fused.weight = nn.Parameter(
        torch.cat([linear.weight.detach() for linear in linears]), requires_grad=first.weight.requires_grad
    )
    if bias:
        fused.bias = nn.Parameter(
            torch.cat([linear.bias.detach() for linear in linears]), requires_grad=first.bias.requires_grad
        )
    fused.train(first.training)
    return fused
