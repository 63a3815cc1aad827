"""The CUDA GEMV against the CPU specification, and the rules of docs/ops.md."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from gpu_layers import Layer, make_layer, make_x, relative_error

ops = torch.ops.grinqh

# Coefficients are 16-bit integers relative to the largest of their slice (docs/kernel-notes.md).
COEFFICIENT_ERROR = 4e-4
TOLERANCE = {torch.float32: COEFFICIENT_ERROR, torch.float16: 6e-4, torch.bfloat16: 4e-3}
WIDTHS = [(2, 2, 2, 2), (2, 1, 1, 2, 2), (4, 4), (8,), (1,) * 8, (2, 2)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 16])
def test_agrees_with_the_cpu_for_every_dtype_and_number_of_rows(dtype: torch.dtype, rows: int) -> None:
    layer, x = make_layer(320, 512, bias_dtype=dtype), make_x(rows, 512, dtype)
    y = ops.gemv(x.cuda(), *layer.cuda().arguments())
    assert y.dtype == dtype
    assert relative_error(y, ops.gemv(x, *layer.arguments())) < TOLERANCE[dtype]


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("rows", [1, 2, 4, 6])
def test_agrees_with_the_cpu_for_every_format(widths: tuple[int, ...], block: int, rows: int) -> None:
    layer, x = make_layer(200, 300, widths, block), make_x(rows, 300, torch.float32)
    y = ops.gemv(x.cuda(), *layer.cuda().arguments())
    assert relative_error(y, ops.gemv(x, *layer.arguments())) < COEFFICIENT_ERROR


@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 3), (255, 33), (257, 1000), (1000, 31), (4096, 4096), (9000, 2500)])
def test_agrees_with_the_cpu_for_odd_sizes(n: int, k: int) -> None:
    layer, x = make_layer(n, k), make_x(2, k, torch.float32)
    y = ops.gemv(x.cuda(), *layer.cuda().arguments())
    assert relative_error(y, ops.gemv(x, *layer.arguments())) < COEFFICIENT_ERROR


def test_a_block_may_work_on_more_tiles_than_arrive_at_once() -> None:
    small, x = make_layer(2048, 1056, (2,)), make_x(8, 1056, torch.float32)  # more than one slice of K
    times = 1100
    tiled = small.cuda()
    bounds = tiled.block_scale[-1:]
    scale = tiled.block_scale[:-1].flatten().repeat(times).view(-1, 1056)
    large = replace(
        tiled,
        planes=[plane.repeat(1, times, 1, 1) for plane in tiled.planes],
        block_scale=torch.cat([scale, bounds]),
        row_scale=tiled.row_scale.repeat(times),
    )
    y = ops.gemv(x.cuda(), *large.arguments()).view(8, times, 2048)
    assert torch.equal(y, y[:, :1].expand_as(y))
    assert relative_error(y[:, 0], ops.gemv(x, *small.arguments())) < COEFFICIENT_ERROR


@pytest.mark.parametrize("channels", [(300, 200, 33, 0), (300, 300, 1, 1), (5, 0, 0, 0), (0, 0, 0, 0)])
def test_a_grade_ends_at_the_last_stored_plane(channels: tuple[int, ...]) -> None:
    layer, x = make_layer(200, 300, channels=channels), make_x(3, 300, torch.float32)
    got, wanted = ops.gemv(x.cuda(), *layer.cuda().arguments()).cpu(), ops.gemv(x, *layer.arguments())
    torch.testing.assert_close(got, wanted, rtol=0, atol=COEFFICIENT_ERROR * max(float(wanted.abs().max()), 1e-6))


@pytest.mark.parametrize("grade", range(5))
def test_every_grade_for_all_channels(grade: int) -> None:
    layer, x = make_layer(300, 400), make_x(1, 400, torch.float32)
    thresholds = torch.tensor([0.0] * grade + [float("inf")] * (4 - grade))
    layer = replace(layer, thresholds=thresholds)
    y = ops.gemv(x.cuda(), *layer.cuda().arguments()).cpu()
    dense = ops.dequantize(*layer.weight(), grade, torch.float32)
    torch.testing.assert_close(y, x @ dense, rtol=0, atol=COEFFICIENT_ERROR * float((x @ dense).norm() / 300**0.5) * 4)


@pytest.mark.parametrize("widths", [(2, 2, 2, 2), (2, 1, 1, 2, 2)], ids=str)
@pytest.mark.parametrize("shape", [(500, 700), (4096, 4096), (20000, 1500)])
def test_a_row_does_not_depend_on_its_batch(widths: tuple[int, ...], shape: tuple[int, int]) -> None:
    n, k = shape
    layer, x = make_layer(n, k, widths).cuda(), make_x(16, k, torch.float16).cuda()
    alone = torch.cat([ops.gemv(x[m : m + 1], *layer.arguments()) for m in range(16)])
    for rows in (2, 3, 4, 5, 7, 8, 9, 16):
        assert torch.equal(ops.gemv(x[:rows], *layer.arguments()), alone[:rows])


def test_runs_are_bit_equal() -> None:
    layer, x = make_layer(20000, 1024).cuda(), make_x(1, 1024, torch.float16).cuda()
    first = ops.gemv(x, *layer.arguments())
    assert all(torch.equal(ops.gemv(x, *layer.arguments()), first) for _ in range(50))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_nonfinite_x_reaches_its_own_row_only(value: float) -> None:
    layer, x = make_layer(300, 200), make_x(3, 200, torch.float32)
    clean = ops.gemv(x.cuda(), *layer.cuda().arguments())
    x[1, 77] = value
    y = ops.gemv(x.cuda(), *layer.cuda().arguments())
    assert torch.equal(y[[0, 2]], clean[[0, 2]])
    wanted = ops.gemv(x, *layer.arguments())[1]
    torch.testing.assert_close(y[1].cpu(), wanted, equal_nan=True, rtol=1e-3, atol=1e-3)
    assert not torch.isfinite(y[1]).any()


def test_strided_and_misaligned_x() -> None:
    layer, k = make_layer(300, 200).cuda(), 200
    wide = make_x(4, 2 * k + 1, torch.float16).cuda()
    for x in (wide[:, 1 : k + 1], wide[:, ::2][:, :k], wide[::2, 3 : k + 3]):
        assert torch.equal(ops.gemv(x, *layer.arguments()), ops.gemv(x.contiguous(), *layer.arguments()))


def test_no_rows_give_no_rows() -> None:
    layer = make_layer(30, 20).cuda()
    assert ops.gemv(torch.empty(0, 20, device="cuda"), *layer.arguments()).shape == (0, 30)
    assert ops.gemv(torch.randn(2, 1, 20, device="cuda"), *layer.arguments()).shape == (2, 1, 30)


def test_out_variant_writes_the_same() -> None:
    layer, x = make_layer(300, 200).cuda(), make_x(2, 200, torch.float16).cuda()
    out = torch.full((2, 300), float("nan"), dtype=torch.float16, device="cuda")
    ops.gemv.out(x, *layer.arguments(), out=out)
    assert torch.equal(out, ops.gemv(x, *layer.arguments()))


@pytest.mark.parametrize("bits", [0.0, 1.0, 2.5, 3.0, 8.0])
def test_budget_and_read_bits_match_the_cpu(bits: float) -> None:
    layer, x = make_layer(100, 400), make_x(3, 400, torch.float32)
    layer = replace(layer, budget=torch.tensor([bits]))
    gpu = layer.cuda()
    y, read = ops.gemv_read_bits(x.cuda(), *gpu.arguments())
    wanted_y, wanted_read = ops.gemv_read_bits(x, *layer.arguments())
    assert torch.equal(read.cpu(), wanted_read)
    assert bool((read <= bits).all())
    torch.testing.assert_close(y.cpu(), wanted_y, rtol=0, atol=COEFFICIENT_ERROR * (float(wanted_y.abs().max()) + 1e-6))


def test_grade_matches_the_cpu() -> None:
    layer, x = make_layer(100, 400, channels=(400, 300, 50, 0)), make_x(3, 400, torch.float16)
    for budget in (None, torch.tensor([2.0])):
        layer = replace(layer, budget=budget)
        gpu = layer.cuda()
        arguments = (layer.planes, layer.channel_order, layer.channel_weight, layer.thresholds, layer.widths, budget)
        moved = (gpu.planes, gpu.channel_order, gpu.channel_weight, gpu.thresholds, gpu.widths, gpu.budget)
        assert torch.equal(ops.grade(x.cuda(), *moved).cpu(), ops.grade(x, *arguments))


def test_other_streams_and_threads_do_not_disturb_each_other() -> None:
    layer, x = make_layer(4096, 2048).cuda(), make_x(8, 2048, torch.float16).cuda()
    wanted = [ops.gemv(x[m : m + 1], *layer.arguments()) for m in range(8)]
    failures = []

    def work(m: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(100):
                if not torch.equal(ops.gemv(x[m : m + 1], *layer.arguments()), wanted[m]):
                    failures.append(m)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(m,)) for m in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_graph_follows_thresholds_and_x_between_replays() -> None:
    layer, x = make_layer(4096, 1024).cuda(), make_x(1, 1024, torch.float16).cuda()
    ops.gemv(x, *layer.arguments())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.gemv(x, *layer.arguments())
    for scale in (1.0, 0.3, 3.0):
        layer.thresholds.copy_(torch.linspace(0.1, 2.0, 4) * scale)
        x.copy_(make_x(1, 1024, torch.float16, seed=int(scale * 10)))
        graph.replay()
        assert torch.equal(y, ops.gemv(x, *layer.arguments()))


def test_two_graphs_replay_beside_each_other() -> None:
    layer, x = make_layer(4096, 2048).cuda(), make_x(2, 2048, torch.float16).cuda()
    wanted = [ops.gemv(x[m : m + 1], *layer.arguments()) for m in range(2)]
    torch.cuda.synchronize()
    graphs, results = [], []
    for m in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results.append([ops.gemv(x[m : m + 1], *layer.arguments()) for _ in range(20)])
        graphs.append((graph, torch.cuda.Stream()))
    for _ in range(20):
        for graph, stream in graphs:
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for m in range(2):
            assert all(torch.equal(y, wanted[m]) for y in results[m])


@pytest.mark.filterwarnings("ignore")  # of torch, in its own compiler
@pytest.mark.parametrize("rows", [1, 64])
def test_compiles_with_cuda_graphs(rows: int) -> None:
    arguments, x = make_layer(512, 256).cuda().arguments(), make_x(rows, 256, torch.float16).cuda()

    @torch.compile(mode="reduce-overhead", fullgraph=True)
    def forward(x: torch.Tensor) -> torch.Tensor:
        return ops.linear(x + 1, *arguments) * 2

    wanted = ops.linear(x + 1, *arguments) * 2
    for _ in range(4):
        assert torch.equal(forward(x).clone(), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_many_rows_are_a_dense_product_in_full(dtype: torch.dtype) -> None:
    layer, x = make_layer(300, 200, bias_dtype=dtype), make_x(40, 200, dtype)
    gpu = layer.cuda()
    y = ops.linear(x.cuda(), *gpu.arguments(), 16)
    dense = ops.dequantize(*layer.weight(), 4, torch.float32)
    wanted = x.double() @ dense.double() + layer.bias.double()
    assert relative_error(y, wanted) < (1e-5 if dtype == torch.float32 else 1e-2)
    assert torch.equal(ops.linear(x[:3].cuda(), *gpu.arguments(), 16), ops.gemv(x[:3].cuda(), *gpu.arguments()))


@pytest.mark.parametrize("shape", [(40, 200), (1, 40, 200), (2, 3, 20, 200), (200,)], ids=str)
@pytest.mark.parametrize("contiguous", [True, False])
def test_a_dense_product_has_the_shape_of_its_input(shape: tuple[int, ...], contiguous: bool) -> None:
    layer = make_layer(300, 200, bias_dtype=torch.float32).cuda()
    x = make_x(120, 200, torch.float32).flatten()[: 120 * 200].cuda()
    x = x[: torch.Size(shape).numel()].reshape(shape)
    if not contiguous:
        x = torch.cat([x, x], dim=-1)[..., :200]
    y = ops.linear(x, *layer.arguments(), 0)
    wanted = x.double() @ ops.dequantize(*layer.weight(), 4, torch.float32).double() + layer.bias.double()
    assert y.shape == wanted.shape
    assert y.is_contiguous()
    assert relative_error(y, wanted) < 1e-5


def test_a_layer_of_several_strips_is_one_product() -> None:
    tiles, k = 2049, 256  # a strip holds 2048 such tiles
    n = tiles * 256 - 9
    generator = torch.Generator("cuda").manual_seed(0)
    layer = Layer(
        planes=[
            torch.randint(256, (1, tiles, k, 64), dtype=torch.uint8, device="cuda", generator=generator)
            for _ in range(2)
        ],
        block_scale=torch.rand(tiles * 4 + 1, k, device="cuda", generator=generator).half(),
        row_scale=torch.rand(n, device="cuda", generator=generator),
        gain=torch.ones(2, device="cuda"),
        channel_order=torch.randperm(k, device="cuda", generator=generator).int(),
        channel_weight=torch.ones(k, device="cuda"),
        thresholds=torch.zeros(2, device="cuda"),
        widths=[2, 2],
        block=64,
        bias=torch.randn(n, device="cuda", generator=generator).half(),
    )
    x = torch.randn(1, 20, k, device="cuda", generator=generator).half()
    y = ops.linear(x, *layer.arguments(), 16)
    wanted = x @ ops.dequantize(*layer.weight(), 2, torch.float16) + layer.bias
    assert y.shape == (1, 20, n)
    assert relative_error(y, wanted) < 2e-3


def test_gradient_of_x() -> None:
    layer, x = make_layer(64, 96), make_x(2, 96, torch.float32)
    gpu, gradients = layer.cuda(), []
    for arguments, value in ((layer.arguments(), x.clone()), (gpu.arguments(), x.cuda())):
        value.requires_grad_()
        ops.gemv(value, *arguments).square().sum().backward()
        gradients.append(value.grad)
    assert relative_error(gradients[1], gradients[0].cpu()) < 2 * COEFFICIENT_ERROR


def test_canonical_planes_are_refused() -> None:
    layer, x = make_layer(64, 96), make_x(1, 96, torch.float16).cuda()
    canonical = replace(layer.cuda(), planes=[p.cuda() for p in layer.planes])
    with pytest.raises(RuntimeError, match="repack"):
        ops.gemv(x, *canonical.arguments())


def test_tensors_on_two_devices_are_refused() -> None:
    layer, x = make_layer(64, 96), make_x(1, 96, torch.float16).cuda()
    with pytest.raises(RuntimeError, match="must be on cuda"):
        ops.gemv(x, *replace(layer.cuda(), gain=layer.gain).arguments())


def test_opcheck() -> None:
    layer, x = make_layer(64, 96).cuda(), make_x(2, 96, torch.float16).cuda()
    torch.library.opcheck(ops.gemv.default, (x, *layer.arguments()))
    torch.library.opcheck(ops.linear.default, (x, *layer.arguments()))
    torch.library.opcheck(ops.gemv_read_bits.default, (x, *layer.arguments()))
