"""Packs a model's weights while transformers reads them: those of one layer are in memory at full precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from grinqh import packing
from grinqh.config import GrinqhConfig
from grinqh.fusion import fuse_linears, groups
from grinqh.heads import find_heads
from grinqh.memory import release_file_pages, trim_heap
from grinqh.model import (
    Model,
    linear_layers,
    output_heads,
    pack_linears,
    pack_weight,
    packed_layer,
)
from grinqh.packing import PackedTensors
from grinqh.unconverted import check_unconverted

_LEAVING_HEADS: ContextVar[bool] = ContextVar("grinqh_leaving_heads", default=False)


@contextmanager
def leaving_heads() -> Iterator[None]:
    """Within it what `grinqh.rotate_heads` changes is left at full precision, for a later `pack_loaded`."""
    token = _LEAVING_HEADS.set(True)
    try:
        yield
    finally:
        _LEAVING_HEADS.reset(token)


def _left(model: nn.Module, config: GrinqhConfig, layers: Mapping[str, nn.Linear]) -> set[str]:
    """Names of the layers that are left for later: v and o of heads, and what is fused with them."""
    if not _LEAVING_HEADS.get():
        return set()
    changing = {id(layer) for of in find_heads(model) for layer in (of.v, of.o)}
    left = {name for name, layer in layers.items() if id(layer) in changing}
    if config.fuse:
        left.update(*(group.names for group in groups(model, config, layers) if left.intersection(group.names)))
    return left


class WeightToPack:
    """The weight of one packed layer, which may come in parts; it is packed as soon as the last one is there."""

    def __init__(self, name: str, parts: int, config: GrinqhConfig) -> None:
        self.name = name
        self.config = config
        self.missing = set(range(parts))
        self.parts: list[Tensor | None] = [None] * parts
        self.packed: PackedTensors = {}
        self.device = torch.device("meta")  # of the weight that was packed

    def set_part(self, index: int, name: str, weight: Tensor) -> None:
        """Takes a part; `name` is what to call it in an error."""
        if len(self.parts) > 1:  # else packing says the same
            packing.check_weight(f"{name}.weight", weight)
        self.parts[index] = weight
        self.missing.discard(index)
        if not self.missing:
            weights = [part for part in self.parts if part is not None]
            self.parts = [None] * len(weights)
            self.packed = pack_weight(self.name, weights[0] if len(weights) == 1 else torch.cat(weights), self.config)
            self.device = weight.device
            for part in weights:
                release_file_pages(part)
            trim_heap()


class LinearToPack(nn.Linear):
    """Stands for a linear layer in a model that is being loaded, and has its weight packed as soon as that is set.

    Its own weight stays on the meta device.
    """

    def __init__(self, name: str, linear: nn.Linear, target: WeightToPack, index: int) -> None:
        bias, dtype = linear.bias is not None, linear.weight.dtype
        super().__init__(linear.in_features, linear.out_features, bias, device="meta", dtype=dtype)
        self.name = name
        self.target = target
        self.index = index

    def __setattr__(self, attribute: str, value: Any) -> None:
        if attribute == "weight" and not value.is_meta:
            self.target.set_part(self.index, self.name, value)
        else:
            super().__setattr__(attribute, value)


def expect_weights(model: nn.Module, config: GrinqhConfig) -> None:
    """Makes an empty model ready to have its weights loaded and packed.

    Output heads are left for `pack_rest`: one that is tied has no weight of its own in the files.

    Raises:
        InputError: nothing to convert, a pattern that matches nothing, or experts (see `check_unconverted`).
    """
    layers = linear_layers(model, config)
    check_unconverted(model, config)
    apart = output_heads(model) | _left(model, config, layers)
    layers = {name: linear for name, linear in layers.items() if name not in apart}
    parts_of = {name: [name] for name in layers}
    if config.fuse:
        for group in groups(model, config, layers):
            parts_of[group.fused_name] = [parts_of.pop(name)[0] for name in group.names]
    for layer, parts in parts_of.items():
        target = WeightToPack(layer, len(parts), config)
        for index, name in enumerate(parts):
            model.set_submodule(name, LinearToPack(name, layers[name], target, index))


def pack_rest(model: nn.Module, config: GrinqhConfig) -> None:
    """Puts the packed layers in place of those that stood for them, and packs what was left."""
    loaded = {name: module for name, module in model.named_modules() if isinstance(module, LinearToPack)}
    targets = {name: module.target for name, module in loaded.items()}
    layers: dict[str, nn.Linear] = dict(loaded)
    if config.fuse:
        targets |= {group.fused_name: targets[group.names[0]] for group in groups(model, config, layers)}
        fuse_linears(model, config, layers)
    for name, linear in layers.items():
        target = targets[name]
        model.set_submodule(name, packed_layer(name, linear, target.packed, config, target.device))
    pack_loaded(model, config, check=False)


def pack_loaded(model: Model, config: GrinqhConfig, *, check: bool = True) -> Model:
    """Packs what is at full precision of a model, and returns it; `check` as in `linear_layers`.

    Raises:
        InputError: see `check`; experts (see `check_unconverted`), or a weight that cannot be packed.
    """
    layers = linear_layers(model, config, check=check)
    if check:
        check_unconverted(model, config)
    for name in _left(model, config, layers):
        del layers[name]
    pack_linears(model, config, layers)
    return model
