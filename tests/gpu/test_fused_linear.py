"""Layers that do the norm, gate or residual around them: the CUDA kernels against the CPU specification."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpu_layers import make_layer, make_x, relative_error
from torch import Tensor

ops = torch.ops.grinqh
ROWS, EPS = 16, 1e-5  # max_graded_rows, of the norm
TOLERANCE = {torch.float32: 4e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
KINDS = ("norm", "gate", "residual", "norm and residual", "gate and residual")


def around(kind: str, n: int, k: int, rows: int, dtype: torch.dtype) -> tuple[Tensor, tuple]:
    """x on the CPU and the arguments after max_graded_rows."""
    gated = "gate" in kind
    x = make_x(rows, 2 * k if gated else k, dtype)
    generator = torch.Generator().manual_seed(n)
    weight = (1 + 0.1 * torch.randn(k, generator=generator)).to(dtype) if "norm" in kind else None
    residual = torch.randn(rows, n, generator=generator).to(dtype) if "residual" in kind else None
    return x, (weight, EPS if "norm" in kind else 0.0, gated, residual)


def moved(arguments: tuple) -> tuple:
    return tuple(a.cuda() if isinstance(a, Tensor) else a for a in arguments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 16, 40])
def test_agrees_with_the_cpu(kind: str, dtype: torch.dtype, rows: int) -> None:
    layer = make_layer(320, 512, bias_dtype=dtype)
    x, rest = around(kind, 320, 512, rows, dtype)
    y = ops.fused_linear(x.cuda(), *layer.cuda().arguments(), ROWS, *moved(rest))
    assert y.dtype == dtype
    assert relative_error(y, ops.fused_linear(x, *layer.arguments(), ROWS, *rest)) < TOLERANCE[dtype]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 3), (255, 33), (1000, 31), (4096, 4096), (300, 14336)])
def test_odd_sizes(kind: str, n: int, k: int) -> None:
    layer = make_layer(n, k)
    x, rest = around(kind, n, k, 2, torch.float32)
    y = ops.fused_linear(x.cuda(), *layer.cuda().arguments(), ROWS, *moved(rest))
    assert relative_error(y, ops.fused_linear(x, *layer.arguments(), ROWS, *rest)) < 4e-4


@pytest.mark.parametrize("k", [1, 33, 512, 576, 4096, 14336])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_norm_has_the_bits_of_the_cpu(k: int, dtype: torch.dtype) -> None:
    x, weight = make_x(3, k, dtype), torch.rand(k).to(dtype)
    assert torch.equal(ops.prepare(x.cuda(), weight.cuda(), EPS).cpu(), ops.prepare(x, weight, EPS))


@pytest.mark.parametrize("k", [1, 33, 576])
def test_the_gate_is_that_of_the_cpu(k: int) -> None:
    x = make_x(3, 2 * k, torch.float32)
    torch.testing.assert_close(ops.prepare(x.cuda(), None, 0.0, True).cpu(), ops.prepare(x, None, 0.0, True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_its_batch(kind: str) -> None:
    layer = make_layer(700, 900).cuda()
    x, rest = around(kind, 700, 900, 16, torch.float16)
    x, rest = x.cuda(), moved(rest)
    whole = ops.fused_linear(x, *layer.arguments(), ROWS, *rest)
    for rows in (1, 2, 4, 8):
        part = (*rest[:3], None if rest[3] is None else rest[3][:rows])
        assert torch.equal(ops.fused_linear(x[:rows], *layer.arguments(), ROWS, *part), whole[:rows])


def test_what_is_fused_is_what_prepare_and_linear_give() -> None:
    layer = make_layer(320, 512).cuda()
    for kind in KINDS:
        x, rest = around(kind, 320, 512, 4, torch.float16)
        x, (weight, eps, gated, residual) = x.cuda(), moved(rest)
        fused = ops.fused_linear(x, *layer.arguments(), ROWS, weight, eps, gated, residual)
        prepared = x if weight is None and not gated else ops.prepare(x, weight, eps, gated)
        y = ops.linear(prepared, *layer.arguments(), ROWS)
        # The fused kernel rounds exp on its own; where there is none, the bits are equal.
        wanted = y if residual is None else y + residual
        assert relative_error(fused, wanted) < 1e-3 if gated else torch.equal(fused, wanted)


def test_a_budget_is_kept_for_the_transformed_rows() -> None:
    layer = replace(make_layer(320, 512), budget=torch.tensor([2.5])).cuda()
    x, rest = around("norm", 320, 512, 3, torch.float16)
    fused = ops.fused_linear(x.cuda(), *layer.arguments(), ROWS, *moved(rest))
    prepared = ops.prepare(x.cuda(), rest[0].cuda(), EPS)
    assert torch.equal(fused, ops.linear(prepared, *layer.arguments(), ROWS))


def test_a_row_that_is_not_finite_leaves_the_others_alone() -> None:
    layer = make_layer(320, 512).cuda()
    for kind in ("norm", "gate"):
        x, rest = around(kind, 320, 512, 3, torch.float16)
        x, rest = x.cuda(), moved(rest)
        wanted = ops.fused_linear(x, *layer.arguments(), ROWS, *rest)
        x[1, 5] = float("nan")
        got = ops.fused_linear(x, *layer.arguments(), ROWS, *rest)
        assert torch.equal(got[[0, 2]], wanted[[0, 2]])
        assert bool(got[1].isnan().all())
