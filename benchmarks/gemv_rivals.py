"""What the GEMV is compared with: each rival prepares rotating copies of a layer and returns their calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Make = Callable[[int], Callable[[], object]]


@dataclass(frozen=True)
class Rival:
    bits: float  # stored bits per weight
    prepare: Callable[[Tensor, int, int, int], Make]
    most_rows: int = 16  # that it is timed at


def cublas(x: Tensor, n: int, k: int, copies: int) -> Make:
    """torch's dense product in float16."""
    weights = [torch.randn(n, k, device="cuda", dtype=torch.float16) for _ in range(copies)]
    return lambda c: lambda: torch.nn.functional.linear(x, weights[c])


def tinygemm(x: Tensor, n: int, k: int, copies: int) -> Make:
    """torch's own 4-bit kernel, groups of 128, bfloat16."""
    weights, scales, x = [], [], x.bfloat16()
    for _ in range(copies):
        packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
        weights.append(torch.ops.aten._convert_weight_to_int4pack(packed, 8))
        scales.append(torch.rand(k // 128, n, 2, device="cuda").bfloat16())
    return lambda c: lambda: torch.ops.aten._weight_int4pack_mm(x, weights[c], 128, scales[c])


def humming(bits: int) -> Rival:
    """The kernels of the package humming-kernels, groups of 128, float16."""

    def prepare(x: Tensor, n: int, k: int, copies: int) -> Make:
        from humming.layer import HummingLayer  # type: ignore[import-not-found]

        layers = []
        for _ in range(copies):
            config = {"dtype": f"int{bits}", "group_size": 128}
            layer = HummingLayer(shape_n=n, shape_k=k, weight_config=config, torch_dtype=torch.float16).cuda()
            layer.load_from_unquantized(torch.randn(n, k, device="cuda", dtype=torch.float16))
            layer.transform()
            layers.append(layer)
        return lambda c: lambda: layers[c](x)

    return Rival(bits, prepare, most_rows=1)  # each number of rows is compiled anew, for seconds


def nf4(x: Tensor, n: int, k: int, copies: int) -> Make:
    """bitsandbytes' NormalFloat codes of 4 bits, blocks of 64, float16."""
    import bitsandbytes  # type: ignore[import-not-found]

    weights = []
    for _ in range(copies):
        dense = torch.randn(n, k, device="cuda", dtype=torch.float16)
        weights.append(bitsandbytes.functional.quantize_4bit(dense, blocksize=64, quant_type="nf4"))
    return lambda c: lambda: bitsandbytes.matmul_4bit(x, weights[c][0].t(), quant_state=weights[c][1])


def masked_rows(x: Tensor, n: int, k: int, copies: int) -> Make:
    """Activation sparsity: float16 weights stored by channel, channels of small |x| skipped (half of them)."""
    from masked_gemv import masked_gemv  # Triton is needed for this one only

    weights = [torch.randn(k, n, device="cuda", dtype=torch.float16) for _ in range(copies)]
    threshold = float(x.float().abs().median())
    return lambda c: lambda: masked_gemv(x, weights[c], threshold)


RIVALS = {
    "cublas": Rival(16, cublas, most_rows=1 << 20),
    "tinygemm int4": Rival(4, tinygemm),
    "bitsandbytes NF4": Rival(4, nf4),
    "humming int4": humming(4),
    "humming int3": humming(3),
    "humming int2": humming(2),
    "masked rows": Rival(16, masked_rows),
}
