"""Packs a model's weights while transformers reads them: one of them at a time is in memory at full precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from grinqh.config import GrinqhConfig
from grinqh.linear import GrinqhLinear
from grinqh.memory import release_file_pages, trim_heap
from grinqh.model import (
    linear_layers,
    output_heads,
    pack_weight,
    packed_layer,
    record_config,
    warn_of_unconverted,
)
from grinqh.packing import PackedTensors


class LinearToPack(nn.Linear):
    """Stands for a packed layer in a model that is being loaded, and packs its weight as soon as that is set.

    Its own weight stays on the meta device.
    """

    def __init__(self, name: str, linear: nn.Linear, config: GrinqhConfig) -> None:
        bias, dtype = linear.bias is not None, linear.weight.dtype
        super().__init__(linear.in_features, linear.out_features, bias, device="meta", dtype=dtype)
        self.name = name
        self.config = config
        self.packed: PackedTensors = {}
        self.device = torch.device("meta")  # of the weight that was packed

    def __setattr__(self, attribute: str, value: Any) -> None:
        if attribute == "weight" and not value.is_meta:
            self.packed = pack_weight(self.name, value, self.config)
            self.device = value.device
            release_file_pages(value)
            trim_heap()
        else:
            super().__setattr__(attribute, value)

    def finished(self) -> GrinqhLinear:
        """The packed layer, once everything is loaded."""
        return packed_layer(self.name, self, self.packed, self.config, self.device)


def expect_weights(model: nn.Module, config: GrinqhConfig) -> None:
    """Makes an empty model ready to have its weights loaded and packed.

    Heads are left for `pack_rest`: one that is tied has no weight of its own in the files.

    Raises:
        InputError: nothing to convert, or a pattern that matches nothing.
    """
    layers = linear_layers(model, config)
    warn_of_unconverted(model, layers)
    for name in layers.keys() - output_heads(model):
        model.set_submodule(name, LinearToPack(name, layers[name], config))


def pack_rest(model: nn.Module, config: GrinqhConfig) -> None:
    """Puts the packed layers in place of those that stood for them, and packs what was left."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LinearToPack):
            model.set_submodule(name, module.finished())
    for name, linear in linear_layers(model, config, check=False).items():
        tensors = pack_weight(name, linear.weight, config)
        model.set_submodule(name, packed_layer(name, linear, tensors, config, linear.weight.device))
    record_config(model, config)
