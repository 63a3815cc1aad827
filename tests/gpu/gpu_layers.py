"""Packed layers for the GPU tests: canonical on the CPU, in tile order on the GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

ops = torch.ops.grinqh


@dataclass
class Layer:
    """The arguments of the ops after x, in the order of their schemas."""

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

    def arguments(self) -> tuple:
        return tuple(vars(self).values())

    def weight(self) -> tuple:
        """The arguments of dequantize before grade and dtype."""
        return (*self.arguments()[:5], self.widths, self.block)

    def cuda(self) -> Layer:
        moved = {
            name: [t.cuda() for t in value] if name == "planes" else value.cuda()
            for name, value in vars(self).items()
            if isinstance(value, (Tensor, list)) and name != "widths"
        }
        moved["planes"], moved["block_scale"] = ops.repack(
            moved["planes"], moved["block_scale"], self.widths, self.row_scale.shape[0], self.block
        )
        return replace(self, **moved)


def make_layer(
    n: int,
    k: int,
    widths: tuple[int, ...] = (2, 2, 2, 2),
    block: int = 64,
    channels: tuple[int, ...] | None = None,
    bias_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Layer:
    """A layer of Gaussian weights; thresholds such that Gaussian x meets every grade."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator) / k**0.5
    order = torch.randperm(k, generator=generator).int()
    codes, block_scale, row_scale, gain, _ = ops.quantize(weight, order, block)
    bits = torch.tensor(widths).cumsum(0)
    return Layer(
        planes=ops.pack(codes, list(widths), list(channels or (k,) * len(widths))),
        block_scale=block_scale,
        row_scale=row_scale,
        gain=gain[bits].contiguous(),
        channel_order=order,
        channel_weight=torch.rand(k, generator=generator) + 0.5,
        thresholds=torch.linspace(0.1, 2.0, len(widths)),
        widths=list(widths),
        block=block,
        bias=None if bias_dtype is None else torch.randn(n, generator=generator).to(bias_dtype),
    )


def make_x(rows: int, k: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Gaussian values, one in sixteen eight times as large."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=generator)
    x[:, ::16] *= 8
    return x.to(dtype)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted; infinite where a value is not finite."""
    difference = (got.double().cpu() - wanted.double().cpu()).norm() / wanted.double().norm()
    return float(difference) if torch.isfinite(difference) else float("inf")
