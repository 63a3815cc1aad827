"""The activation-sparsity rival: a Triton GEMV that skips channels whose |x| is below a threshold."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _masked_kernel(x_ptr, w_ptr, y_ptr, threshold, n, k, block_k: tl.constexpr, block_n: tl.constexpr):
    channels = tl.program_id(0) * block_k + tl.arange(0, block_k)
    outputs = tl.program_id(1) * block_n + tl.arange(0, block_n)
    x = tl.load(x_ptr + channels, mask=channels < k, other=0.0).to(tl.float32)
    keep = tl.abs(x) >= threshold
    weights = tl.load(
        w_ptr + channels[:, None].to(tl.int64) * n + outputs[None, :],
        mask=keep[:, None] & (outputs < n)[None, :],
        other=0.0,
        eviction_policy="evict_first",
    )
    tl.atomic_add(y_ptr + outputs, tl.sum(weights.to(tl.float32) * x[:, None], 0), mask=outputs < n)


def masked_gemv(x: Tensor, weight: Tensor, threshold: float) -> Tensor:
    """x [1, K], weight [K, N] float16: float32 [1, N]."""
    k, n = weight.shape
    y = torch.zeros(1, n, device=x.device)
    block_k, block_n = 32, 512
    _masked_kernel[(triton.cdiv(k, block_k), triton.cdiv(n, block_n))](
        x, weight, y, threshold, n, k, block_k, block_n, num_warps=4
    )
    return y
