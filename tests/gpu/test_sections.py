"""Outputs with thresholds of their own: the CUDA kernels against the CPU specification."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpu_layers import Layer, make_layer, make_x, relative_error

ops = torch.ops.grinqh
TOLERANCE = {torch.float32: 4e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# On tiles and within them; fewer outputs than a tile; tiles that are drawn; more sections than columns would be.
SHAPES = [
    ([1024, 256, 256], 700),
    ([300, 20, 200], 513),
    ([1, 1, 1, 1], 33),
    ([576, 192, 192], 576),
    ([4096, 1024, 1024], 4096),
    ([14336, 14336], 1024),
    ([30000, 300], 300),
    ([5, 250, 1, 90], 9000),
    ([77], 100),
]


def sectioned(sections: list[int], k: int, widths: tuple[int, ...] = (2, 2, 2, 2)) -> Layer:
    layer = make_layer(sum(sections), k, widths)
    return replace(layer, thresholds=torch.stack([layer.thresholds * 2.0 ** (s - 1) for s in range(len(sections))]))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("sections", "k"), SHAPES, ids=str)
def test_agrees_with_the_cpu(sections: list[int], k: int, dtype: torch.dtype) -> None:
    layer, x = sectioned(sections, k), make_x(3, k, dtype)
    gpu = layer.cuda()
    y, bits = ops.gemv_read_bits(x.cuda(), *gpu.arguments(), sections)
    wanted, wanted_bits = ops.gemv_read_bits(x, *layer.arguments(), sections)
    for got, want in zip(y.split(sections, -1), wanted.split(sections, -1), strict=True):
        assert relative_error(got, want) < TOLERANCE[dtype] * (1 if want.shape[-1] > 1 else 10)
    assert torch.equal(bits.cpu(), wanted_bits)
    grading = (layer.channel_order, layer.channel_weight, layer.thresholds, layer.widths, None, sections)
    moved = (gpu.channel_order, gpu.channel_weight, gpu.thresholds, gpu.widths, None, sections)
    assert torch.equal(ops.grade(x.cuda(), gpu.planes, *moved).cpu(), ops.grade(x, layer.planes, *grading))


@pytest.mark.parametrize("widths", [(2, 2, 2, 2), (2, 1, 1, 2, 2)], ids=str)
@pytest.mark.parametrize(("sections", "k"), SHAPES, ids=str)
def test_a_row_does_not_depend_on_its_batch_nor_on_the_run(
    sections: list[int], k: int, widths: tuple[int, ...]
) -> None:
    layer, x = sectioned(sections, k, widths).cuda(), make_x(16, k, torch.float16).cuda()
    alone = torch.cat([ops.gemv(x[m : m + 1], *layer.arguments(), sections) for m in range(16)])
    for rows in (1, 2, 3, 5, 8, 9, 16):
        out = torch.full((rows, sum(sections)), float("nan"), dtype=torch.float16, device="cuda")
        ops.gemv.out(x[:rows], *layer.arguments(), sections, out=out)
        assert torch.equal(out, alone[:rows])


@pytest.mark.parametrize("bits", [0.5, 2.5, 3.0])
def test_a_budget_is_that_of_the_cpu(bits: float) -> None:
    sections = [300, 20, 200]
    layer, x = replace(sectioned(sections, 400), budget=torch.tensor([bits])), make_x(3, 400, torch.float32)
    y, read = ops.gemv_read_bits(x.cuda(), *layer.cuda().arguments(), sections)
    wanted, wanted_read = ops.gemv_read_bits(x, *layer.arguments(), sections)
    assert torch.equal(read.cpu(), wanted_read)
    assert bool((read <= bits).all())
    assert relative_error(y, wanted) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("rows", [1, 4, 8, 40])
def test_norm_and_residual_around_sections(rows: int) -> None:
    sections, k = [600, 200, 200], 512
    layer, x = sectioned(sections, k), make_x(rows, k, torch.float16)
    norm, residual = (1 + 0.1 * torch.randn(k)).half(), torch.randn(rows, 1000).half()
    y = ops.fused_linear(x.cuda(), *layer.cuda().arguments(), 8, norm.cuda(), 1e-5, False, residual.cuda(), sections)
    assert relative_error(y, ops.fused_linear(x, *layer.arguments(), 8, norm, 1e-5, False, residual, sections)) < 2e-3


def test_values_that_are_not_finite_reach_every_section_of_their_row() -> None:
    sections = [300, 20, 200]
    layer, x = sectioned(sections, 200), make_x(3, 200, torch.float32)
    clean = ops.gemv(x.cuda(), *layer.cuda().arguments(), sections)
    x[1, 77] = float("inf")
    y = ops.gemv(x.cuda(), *layer.cuda().arguments(), sections)
    assert torch.equal(y[[0, 2]], clean[[0, 2]])
    assert not torch.isfinite(y[1]).any()


def test_a_graph_follows_the_thresholds_of_each_section() -> None:
    sections = [1024, 256, 256]
    layer, x = sectioned(sections, 700).cuda(), make_x(1, 700, torch.float16).cuda()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ops.gemv(x, *layer.arguments(), sections)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y = ops.gemv(x, *layer.arguments(), sections)
    before = layer.thresholds.clone()
    for section in range(3):
        layer.thresholds.copy_(before)
        layer.thresholds[section] = 0
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, ops.gemv(x, *layer.arguments(), sections))


def test_sections_that_do_not_fit_are_refused_before_any_launch() -> None:
    layer, x = sectioned([300, 200], 100).cuda(), make_x(1, 100, torch.float16).cuda()
    with pytest.raises(RuntimeError, match="sections add up to 400: they must to n, 500"):
        ops.gemv(x, *layer.arguments(), [300, 100])
    with pytest.raises(RuntimeError, match=r"thresholds has shape \[2, 4\]: it must be \[3, 4\]"):
        ops.gemv(x, *layer.arguments(), [300, 100, 100])
