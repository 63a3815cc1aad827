"""What decode.py compares: each method turns a dense model into the one that is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from int4_linear import Int4Linear
from torch import nn

import grinqh

DIAL = (2.0, 2.5, 3.0, 4.0, 8.0)
CALIBRATION_TOKENS = 1024
CALIBRATION_LENGTH = 256


@dataclass(frozen=True)
class Method:
    """A way to run a model."""

    name: str
    dtype: torch.dtype
    bits: Sequence[float]  # bits per weight to time it at: settings of the dial, or what it stores
    convert: Callable[[Any], None]  # in place
    dial: bool = False

    def set(self, model: nn.Module, bits: float) -> None:
        """Turns the dial, if there is one."""
        if self.dial:
            grinqh.set_bits(model, bits)


def use_int4(head: bool) -> Callable[[Any], None]:
    """Every linear layer on torch's int4 kernel."""

    def convert(model: Any) -> None:
        dense = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        for name in list(dense):
            linear = dense.pop(name)  # so that its weight is freed
            if head or linear is not model.get_output_embeddings():
                model.set_submodule(name, Int4Linear(linear))

    return convert


def use_nf4(model: Any) -> None:
    """Every linear layer but the head in the 4-bit floats of the package bitsandbytes, blocks of 64."""
    from bitsandbytes.nn import Linear4bit, Params4bit  # type: ignore[import-not-found]

    dense = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name in list(dense):
        linear = dense.pop(name)
        if linear is model.get_output_embeddings():
            continue
        weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4").to(linear.weight.device)
        layer = Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=linear.weight.dtype, device="meta"
        )
        layer.weight, layer.bias = weight, linear.bias
        model.set_submodule(name, layer)


def use_grinqh(head: bool, fuse: bool = False, layers: bool = False) -> Callable[[Any], None]:
    """Converted and calibrated on random tokens, so that the dial is that of the random model's own activations."""

    def convert(model: Any) -> None:
        grinqh.quantize_model(model, grinqh.GrinqhConfig(convert_lm_head=head, fuse=fuse), progress=False)
        generator = torch.Generator().manual_seed(1)
        shape = (CALIBRATION_TOKENS // CALIBRATION_LENGTH, 1, CALIBRATION_LENGTH)
        ids = torch.randint(model.config.vocab_size, shape, generator=generator)
        grinqh.calibrate(model, list(ids), progress=False)
        if layers:
            grinqh.fuse_decoder(model)

    return convert


METHODS = [
    Method("float16", torch.float16, (16.0,), lambda model: None),
    Method("tinygemm int4", torch.bfloat16, (4.0,), use_int4(head=False)),
    Method("tinygemm int4, head too", torch.bfloat16, (4.0,), use_int4(head=True)),
    Method("bitsandbytes NF4", torch.float16, (4.0,), use_nf4),
    Method("grinqh", torch.float16, DIAL, use_grinqh(head=False), dial=True),
    Method("grinqh, head too", torch.float16, DIAL, use_grinqh(head=True), dial=True),
    Method("grinqh, fused", torch.float16, DIAL, use_grinqh(head=False, fuse=True), dial=True),
    Method("grinqh, fused, head too", torch.float16, DIAL, use_grinqh(head=True, fuse=True), dial=True),
    Method(
        "grinqh, fused layers, head too", torch.float16, DIAL, use_grinqh(head=True, fuse=True, layers=True), dial=True
    ),
]
