"""Rounding anew: what it keeps, and what it gains."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import calibrated, tiny_model, token_ids
from torch import Tensor, nn

import grinqh
from grinqh import GrinqhConfig, GrinqhLinear, compensation, packing
from grinqh.calibration import _groups_within
from grinqh.compensation import Task, compensated
from grinqh.config import LayerFormat


def packed(n: int, k: int, widths: tuple[int, ...] = (2, 2, 2, 2), block: int = 64, seed: int = 0) -> GrinqhLinear:
    generator = torch.Generator().manual_seed(seed)
    format = LayerFormat(widths, block)
    return GrinqhLinear(packing.pack_weight(torch.randn(n, k, generator=generator), format), format)


def correlated(rows: int, k: int, seed: int = 0) -> Tensor:
    """Inputs that move together: few sources, mixed, and a little of their own."""
    generator = torch.Generator().manual_seed(seed)
    sources = torch.randn(rows, max(1, k // 8), generator=generator)
    mixture = torch.randn(sources.shape[1], k, generator=generator)
    return sources @ mixture + 0.3 * torch.randn(rows, k, generator=generator)


def with_tensors(layer: GrinqhLinear, tensors: packing.PackedTensors) -> GrinqhLinear:
    other = copy.deepcopy(layer)
    other.set_packed(tensors, layer.format)
    return other


def output_error(layer: GrinqhLinear, exact: Tensor, x: Tensor) -> float:
    return float((x @ layer.dense() - x @ exact).square().mean())


SIZES = [(1, 1), (7, 33), (65, 40), (576, 130)]


@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("widths", [(2, 2, 2, 2), (2, 1, 1, 2, 2), (4, 4)])
def test_inputs_that_do_not_move_together_keep_the_codes(n: int, k: int, widths: tuple[int, ...]) -> None:
    layer = packed(n, k, widths)
    stored = [max(1, k - 7 * p) for p in range(len(widths))]
    expected = packing.keep_channels(layer.tensors, stored)
    (found,) = compensated([Task(layer, torch.diag(torch.rand(k) + 0.1), stored)])
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].nan_to_num(-1), tensor.nan_to_num(-1)), name  # the dial holds NaN yet


@pytest.mark.parametrize("block", [32, 64, 128])
def test_inputs_that_move_together_lose_less_on_rows_that_were_not_seen(block: int) -> None:
    layer = packed(130, 96, block=block)
    exact, seen, unseen = layer.dense(), correlated(400, 96)[:300], correlated(400, 96)[300:]
    stored = [96, 96, 20, 5]
    cut = with_tensors(layer, packing.keep_channels(layer.tensors, stored))
    anew = with_tensors(layer, *compensated([Task(layer, seen.T @ seen / len(seen), stored)]))
    assert anew.stored_channels == cut.stored_channels
    assert output_error(anew, exact, unseen) < 0.7 * output_error(cut, exact, unseen)


def test_layers_rounded_together_are_rounded_as_each_by_itself() -> None:
    tasks = []
    for seed, stored in enumerate(([40, 40, 9, 0], [40, 30, 20, 10], [40, 0, 0, 0])):
        x = correlated(99, 40, seed)
        tasks.append(Task(packed(70, 40, seed=seed), x.T @ x / 99, stored))
    for task, tensors in zip(tasks, compensated(tasks), strict=True):
        (alone,) = compensated([task])
        exact, x = task.layer.dense(), correlated(99, 40, 7)
        errors = [output_error(with_tensors(task.layer, each), exact, x) for each in (tensors, alone)]
        assert errors[0] == pytest.approx(errors[1], rel=0.02)  # sums may be taken in another order


def test_errors_are_carried_beyond_the_channels_of_a_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, seen = packed(70, 96), correlated(300, 96)
    exact, errors = layer.dense(), []
    for panel in (8, 96):
        monkeypatch.setattr(compensation, "PANEL", panel)
        anew = with_tensors(layer, *compensated([Task(layer, seen.T @ seen / 300, [96, 96, 20, 5])]))
        errors.append(output_error(anew, exact, seen))
    assert errors[0] == pytest.approx(errors[1], rel=0.02)  # sums are taken in another order


@given(n=st.integers(1, 80), k=st.integers(1, 40), seed=st.integers(0, 99), data=st.data())
def test_what_is_written_is_a_valid_layer_whatever_is_kept(n: int, k: int, seed: int, data: st.DataObject) -> None:
    layer = packed(n, k, seed=seed)
    stored = sorted(data.draw(st.lists(st.integers(0, k), min_size=3, max_size=3)), reverse=True)
    x = correlated(5, k, seed)
    x[:, data.draw(st.integers(0, k - 1))] = 0  # an input that never occurs
    (tensors,) = compensated([Task(layer, x.T @ x / 5, [k, *stored])])
    found = {name: packing.TensorSpec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    packing.check_specs("layer", layer.format, k, n, False, layer.dial.shape[1], found)
    packing.check_values("layer", tensors)


def test_calibration_rounds_anew_only_where_it_drops_planes_of_a_whole_layer() -> None:
    config = GrinqhConfig(overrides={"layers.0.mlp.down_proj": {"stored_bits": 3}})
    anew = grinqh.quantize_model(tiny_model(), config)
    cut = copy.deepcopy(anew)
    grinqh.calibrate(anew, token_ids())
    grinqh.calibrate(cut, token_ids(), compensate=False)
    other = cut.state_dict()
    codes = {name: tensor for name, tensor in anew.state_dict().items() if "plane_" in name}
    assert {name.rpartition(".")[0] for name, tensor in codes.items() if not torch.equal(tensor, other[name])} == {
        "model.layers.0.mlp.down_proj"
    }


def test_rounding_anew_brings_a_model_nearer_to_full_precision() -> None:
    dense = tiny_model()
    ids = token_ids()
    exact = dense(ids).logits

    def error(compensate: bool) -> float:
        model = grinqh.quantize_model(copy.deepcopy(dense), GrinqhConfig(stored_bits=3.0))
        grinqh.calibrate(model, ids, compensate=compensate)
        grinqh.set_bits(model, 8)
        return float((model(ids).logits - exact).detach().square().mean())

    assert error(True) < 0.9 * error(False)


def test_calibrating_again_leaves_codes_that_were_cut_as_they_are() -> None:
    model = calibrated(config=GrinqhConfig(stored_bits=4.0))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "plane_" in name}
    grinqh.calibrate(model, token_ids())
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_second_moments_are_gathered_for_as_many_layers_at_a_time_as_the_memory_allows() -> None:
    sizes = {"a": 4, "b": 4, "c": 16, "d": 4}
    assert list(_groups_within(8, sizes)) == [["a", "b"], ["c"], ["d"]]
    assert list(_groups_within(28, sizes)) == [["a", "b", "c", "d"]]
    assert list(_groups_within(1 << 30, {})) == []


def test_a_module_of_one_layer_works_too() -> None:
    model = nn.Sequential(nn.Embedding(16, 64), nn.Linear(64, 48))
    grinqh.quantize_model(model, GrinqhConfig(stored_bits=4.0))
    grinqh.calibrate(model, torch.arange(16)[None], sensitivity=False)
    assert grinqh.stored_bits(model) <= 4
