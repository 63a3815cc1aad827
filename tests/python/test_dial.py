"""The dial: targets are met, settings are exact, nothing is recompiled, bad ones change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import calibrated, logits, tiny_model, token_ids

import grinqh
from grinqh import GrinqhConfig, InputError
from grinqh.model import model_config

CALIBRATION = token_ids()  # what `calibrated` used


def realised(model: Any, ids: torch.Tensor = CALIBRATION) -> grinqh.ReadStats:
    grinqh.count_reads(model)
    grinqh.reset_read_stats(model)
    with grinqh.graded(model):
        logits(model, ids)
    return grinqh.read_stats(model)


@pytest.fixture(scope="module")
def shared_model() -> Any:
    return calibrated()


def thresholds(model: Any) -> torch.Tensor:
    return torch.stack([layer.thresholds for layer in grinqh.packed_layers(model).values()])


@pytest.mark.parametrize("target", [2, 2.5, 3, 4, 5, 6.5])
def test_realised_read_bits_are_near_the_target(shared_model: Any, target: float) -> None:
    grinqh.set_bits(shared_model, target)
    assert realised(shared_model).read_bits == pytest.approx(target, rel=0.03)


def test_the_dial_s_mean_is_met_for_every_layer_too(shared_model: Any) -> None:
    table = grinqh.dial_table(shared_model)
    grinqh.set_bits(shared_model, float(table.read_bits[30]))
    found = realised(shared_model).layers
    for name, bits in table.layers.items():
        assert found[name] == pytest.approx(float(bits[30]), abs=0.15)


def test_more_bits_are_nearer_to_full_precision(shared_model: Any) -> None:
    exact, errors = logits(tiny_model(), CALIBRATION), []
    for target in (1, 2, 3, 4, 8):
        grinqh.set_bits(shared_model, target)
        with grinqh.graded(shared_model):
            errors.append(float((logits(shared_model, CALIBRATION) - exact).norm()))
    assert errors == sorted(errors, reverse=True)


def test_the_stored_bits_or_more_read_everything(shared_model: Any) -> None:
    grinqh.set_bits(shared_model, 8)
    assert not thresholds(shared_model).any()
    assert realised(shared_model).read_bits == 8


def test_the_table_falls_from_all_to_nothing_over_the_grid(shared_model: Any) -> None:
    table = grinqh.dial_table(shared_model)
    assert torch.equal(table.tau, 2.0 ** torch.arange(-20, 12, 0.5, dtype=torch.float64))
    assert (table.read_bits.diff() <= 0).all()
    assert table.read_bits[0] > 7.9
    assert table.read_bits[-1] < 0.01
    assert 3 < table.read_bits[32] < 5  # half the stored bits in the middle


def test_setting_is_in_place_and_recorded(shared_model: Any) -> None:
    layer = next(iter(grinqh.packed_layers(shared_model).values()))
    tensor = layer.thresholds
    grinqh.set_bits(shared_model, 2)
    two = tensor.clone()
    grinqh.set_bits(shared_model, 4)
    assert layer.thresholds is tensor
    assert (tensor < two).all()
    assert model_config(shared_model).read_bits == 4


def test_setting_twice_is_the_same_as_once(shared_model: Any) -> None:
    grinqh.set_bits(shared_model, 3)
    once = thresholds(shared_model)
    grinqh.set_bits(shared_model, 5)
    grinqh.set_bits(shared_model, 3)
    assert torch.equal(thresholds(shared_model), once)


def test_patterns_set_some_layers_and_leave_the_rest() -> None:
    model = calibrated()
    grinqh.set_bits(model, 3)
    before = thresholds(model)
    grinqh.set_bits(model, {"down_proj": 5, "layers.0.mlp.down_proj": 8})
    changed = (thresholds(model) != before).any(1).tolist()
    assert changed == [name.endswith("down_proj") for name in grinqh.packed_layers(model)]
    assert not model.model.layers[0].mlp.down_proj.thresholds.any()
    assert model_config(model).read_bits == {"*": 3, "down_proj": 5, "layers.0.mlp.down_proj": 8}
    grinqh.set_bits(model, {"*": 3})
    assert torch.equal(thresholds(model), before)


def test_a_group_set_by_pattern_meets_its_own_mean() -> None:
    model = calibrated()
    grinqh.set_bits(model, {"*": 4, "mlp.*": 2.5})
    found, layers = realised(model).layers, grinqh.packed_layers(model)
    group = [name for name in layers if ".mlp." in name]
    total = sum(found[name] * layers[name].weights for name in group)
    assert total / sum(layers[name].weights for name in group) == pytest.approx(2.5, rel=0.03)


def test_an_exact_budget_holds_for_every_token(shared_model: Any) -> None:
    grinqh.set_bits(shared_model, 3, exact_budget=True)
    for position in range(8):
        assert 2.7 < realised(shared_model, CALIBRATION[:1, position : position + 1]).read_bits <= 3.001
    grinqh.set_bits(shared_model, 3)
    single = [realised(shared_model, CALIBRATION[:1, i : i + 1]).read_bits for i in range(8)]
    assert max(single) > 3.001


@pytest.mark.parametrize(
    ("read_bits", "message"),
    [
        (0, "read_bits is 0"),
        (9, "read_bits is 9"),
        (float("nan"), "read_bits is nan"),
        ("3", "read_bits is '3'"),
        ({"mlp.*": 0}, r"read_bits\['mlp.\*'\] is 0"),
        ({"mpl.*": 3}, r"read_bits: the pattern 'mpl.\*' matches none"),
    ],
)
def test_a_bad_setting_is_refused_and_the_dial_unchanged(shared_model: Any, read_bits: Any, message: str) -> None:
    grinqh.set_bits(shared_model, 3)
    before = thresholds(shared_model)
    with pytest.raises(InputError, match=message):
        grinqh.set_bits(shared_model, read_bits)
    assert torch.equal(thresholds(shared_model), before)
    assert model_config(shared_model).read_bits == 3


def test_an_uncalibrated_model_reads_everything_and_says_how_to_get_a_dial() -> None:
    model = grinqh.quantize_model(tiny_model())
    assert realised(model).read_bits == 8
    for ask in (lambda: grinqh.set_bits(model, 3), lambda: grinqh.dial_table(model)):
        with pytest.raises(InputError, match=r"the model has no dial yet: call grinqh\.calibrate"):
            ask()


def test_one_graph_serves_every_setting() -> None:
    model = calibrated()
    ids = token_ids(1, 5)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch._dynamo.reset()
    with torch.no_grad():
        compiled(ids, use_cache=False)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for target in (2, 3, 4, 8):
                grinqh.set_bits(model, target)
                assert torch.equal(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_a_shorter_grid_bounds_what_can_be_set() -> None:
    model = calibrated(config=GrinqhConfig(dial_grid=(-3, 1, 6)))
    assert len(grinqh.dial_table(model).tau) == 6
    grinqh.set_bits(model, 3)
    assert realised(model).read_bits == pytest.approx(3, rel=0.05)
    with pytest.raises(InputError, match=r"read_bits is 0.5, must be at least [12]\.\d+, the least recorded"):
        grinqh.set_bits(model, 0.5)
