"""The ops prepare and fused_linear: what a layer does to its input and result itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import grinqh

ops = torch.ops.grinqh
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROWS, EPS = 16, 1e-5


@pytest.fixture(scope="module")
def layer() -> grinqh.GrinqhLinear:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(33, 40))
    return grinqh.quantize_model(model, progress=False)[0]


def arguments(layer: grinqh.GrinqhLinear) -> tuple[object, ...]:
    names = ("block_scale", "row_scale", "gain", "channel_order", "channel_weight", "thresholds")
    planes = [getattr(layer, f"plane_{p}") for p in range(layer.format.planes)]
    widths = list(layer.format.plane_widths)
    return (planes, *(getattr(layer, name) for name in names), widths, layer.format.block, None, None)


def reference(x: Tensor, weight: Tensor | None, gated: bool) -> Tensor:
    if gated:
        gate, value = x.chunk(2, dim=-1)
        return functional.silu(gate) * value
    assert weight is not None
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 7, 33, 576, 1536])
def test_prepare_is_the_norm_or_the_gate(k: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 3, 2 * k).to(dtype), torch.rand(k).to(dtype)
    # One rounding of a sum or of exp may fall otherwise.
    tolerance: Any = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(ops.prepare(x[..., :k], weight, EPS), reference(x[..., :k], weight, False), **tolerance)
    torch.testing.assert_close(ops.prepare(x, None, 0.0, True), reference(x, None, True), **tolerance)


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_fused_linear_is_prepare_then_linear_then_a_sum(layer: grinqh.GrinqhLinear, rows: int) -> None:
    x, weight, residual = torch.randn(rows, 66), torch.rand(33), torch.randn(rows, 40)
    for given, norm, gated in ((x[:, :33], weight, False), (x, None, True), (x[:, :33], None, False)):
        prepared = given if norm is None and not gated else ops.prepare(given, norm, EPS, gated)
        wanted = ops.linear(prepared, *arguments(layer), ROWS)
        got = ops.fused_linear(given, *arguments(layer), ROWS, norm, EPS, gated, None)
        assert torch.equal(got, wanted)
        got = ops.fused_linear(given, *arguments(layer), ROWS, norm, EPS, gated, residual)
        assert torch.equal(got, wanted + residual)


@pytest.mark.parametrize(
    ("x", "norm", "eps", "gated", "message"),
    [
        (torch.ones(2, 33), None, 0.0, False, "neither a norm nor a gate"),
        (torch.ones(2, 33), torch.ones(32), EPS, False, r"norm_weight has shape \[32\]: it must be \[33\]"),
        (torch.ones(2, 33), torch.ones(33).half(), EPS, False, "norm_weight is float16: it must be float32"),
        (torch.ones(2, 33), None, 0.0, True, "its last size must be even"),
        (torch.ones(2, 66), torch.ones(33), EPS, True, "only one of them"),
        (torch.ones(2, 33), torch.ones(33), -1.0, False, "norm_eps is -1"),
        (torch.tensor(1.0), None, 0.0, True, "at least one dimension"),
    ],
)
def test_bad_input_is_refused_by_name(x: Tensor, norm: Tensor | None, eps: float, gated: bool, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.prepare(x, norm, eps, gated)


def test_a_residual_of_another_shape_is_refused(layer: grinqh.GrinqhLinear) -> None:
    with pytest.raises(RuntimeError, match=r"residual is float32 of shape \[2, 39\]"):
        ops.fused_linear(torch.ones(2, 33), *arguments(layer), ROWS, None, 0.0, False, torch.ones(2, 39))
