"""The ops of docs/ops.md: values, independence of rows and threads, torch's contracts, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import EQUAL, FINE, INF, OPS, Layer, make_layer
from torch import Tensor

import grinqh  # noqa: F401  registers the ops
from grinqh.defaults import GRADED_ROWS

LAYOUTS = [FINE, EQUAL, (8,), (4, 4), (1,) * 8, (2, 2)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of the sum of the terms' magnitudes: 16-bit fixed point inside a group of channels, float32 across groups.
TOLERANCE = 1e-4


def activations(m: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(layer: Layer, x: Tensor, y: Tensor) -> None:
    want, magnitude = layer.reference(x)
    rounding = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[x.dtype]
    assert y.dtype == x.dtype
    assert y.shape == want.shape
    assert ((y.double() - want).abs() <= TOLERANCE * magnitude + rounding * want.abs() + 1e-7).all()


# ---- values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", LAYOUTS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 33), (576, 1536), (4099, 33), (1, 1536), (129, 1)])
def test_gemv_agrees_with_a_float64_product(n: int, k: int, widths: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = make_layer(n, k, widths)
    x = activations(2, k, dtype)
    assert_close(layer, x, layer.gemv(x))


@pytest.mark.parametrize("m", range(1, 18))
def test_gemv_takes_any_number_of_rows(m: int) -> None:
    layer = make_layer(96, 65)
    x = activations(m, 65)
    assert_close(layer, x, layer.gemv(x))


@pytest.mark.parametrize("grade", range(len(FINE) + 1))
def test_thresholds_select_each_grade(grade: int) -> None:
    thresholds = torch.tensor([0.0] * grade + [INF] * (len(FINE) - grade))
    layer = make_layer(70, 90).replace(thresholds=thresholds)
    x = activations(3, 90)
    y, read_bits = OPS.gemv_read_bits(x, *layer.arguments)
    torch.testing.assert_close(y, x @ layer.dense(grade), rtol=1e-3, atol=1e-3)
    assert read_bits.tolist() == [sum(FINE[:grade])] * 3


def test_read_bits_are_the_mean_of_the_grades_bits() -> None:
    layer = make_layer(33, 200)
    x = activations(4, 200)
    bits = torch.tensor([0, *torch.tensor(FINE).cumsum(0)])
    _, read_bits = OPS.gemv_read_bits(x, *layer.arguments)
    torch.testing.assert_close(read_bits, bits[layer.grades(x).long()].float().mean(-1))


def test_channels_are_read_no_deeper_than_they_are_stored() -> None:
    stored = (100, 80, 80, 20, 0)
    layer = make_layer(64, 100, stored=stored).replace(thresholds=torch.zeros(5))
    x = activations(1, 100)
    want = torch.tensor([sum(c < channels for channels in stored) for c in range(100)])
    grades = OPS.grade(x, layer.planes, layer.channel_order, layer.channel_weight, layer.thresholds, layer.widths)
    assert torch.equal(grades[0].long(), want)
    assert_close(layer, x, layer.gemv(x))


def test_bias_is_added_before_rounding() -> None:
    layer = make_layer(50, 40)
    for dtype in DTYPES:
        biased = layer.replace(bias=activations(1, 50, dtype, seed=3)[0])
        x = activations(2, 40, dtype)
        assert_close(biased, x, biased.gemv(x))


@pytest.mark.parametrize("budget", [0.0, 1.3, 3.0, 9.0])
def test_a_budget_bounds_every_row(budget: float) -> None:
    layer = make_layer(40, 1000).replace(budget=torch.tensor([budget]))
    x = activations(6, 1000)
    y, read_bits = OPS.gemv_read_bits(x, *layer.arguments)
    assert (read_bits <= budget).all()
    assert (read_bits >= min(budget, 8.0) - 2 / 1000).all()
    assert_close(layer, x, y)


def test_leading_dimensions_and_strides_are_free() -> None:
    layer = make_layer(30, 48)
    x = activations(6, 48)
    want = layer.gemv(x)
    assert torch.equal(layer.gemv(x.view(2, 3, 48)), want.view(2, 3, 30))
    assert torch.equal(layer.gemv(x[0]), want[0])
    wide = torch.zeros(6, 100)
    wide[:, 5:53] = x
    assert torch.equal(layer.gemv(wide[:, 5:53]), want)
    assert torch.equal(layer.gemv(x.T.contiguous().T), want)
    assert torch.equal(layer.gemv(x[:1].expand(4, 48)), want[:1].expand(4, 30))


def test_no_rows_give_no_rows() -> None:
    layer = make_layer(30, 48)
    assert layer.gemv(torch.empty(0, 48)).shape == (0, 30)
    assert OPS.linear(torch.empty(2, 0, 48), *layer.arguments, 16).shape == (2, 0, 30)


def test_out_variant_writes_the_same() -> None:
    layer = make_layer(30, 48)
    x = activations(3, 48)
    out = torch.full((3, 30), math.nan)
    assert OPS.gemv.out(x, *layer.arguments, out=out) is None
    assert torch.equal(out, layer.gemv(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_beyond_its_graded_rows_is_the_dense_product(dtype: torch.dtype) -> None:
    layer = make_layer(300, 130).replace(bias=activations(1, 300, dtype, seed=3)[0])
    x = activations(20, 130, dtype)
    graded = OPS.linear(x, *layer.arguments, 20)
    assert torch.equal(graded, layer.gemv(x))
    dense = OPS.linear(x.view(4, 5, 130), *layer.arguments, 19)
    assert layer.bias is not None
    want = x @ layer.dense(len(FINE), dtype) + layer.bias
    torch.testing.assert_close(dense, want.view(4, 5, 300))


def test_values_that_are_not_finite_stay_in_their_row() -> None:
    layer = make_layer(64, 50)
    x = activations(4, 50)
    want = layer.gemv(x)
    x[0, 3], x[2, 7] = math.nan, INF
    y = layer.gemv(x)
    assert y[0].isnan().all()
    assert torch.equal(y[2], torch.where(layer.dense(len(FINE))[7] > 0, INF, -INF))
    assert torch.equal(y[[1, 3]], want[[1, 3]])


def test_a_result_too_large_for_float16_is_infinite() -> None:
    layer = make_layer(64, 50).replace(thresholds=torch.zeros(5))
    x = torch.full((1, 50), 60000.0, dtype=torch.float16)
    want, _ = layer.reference(x)
    assert torch.equal(layer.gemv(x).isinf(), want.abs() > 65520)


# ---- independence


def test_a_row_is_the_same_bits_whatever_is_beside_it() -> None:
    layer = make_layer(576, 700)
    x = activations(16, 700)
    together = layer.gemv(x)
    for m in range(16):
        assert torch.equal(together[m : m + 1], layer.gemv(x[m : m + 1]))


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    layer = make_layer(2000, 1200)
    x = activations(3, 1200)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(layer.gemv(x))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# ---- packing


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_unpack_inverts_pack_up_to_what_is_stored(data: st.DataObject) -> None:
    widths = data.draw(st.sampled_from([*LAYOUTS, (1,), (2, 1, 1), (4, 2, 1, 1)]))
    n, k = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 20))
    stored = sorted(data.draw(st.lists(st.integers(0, k), min_size=len(widths), max_size=len(widths))), reverse=True)
    seed = data.draw(st.integers(0, 2**31))
    codes = torch.randint(0, 256, (k, n), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    planes = OPS.pack(codes, list(widths), stored)
    assert [tuple(plane.shape) for plane in planes] == [
        (channels, (n * width + 7) // 8) for channels, width in zip(stored, widths, strict=True)
    ]
    mask = torch.zeros(k, dtype=torch.uint8)
    shift = 8
    for channels, width in zip(stored, widths, strict=True):
        shift -= width
        mask[:channels] |= ((1 << width) - 1) << shift
    assert torch.equal(OPS.unpack(planes, list(widths), n, k), codes & mask[:, None])


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 200), k=st.integers(1, 80), block=st.sampled_from([32, 64, 128]), seed=st.integers(0, 999))
def test_full_codes_reproduce_the_weights_to_half_a_step(n: int, k: int, block: int, seed: int) -> None:
    layer = make_layer(n, k, (8,), block, seed=seed).replace(gain=torch.ones(1))
    stored = layer.block_scale.float().repeat_interleave(block, dim=1)[:, :n] * layer.row_scale
    scale = torch.empty_like(stored).index_copy_(0, layer.channel_order.long(), stored)
    assert ((layer.dense(1) - layer.weight.T).abs() <= scale * (1 / 256 + 2.0**-11)).all()


# ---- torch's contracts

OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def op_samples() -> list[tuple[str, object, tuple[object, ...]]]:
    layer = make_layer(24, 40)
    x = activations(3, 40)
    weight_tensors = (layer.planes, layer.block_scale, layer.row_scale, layer.gain, layer.channel_order)
    codes = torch.randint(0, 256, (40, 24), dtype=torch.uint8)
    return [
        ("gemv", OPS.gemv.default, (x, *layer.arguments)),
        (
            "gemv_bias_budget",
            OPS.gemv.default,
            (x, *layer.replace(bias=x.new_ones(24), budget=x.new_ones(1)).arguments),
        ),
        ("gemv_read_bits", OPS.gemv_read_bits.default, (x, *layer.arguments)),
        ("linear", OPS.linear.default, (x, *layer.arguments, 2)),
        ("sort_channels", OPS.sort_channels.default, (layer.weight, torch.rand(40))),
        ("quantize", OPS.quantize.default, (layer.weight, layer.channel_order, 32)),
        ("pack", OPS.pack.default, (codes, layer.widths, [40, 40, 30, 20, 10])),
        ("unpack", OPS.unpack.default, (layer.planes, layer.widths, 24, 40)),
        (
            "grade",
            OPS.grade.default,
            (x, layer.planes, layer.channel_order, layer.channel_weight, layer.thresholds, layer.widths),
        ),
        ("dequantize", OPS.dequantize.default, (*weight_tensors, layer.widths, layer.block, 3, torch.bfloat16)),
    ]


@pytest.mark.parametrize(
    ("name", "op", "arguments"), op_samples(), ids=lambda value: value if type(value) is str else ""
)
def test_opcheck(name: str, op: torch._ops.OpOverload, arguments: tuple[object, ...]) -> None:
    torch.library.opcheck(op, arguments, test_utils=OPCHECKS)


def test_opcheck_of_the_out_variant() -> None:
    layer = make_layer(24, 40)
    arguments = (activations(3, 40), *layer.arguments)
    torch.library.opcheck(OPS.gemv.out, arguments, {"out": torch.empty(3, 24)}, test_utils=OPCHECKS)


def test_compiles_into_one_graph_that_serves_every_dial_setting() -> None:
    layer = make_layer(24, 40)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, backend=backend)
    def compiled(x: Tensor, thresholds: Tensor) -> Tensor:
        return OPS.gemv(x * 2, *layer.replace(thresholds=thresholds).arguments) + 1

    x = activations(3, 40)
    for scale in (0.0, 0.5, 1.0, 2.0):
        set_to = layer.replace(thresholds=layer.thresholds * scale)
        assert torch.equal(compiled(x, set_to.thresholds), set_to.gemv(x * 2) + 1)
    assert len(graphs) == 1


@pytest.mark.parametrize("op", ["gemv", "linear", "gemv_read_bits"])
def test_backward_is_that_of_the_weights_that_were_read(op: str) -> None:
    layer = make_layer(24, 40).replace(bias=torch.randn(24, requires_grad=True))
    assert layer.bias is not None
    x = activations(3, 40).requires_grad_()
    extra = (2,) if op == "linear" else ()  # three rows: the dense path
    result = getattr(OPS, op)(x, *layer.arguments, *extra)
    y = result[0] if op == "gemv_read_bits" else result
    upstream = torch.randn(3, 24)
    y.backward(upstream)
    grades = torch.full((3, 40), len(FINE)) if op == "linear" else layer.grades(x.detach())
    want = sum(torch.where(grades == g, upstream @ layer.dense(g).T, 0) for g in range(1, len(FINE) + 1))
    torch.testing.assert_close(x.grad, want)
    torch.testing.assert_close(layer.bias.grad, upstream.sum(0))


def test_backward_knows_the_defaults_of_arguments_left_out() -> None:
    (default,) = [a.default_value for a in OPS.linear.default._schema.arguments if a.name == "max_graded_rows"]
    assert default == GRADED_ROWS
    layer = make_layer(24, 40)
    arguments = layer.arguments[:9]
    upstream = torch.randn(GRADED_ROWS + 1, 24)
    x = activations(GRADED_ROWS + 1, 40).requires_grad_()
    OPS.linear(x, *arguments).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ layer.dense(len(FINE)).T)
    upstream = upstream[:GRADED_ROWS]
    x = activations(GRADED_ROWS, 40).requires_grad_()
    OPS.linear(x, *arguments).backward(upstream)
    assert x.grad is not None
    graded = x.grad
    x = activations(GRADED_ROWS, 40).requires_grad_()
    OPS.gemv(x, *arguments).backward(upstream)
    torch.testing.assert_close(x.grad, graded)
    assert not torch.allclose(graded, upstream @ layer.dense(len(FINE)).T)


# ---- what is refused


def bad_arguments() -> list[tuple[str, dict[str, object], str]]:
    layer = make_layer(24, 40)
    float_order = layer.channel_order.float()
    order_beyond = layer.channel_order.clone()
    order_beyond[5] = 40
    return [
        ("x float64", {"x": torch.zeros(1, 40, dtype=torch.float64)}, "x is float64: allowed are float32"),
        ("x shape", {"x": torch.zeros(1, 41)}, r"x has shape \[1, 41\]: its last size must be 40"),
        ("x without dimension", {"x": torch.zeros(())}, "at least one dimension"),
        ("plane missing", {"planes": layer.planes[:-1]}, "planes has 4 tensors and widths 5 entries"),
        ("plane dtype", {"planes": [layer.planes[0].int(), *layer.planes[1:]]}, r"planes\[0\] is int32"),
        ("plane row", {"planes": [layer.planes[0][:, :5].contiguous(), *layer.planes[1:]]}, r"planes\[0\] has shape"),
        ("plane stride", {"planes": [layer.planes[0].T.contiguous().T, *layer.planes[1:]]}, "is not contiguous"),
        ("plane grows", {"planes": [layer.planes[0][:9], *layer.planes[1:]]}, r"planes\[1\] stores 40 .* at most 9"),
        ("block_scale", {"block_scale": layer.block_scale.float()}, "block_scale is float32: it must be float16"),
        ("row_scale", {"row_scale": layer.row_scale[None]}, r"row_scale has shape \[1, 24\]"),
        ("gain", {"gain": layer.gain[:4]}, r"gain has shape \[4\]: it must be \[5\]"),
        ("order dtype", {"channel_order": float_order}, "channel_order is float32: it must be int32"),
        ("order beyond", {"channel_order": order_beyond}, "channel_order holds 40: allowed are 0 to 39"),
        ("channel_weight", {"channel_weight": layer.channel_weight[1:]}, r"channel_weight has shape \[39\]"),
        ("thresholds length", {"thresholds": layer.thresholds[:3]}, r"thresholds has shape \[3\]: it must be \[5\]"),
        ("thresholds fall", {"thresholds": layer.thresholds.flip(0)}, "thresholds never fall"),
        ("thresholds NaN", {"thresholds": layer.thresholds * math.nan}, r"thresholds\[0\] is -?nan"),
        ("thresholds negative", {"thresholds": -layer.thresholds}, r"thresholds\[0\] is -0.25"),
        ("widths", {"widths": [2, 3, 1, 1, 1]}, r"widths\[1\] is 3: allowed are 1, 2, 4 and 8"),
        ("widths sum", {"widths": [4, 4, 2, 2, 2]}, "widths add up to 14: allowed are at most 8 bits"),
        ("widths negative", {"widths": [-2, 1, 1, 2, 2]}, r"widths\[0\] is -2"),
        ("block", {"block": 48}, "block is 48: allowed are 32, 64 and 128"),
        ("bias", {"bias": torch.zeros(23)}, r"bias has shape \[23\]: it must be \[24\]"),
        ("bias dtype", {"bias": torch.zeros(24, dtype=torch.float16)}, "bias is float16: it must be float32"),
        ("budget", {"budget": torch.tensor([-1.0])}, "budget is -1: allowed are numbers of at least 0"),
    ]


@pytest.mark.parametrize("op", ["gemv", "linear"])
@pytest.mark.parametrize(
    ("changes", "message"), [case[1:] for case in bad_arguments()], ids=[c[0] for c in bad_arguments()]
)
def test_bad_arguments_are_named(changes: dict[str, object], message: str, op: str) -> None:
    changes = dict(changes)
    x = changes.pop("x", torch.zeros(1, 40))
    layer = make_layer(24, 40).replace(**changes)
    extra = (0,) if op == "linear" else ()  # the dense path
    with pytest.raises(RuntimeError, match=message):
        getattr(OPS, op)(x, *layer.arguments, *extra)


def test_out_must_fit() -> None:
    layer = make_layer(24, 40)
    x = activations(2, 40)
    for out in (torch.empty(2, 23), torch.empty(3, 24), torch.empty(2, 24, dtype=torch.float16), torch.empty(24, 2).T):
        with pytest.raises(RuntimeError, match="out"):
            OPS.gemv.out(x, *layer.arguments, out=out)


def test_conversion_refuses_bad_input() -> None:
    weight = torch.randn(6, 4)
    order = torch.arange(4, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="weight has a NaN or infinite value in row 2"):
        OPS.quantize(weight.index_put((torch.tensor(2), torch.tensor(1)), torch.tensor(math.nan)), order)
    with pytest.raises(RuntimeError, match="it must be a permutation"):
        OPS.quantize(weight, torch.zeros(4, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="block is 16"):
        OPS.quantize(weight, order, 16)
    with pytest.raises(RuntimeError, match="weight is float16: it must be float32"):
        OPS.quantize(weight.half(), order)
    with pytest.raises(RuntimeError, match="n is 0: allowed are 1 to"):
        OPS.quantize(weight[:0], order)
    with pytest.raises(RuntimeError, match=r"mean_square\[1\] is -1"):
        OPS.sort_channels(weight, torch.tensor([1.0, -1.0, 1.0, 1.0]))
    codes = torch.zeros(4, 6, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"channels\[1\] is 5: allowed are 0 to 4"):
        OPS.pack(codes, [4, 4], [4, 5])
    with pytest.raises(RuntimeError, match="channels has 1 entries and widths 2"):
        OPS.pack(codes, [4, 4], [4])
    with pytest.raises(RuntimeError, match="k is -4"):
        OPS.unpack([codes], [8], 6, -4)
    with pytest.raises(RuntimeError, match="grade is 3: allowed are 0 to 2"):
        make_layer(6, 4, (4, 4)).dense(3)
