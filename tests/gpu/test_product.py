"""Rows beyond max_graded_rows, with all stored planes: the kernel of sm_90a, and dense weights where it is not used."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpu_layers import Layer, make_layer, make_x, relative_error
from torch import Tensor

ops = torch.ops.grinqh
GRADED_ROWS = 16
TOLERANCE = {torch.float16: 6e-4, torch.bfloat16: 6e-3, torch.float32: 1e-5}
DENSE_ROWS = 513  # more than the kernel takes


def linear(layer: Layer, x: Tensor) -> Tensor:
    return ops.linear(x, *layer.arguments(), GRADED_ROWS)


def reference(layer: Layer, x: Tensor) -> Tensor:
    dense = ops.dequantize(*layer.weight(), len(layer.widths), torch.float32).double()
    y = x.double() @ dense
    return y if layer.bias is None else y + layer.bias.double()


@pytest.fixture(autouse=True)
def poison() -> None:
    """Memory that the ops are given next is full of NaN."""
    torch.full((1 << 24,), float("nan"), device="cuda")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [17, 64, 65, 128, 200, 512, DENSE_ROWS])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 33), (255, 100), (576, 1536), (1000, 34), (300, 14336), (4096, 4096)])
def test_every_size_agrees_with_float64(n: int, k: int, rows: int, dtype: torch.dtype) -> None:
    layer, x = make_layer(n, k, bias_dtype=dtype), make_x(rows, k, dtype)
    assert relative_error(linear(layer.cuda(), x.cuda()), reference(layer, x)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("widths", [(2, 2, 2, 2), (4, 4), (8,), (2, 2), (2, 2, 4), (2,), (2, 1, 1, 2, 2)], ids=str)
def test_every_format_agrees_with_float64(widths: tuple[int, ...], block: int, dtype: torch.dtype) -> None:
    layer, x = make_layer(700, 512, widths, block), make_x(100, 512, dtype)
    assert relative_error(linear(layer.cuda(), x.cuda()), reference(layer, x)) < TOLERANCE[dtype]


@pytest.mark.parametrize("channels", [(900, 700, 301, 5), (900, 899, 64, 0), (850, 128, 0, 0), (0, 0, 0, 0)], ids=str)
def test_channels_that_store_fewer_planes(channels: tuple[int, ...]) -> None:
    layer, x = make_layer(700, 900, channels=channels), make_x(100, 900, torch.float16)
    y, wanted = linear(layer.cuda(), x.cuda()), reference(layer, x)
    assert torch.equal(y.cpu().double(), wanted) if channels[0] == 0 else relative_error(y, wanted) < 6e-4


@pytest.mark.parametrize("rows", [17, 300])
def test_the_same_input_gives_the_same_bits(rows: int) -> None:
    layer, x = make_layer(1024, 4096).cuda(), make_x(rows, 4096, torch.float16).cuda()
    first = linear(layer, x)
    assert all(torch.equal(linear(layer, x), first) for _ in range(5))


def test_a_row_does_not_depend_on_the_other_rows() -> None:
    layer, x = make_layer(1024, 4096).cuda(), make_x(300, 4096, torch.float16).cuda()
    other = torch.randn_like(x)
    other[129] = x[129]
    assert torch.equal(linear(layer, other)[129], linear(layer, x)[129])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_leaves_the_others_alone(value: float) -> None:
    layer, x = make_layer(320, 512).cuda(), make_x(70, 512, torch.float16).cuda()
    wanted = linear(layer, x)
    x[3, 7] = value
    y = linear(layer, x)
    assert not bool(y[3].isfinite().any())
    y[3] = wanted[3]
    assert torch.equal(y, wanted)


def test_rows_apart_in_memory_and_misaligned() -> None:
    layer, wide = make_layer(320, 500).cuda(), make_x(70, 1001, torch.float16).cuda()
    for x in (wide[:, 1:501], wide[:, :500], wide[::2, 7:507]):
        assert torch.equal(linear(layer, x), linear(layer, x.contiguous()))


@pytest.mark.parametrize("rows", [40, 400])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_what_is_fused_is_what_prepare_and_linear_give(rows: int, dtype: torch.dtype) -> None:
    layer = make_layer(700, 512, bias_dtype=dtype).cuda()
    weight, residual = torch.rand(512).to(dtype).cuda(), torch.randn(rows, 700).to(dtype).cuda()
    x, gates = make_x(rows, 512, dtype).cuda(), make_x(rows, 1024, dtype).cuda()
    for given, around in ((x, (weight, 1e-5, False)), (gates, (None, 0.0, True))):
        y = linear(layer, ops.prepare(given, *around)) + residual
        assert torch.equal(ops.fused_linear(given, *layer.arguments(), GRADED_ROWS, *around, residual), y)


def test_a_graph_replays_it() -> None:
    layer, x = make_layer(320, 512).cuda(), make_x(70, 512, torch.float16).cuda()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        linear(layer, x)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y = linear(layer, x)
        x.mul_(2)
        graph.replay()
        stream.synchronize()
    assert torch.equal(y, linear(layer, x))


def test_a_scale_of_another_gain() -> None:
    layer = replace(make_layer(320, 512), gain=torch.tensor([0.5, 2.0, 0.25, 0.0]))
    x = make_x(70, 512, torch.float16)
    assert bool((linear(layer.cuda(), x.cuda()) == 0).all())
    layer = replace(make_layer(320, 512, channels=(512, 400, 300, 200)), gain=torch.tensor([0.5, 2.0, 0.25, 0.125]))
    assert relative_error(linear(layer.cuda(), x.cuda()), reference(layer, x)) < 6e-4
