"""GrinqhLinear and the tensors it is made of."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grinqh import GrinqhLinear, InputError, LayerFormat, packing

FORMAT = LayerFormat((2, 1, 1, 2, 2), 64)


def make_weight(out_features: int = 70, in_features: int = 33, seed: int = 0) -> Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed))


def make_layer(out_features: int = 70, in_features: int = 33, format: LayerFormat = FORMAT) -> GrinqhLinear:
    tensors = packing.pack_weight(make_weight(out_features, in_features), format)
    tensors["bias"] = torch.linspace(-1, 1, out_features)
    return GrinqhLinear(tensors, format)


def rows(count: int, in_features: int = 33, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, in_features, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 16, 17])
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 1), (70, 33), (129, 7)])
def test_a_new_layer_computes_the_linear_map_at_8_bits(
    out_features: int, in_features: int, count: int, dtype: torch.dtype
) -> None:
    layer = make_layer(out_features, in_features).to(dtype)
    x = rows(count, in_features, dtype)
    exact = nn.functional.linear(x.float(), make_weight(out_features, in_features), torch.linspace(-1, 1, out_features))
    y = layer(x)
    assert y.dtype == dtype
    assert (y.float() - exact).norm() <= 0.02 * exact.norm()


def test_inputs_may_have_any_number_of_leading_dimensions() -> None:
    layer = make_layer()
    x = rows(6)
    assert torch.equal(layer(x.view(2, 3, 33)), layer(x).view(2, 3, 70))
    assert torch.equal(layer(x[0]), layer(x[:1])[0])
    assert layer(x[:0]).shape == (0, 70)


def test_higher_thresholds_read_less_down_to_nothing_but_the_bias() -> None:
    layer, x = make_layer(), rows(8)
    exact, errors = layer(x), []
    for thresholds in ([0.0] * 5, [0.1, 0.2, 0.4, 0.8, 1.6], [0.5, 1, 2, 4, 8], [torch.inf] * 5):
        layer.set_thresholds(thresholds)
        errors.append(float((layer(x) - exact).norm()))
    assert errors[0] == 0 < errors[1] < errors[2] < errors[3]
    assert layer.bias is not None
    assert torch.equal(layer(x), layer.bias.expand(8, -1))


def test_rows_beyond_the_limit_are_read_in_full() -> None:
    layer, x = make_layer(), rows(5)
    layer.max_graded_rows = 4
    layer.set_thresholds([torch.inf] * 5)
    assert not torch.equal(layer(x)[:4], layer(x[:4]))
    layer.max_graded_rows = 5
    assert torch.equal(layer(x)[:4], layer(x[:4]))


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ([1.0] * 4, r"shape \[4\], must have \[5\]"),
        ([1.0] * 6, r"shape \[6\], must have \[5\]"),
        (torch.ones(1, 5), r"shape \[1, 5\]"),
        ([0, 1, 2, 3, float("nan")], "none NaN"),
        ([-1, 1, 2, 3, 4], "at least 0"),
        ([0, 2, 1, 3, 4], "must never fall"),
    ],
)
def test_bad_thresholds_are_refused_and_the_old_ones_stay(thresholds: Any, message: str) -> None:
    layer = make_layer()
    layer.set_thresholds([0, 1, 2, 3, torch.inf])
    with pytest.raises(InputError, match=message):
        layer.set_thresholds(thresholds)
    assert layer.thresholds.tolist() == [0, 1, 2, 3, torch.inf]


def test_a_budget_bounds_what_every_row_reads() -> None:
    layer, x = make_layer(64, 512, FORMAT), rows(8, 512)
    layer.count_reads = True
    layer.set_thresholds([0.1, 0.2, 0.4, 0.8, 1.6])
    for budget in (3.0, 2.0):
        layer.set_budget(budget)
        for row in x:
            layer.read_total.zero_()
            layer(row)
            assert 0.95 * budget < layer.read_total[0] <= budget
    layer.set_budget(None)
    layer.read_total.zero_()
    layer(x)
    assert layer.read_total[0] / layer.read_total[1] > 3


def test_counting_does_not_change_the_result_and_skips_prefill() -> None:
    layer, x = make_layer(), rows(20)
    layer.set_thresholds([0.5, 1, 2, 4, 8])
    uncounted, prefill = layer(x[:3]), layer(x)
    layer.count_reads = True
    assert torch.equal(layer(x[:3]), uncounted)
    assert layer.read_total[1] == 3
    assert torch.equal(layer(x), prefill)
    assert layer.read_total[1] == 3


def test_nothing_is_trainable_and_gradients_reach_the_input() -> None:
    layer, x = make_layer(), rows(3).requires_grad_()
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, make_weight().sum(0).expand(3, -1), atol=0.2, rtol=0)


@pytest.mark.parametrize("change", [nn.Module.half, nn.Module.bfloat16, nn.Module.double])
def test_a_change_of_dtype_changes_the_bias_alone(change: Any) -> None:
    layer = make_layer()
    layer.set_thresholds([0.1, 0.2, 0.3, 0.4, 0.5])
    before = {name: tensor.clone() for name, tensor in layer.tensors.items() if name != "bias"}
    thresholds = layer.thresholds.clone()
    change(layer)
    assert layer.bias is not None
    assert layer.bias.dtype != torch.float32
    for name, tensor in before.items():
        assert layer.tensors[name].dtype == tensor.dtype
        assert torch.equal(layer.tensors[name].nan_to_num(), tensor.nan_to_num())
    assert torch.equal(layer.thresholds, thresholds)


def test_moving_to_the_meta_device_moves_everything() -> None:
    layer = make_layer().to("meta")
    assert {tensor.device.type for tensor in [*layer.parameters(), *layer.buffers()]} == {"meta"}
    assert layer(torch.empty(2, 33, device="meta")).shape == (2, 70)


def test_a_copy_is_independent() -> None:
    layer, x = make_layer(), rows(2)
    twin = copy.deepcopy(layer)
    twin.set_thresholds([torch.inf] * 5)
    assert not torch.equal(layer(x), twin(x))


def test_the_dial_turns_without_compiling_again() -> None:
    layer, x = make_layer(), rows(2)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch._dynamo.reset()
    compiled(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for scale in (0.25, 0.5, 1.0):
            layer.set_thresholds([scale * t for t in (1, 2, 4, 8, 16)])
            assert torch.equal(compiled(x), layer(x))


def test_printing_shows_shape_and_format() -> None:
    assert "in_features=33, out_features=70, bias=True, planes=2,1,1,2,2, stored_bits=8" in repr(make_layer())


# ---- the tensors


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(3), r"up.weight has shape \[3\], must be a matrix"),
        (torch.zeros(0, 3), r"shape \[0, 3\]"),
        (torch.zeros(2, 3, 4), r"shape \[2, 3, 4\]"),
        (torch.zeros(2, 3, dtype=torch.int8), "up.weight is torch.int8, must be a floating-point type"),
        (torch.zeros(2, 3, device="meta"), "up.weight is on the meta device"),
        (torch.tensor([[1.0, torch.nan]]), "up.weight holds 1 values that are NaN or infinite"),
        (torch.tensor([[torch.inf, -torch.inf]]), "up.weight holds 2 values"),
    ],
)
def test_weights_that_cannot_be_packed_are_refused_by_name(weight: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        packing.pack_weight(weight, FORMAT, name="up.weight")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_type_and_stride_can_be_packed(dtype: torch.dtype) -> None:
    weight = make_weight().to(dtype)
    expected = packing.pack_weight(weight.float(), FORMAT)
    for same in (weight, weight.t().contiguous().t()):
        found = packing.pack_weight(same, FORMAT)
        assert all(torch.equal(found[name].nan_to_num(), expected[name].nan_to_num()) for name in expected)


def test_a_weight_of_zeros_maps_to_zero() -> None:
    layer = GrinqhLinear(packing.pack_weight(torch.zeros(5, 6), FORMAT), FORMAT)
    assert torch.equal(layer(rows(2, 6)), torch.zeros(2, 5))


@pytest.mark.parametrize("stored", [[33] * 5, [33, 33, 20, 10, 0], [33, 20, 20, 1, 1]])
def test_sorting_channels_does_not_change_the_map(stored: list[int]) -> None:
    layer, x = make_layer(), rows(4)
    layer.set_packed(packing.keep_channels(layer.tensors, stored), FORMAT)
    exact = layer(x)
    key = torch.randperm(33, generator=torch.Generator().manual_seed(3))
    layer.set_packed(packing.sort_channels(layer.tensors, key), FORMAT)
    assert layer.stored_channels == stored
    assert layer.channel_order.tolist() != list(range(33))
    assert torch.equal(layer.channel_order.sort().values, torch.arange(33, dtype=torch.int32))
    torch.testing.assert_close(layer(x), exact, atol=1e-4, rtol=1e-4)


def test_left_out_channels_keep_their_upper_planes() -> None:
    layer, x = make_layer(), rows(4)
    exact = layer(x)
    layer.set_packed(packing.keep_channels(layer.tensors, [33, 33, 20, 10, 0]), FORMAT)
    assert layer.stored_channels == [33, 33, 20, 10, 0]
    assert layer.stored_bits == pytest.approx((33 * 3 + 20 + 10 * 2) / 33)
    assert 0 < (layer(x) - exact).norm() < 0.5 * exact.norm()


def test_keeping_planes_shortens_every_table() -> None:
    layer = make_layer()
    shorter = LayerFormat((2, 1, 1), 64)
    layer.set_packed(packing.keep_planes(layer.tensors, 3), shorter)
    layer.reset_buffers()
    specs = packing.tensor_specs(shorter, 33, 70, [33] * 3, 64)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in layer.tensors.items() if n != "bias"} == specs
    assert (layer(rows(4)) - nn.functional.linear(rows(4), make_weight(), layer.bias)).norm() < 20
