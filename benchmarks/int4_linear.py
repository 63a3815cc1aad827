"""torch's own int4 kernel as a linear layer: what weight-only int4 of torchao runs on an NVIDIA GPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

GROUP = 128  # inputs that share a scale and a zero
INNER_TILES = 8


class Int4Linear(nn.Module):
    """Takes the place of a `torch.nn.Linear` without bias; inputs are bfloat16."""

    weight: Tensor
    scales_and_zeros: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        if linear.bias is not None:
            raise ValueError("Int4Linear takes no bias")
        self.in_features: int = linear.in_features
        self.out_features: int = linear.out_features
        codes, scales_and_zeros = quantize_int4(linear.weight)
        nibbles = codes[:, ::2] << 4 | codes[:, 1::2]
        self.register_buffer("weight", torch.ops.aten._convert_weight_to_int4pack(nibbles, INNER_TILES))
        self.register_buffer("scales_and_zeros", scales_and_zeros)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        product = compiled_product if torch.compiler.is_compiling() else int4_product
        y = product(rows, self.weight, self.scales_and_zeros)
        return y.reshape(*x.shape[:-1], self.out_features)


def int4_product(rows: Tensor, weight: Tensor, scales_and_zeros: Tensor) -> Tensor:
    """Outputs bfloat16 [M, N] for rows bfloat16 [M, K]."""
    return torch.ops.aten._weight_int4pack_mm(rows.contiguous(), weight, GROUP, scales_and_zeros)


@torch.library.custom_op("int4_linear::product", mutates_args=())
def compiled_product(rows: Tensor, weight: Tensor, scales_and_zeros: Tensor) -> Tensor:
    """The same for compiled code, as an op of its own: the compiler gives aten's kernel rows in a layout of its choice.

    In code that the compiler sees, `contiguous` does not help: it is taken away where rows are contiguous in eager
    mode.
    """
    return int4_product(rows, weight, scales_and_zeros)


@compiled_product.register_fake
def _compiled_product_fake(rows: Tensor, weight: Tensor, scales_and_zeros: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], scales_and_zeros.shape[1])


def quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each group between its least and its greatest value.

    Args:
        weight: any float type [N, K], K a multiple of 128.

    Returns:
        Codes 0..15, uint8 [N, K], and bfloat16 [K / 128, N, 2]: scale and zero, where a weight is
        (code - 8) * scale + zero.
    """
    groups = weight.detach().float().reshape(weight.shape[0], -1, GROUP)
    least, greatest = groups.aminmax(dim=2)
    scale = ((greatest - least) / 15).clamp(min=1e-6)
    codes = ((groups - least[..., None]) / scale[..., None]).round_().clamp_(0, 15).to(torch.uint8)
    scales_and_zeros = torch.stack([scale, least + 8 * scale], dim=-1).transpose(0, 1)
    return codes.reshape(weight.shape), scales_and_zeros.bfloat16().contiguous()
