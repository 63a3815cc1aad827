"""Random packed layers for tests of the ops."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

OPS = torch.ops.grinqh
INF = float("inf")

FINE = (2, 1, 1, 2, 2)
EQUAL = (2, 2, 2, 2)


@dataclass(frozen=True)
class Layer:
    """The arguments of `grinqh::gemv` behind x, and the weights they were made from."""

    weight: Tensor  # float32 [N, K]
    planes: list[Tensor]
    block_scale: Tensor
    row_scale: Tensor
    gain: Tensor
    channel_order: Tensor
    channel_weight: Tensor
    thresholds: Tensor
    widths: list[int]
    block: int
    bias: Tensor | None = None
    budget: Tensor | None = None

    @property
    def arguments(self) -> tuple[Any, ...]:
        return (
            self.planes,
            self.block_scale,
            self.row_scale,
            self.gain,
            self.channel_order,
            self.channel_weight,
            self.thresholds,
            self.widths,
            self.block,
            self.bias,
            self.budget,
        )

    def replace(self, **changes: Any) -> Layer:
        return replace(self, **changes)

    def gemv(self, x: Tensor) -> Tensor:
        return OPS.gemv(x, *self.arguments)

    def dense(self, grade: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """[K, N] at a grade, by input feature."""
        layer = (self.planes, self.block_scale, self.row_scale, self.gain, self.channel_order, self.widths, self.block)
        return OPS.dequantize(*layer, grade, dtype)

    def grades(self, x: Tensor) -> Tensor:
        """[..., K] by input feature."""
        arguments = (self.planes, self.channel_order, self.channel_weight, self.thresholds, self.widths, self.budget)
        stored = OPS.grade(x, *arguments)
        return torch.empty_like(stored).index_copy_(-1, self.channel_order.long(), stored)

    def reference(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The product in float64 and the sum of its terms' magnitudes, for finite x."""
        grades = self.grades(x)
        product = magnitude = torch.zeros(1, dtype=torch.float64)
        for grade in range(1, len(self.widths) + 1):
            read = torch.where(grades == grade, x.double(), 0)
            dense = self.dense(grade).double()
            product = product + read @ dense
            magnitude = magnitude + read.abs() @ dense.abs()
        return product if self.bias is None else product + self.bias.double(), magnitude


def make_layer(
    n: int,
    k: int,
    widths: tuple[int, ...] = FINE,
    block: int = 64,
    stored: tuple[int, ...] | None = None,
    seed: int = 0,
) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    order = torch.randperm(k, generator=generator).int()
    codes, block_scale, row_scale, gain, _ = OPS.quantize(weight, order, block)
    bits = torch.tensor(widths).cumsum(0)
    return Layer(
        weight=weight,
        planes=OPS.pack(codes, list(widths), list(stored or (k,) * len(widths))),
        block_scale=block_scale,
        row_scale=row_scale,
        gain=gain[bits].contiguous(),
        channel_order=order,
        channel_weight=torch.rand(k, generator=generator) + 0.5,
        thresholds=torch.linspace(0.25, 1.25, len(widths)),
        widths=list(widths),
        block=block,
    )
