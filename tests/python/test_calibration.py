"""Calibration: what it measures, what it records, what it refuses."""

from __future__ import annotations

import copy
import itertools
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import assert_unchanged, calibrated, logits, state, tiny_model, token_ids
from torch import Tensor, nn

import grinqh
from grinqh import GrinqhConfig, InputError


class Tokenizer:
    """Letters to ids, without a BOS token."""

    bos_token_id = None

    def __call__(self, text: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[ord(letter) % 256 for letter in text])


class Unused(nn.Module):
    """A language model with a layer that no token reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 16)
        self.used = nn.Linear(16, 16)
        self.unused = nn.Linear(16, 16)
        self.lm_head = nn.Linear(16, 256)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.used(self.embedding(ids)))


def quantized(config: GrinqhConfig | None = None) -> Any:
    return grinqh.quantize_model(tiny_model(), config)


def importances() -> tuple[Any, Tensor, Tensor]:
    """A model of one layer, token ids, and its channels by falling mean square times energy."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 6, bias=False))
    with torch.no_grad():
        model[0].weight *= torch.tensor([1.0, 9, 2, 8, 3, 7, 4, 6])
    ids = torch.tensor([[0, 1, 2, 3, 0]])
    energy = model[0](ids)[0].square().mean(0) * model[1].weight.square().sum(0)
    return model, ids, energy.detach().argsort(descending=True)


def test_channels_that_are_stored_in_full_stay_in_the_order_of_features() -> None:
    model, ids, _ = importances()
    weight = model[1].weight.detach().clone()
    grinqh.quantize_model(model)
    assert model[1].channel_order.tolist() == list(range(8))
    grinqh.calibrate(model, ids, sensitivity=False)
    assert model[1].channel_order.tolist() == list(range(8))
    x = model[0](ids)[0]
    grinqh.set_bits(model, 8)
    torch.testing.assert_close(model[1](x), x @ weight.T, atol=0.1, rtol=0.02)


@pytest.mark.parametrize("targets", [(4.5,), (6.0, 4.5)])
def test_low_planes_are_kept_for_the_channels_of_most_mean_square_times_energy(targets: tuple[float, ...]) -> None:
    model, ids, expected = importances()
    grinqh.quantize_model(model, GrinqhConfig(plane_widths=(1,) * 8))
    for target in targets:
        grinqh.model.model_config(model).stored_bits = target
        grinqh.calibrate(model, ids, sensitivity=False, compensate=False)
    layer = model[1]
    assert len(set(layer.stored_channels)) > 2
    for channels in layer.stored_channels:
        assert set(layer.channel_order[:channels].tolist()) == set(expected[:channels].tolist())
    ends = sorted({0, *layer.stored_channels})
    for begin, end in itertools.pairwise(ends):
        alike = layer.channel_order[begin:end].tolist()
        assert alike == sorted(alike)


def test_calibration_changes_nothing_that_is_read_in_full() -> None:
    model = quantized()
    before = logits(model, token_ids())
    grinqh.calibrate(model, token_ids())
    torch.testing.assert_close(logits(model, token_ids()), before, atol=1e-4, rtol=1e-4)


def test_sensitivity_says_how_far_predictions_move_in_kl_divergence_when_a_layer_s_outputs_do() -> None:
    model, ids, name, size = quantized(), token_ids(8, 64), "model.layers.1.mlp.down_proj", 1e-2
    with torch.no_grad():
        model.lm_head.weight *= 60  # sure of itself, and wrong: the text's own tokens would give other gradients
        before = model(ids).logits.double().log_softmax(-1)
    generator, distances = torch.Generator().manual_seed(0), []
    moved = copy.deepcopy(model)
    layer = moved.get_submodule(name)
    layer.register_forward_hook(lambda _, __, y: y + size * torch.randn(y.shape, generator=generator))
    for _ in range(8):
        with torch.no_grad():
            after = moved(ids).logits.double().log_softmax(-1)
        distances.append(float(nn.functional.kl_div(after, before, reduction="sum", log_target=True)))
    # To second order: half the movement's square times the Fisher information, the mean squared gradient.
    expected = 2 * sum(distances) / len(distances) / size**2 / (ids.numel() * layer.out_features)
    measured = grinqh.calibrate(model, ids).sensitivity[name]
    assert measured == pytest.approx(expected, rel=0.25)


def test_sensitivity_is_the_same_every_time() -> None:
    first, second = (grinqh.calibrate(quantized(), token_ids()).sensitivity for _ in range(2))
    assert first == second


def test_sensitive_layers_read_more_bits_and_without_sensitivity_all_layers_count_alike() -> None:
    def read_bits(sensitivity: bool) -> dict[str, float]:
        model = quantized()
        report = grinqh.calibrate(model, token_ids(), sensitivity=sensitivity)
        assert set(report.sensitivity.values()) == {1.0} or sensitivity
        return {name: float(bits[32]) for name, bits in report.dial.layers.items()}

    by_loss, alike = read_bits(True), read_bits(False)
    insensitive, sensitive = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"
    assert by_loss[insensitive] < alike[insensitive]
    assert by_loss[sensitive] > alike[sensitive]


def test_texts_and_their_token_ids_record_the_same() -> None:
    texts = ["the quick brown fox jumps over the lazy dog " * 3, "x"]
    ids = torch.tensor([Tokenizer()(texts[0]).input_ids])
    from_texts, from_ids = quantized(), quantized()
    report = grinqh.calibrate(from_texts, texts, Tokenizer(), sequence_length=ids.shape[1])
    grinqh.calibrate(from_ids, ids)
    assert report.tokens == ids.numel()
    assert_unchanged(from_texts, state(from_ids))


def test_the_number_of_tokens_is_limited_and_spread_over_the_data() -> None:
    batches = [torch.full((1, 16), i) for i in range(10)]
    seen: list[int] = []
    model = quantized()
    model.register_forward_pre_hook(lambda _, arguments: seen.append(int(arguments[0][0, 0])))
    assert grinqh.calibrate(model, batches, max_tokens=48).tokens == 48
    assert seen == [0, 3, 6]


def test_calibrating_again_gives_the_same_as_once() -> None:
    model = calibrated()
    grinqh.set_bits(model, 2)
    once = state(model)
    grinqh.calibrate(model, token_ids())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, once[name], atol=1e-3, rtol=1e-3)


def test_calibration_sets_the_dial_to_the_config_s_read_bits() -> None:
    low, high = calibrated(config=GrinqhConfig(read_bits=2)), calibrated(config=GrinqhConfig(read_bits=4))
    for name, layer in grinqh.packed_layers(low).items():
        assert (layer.thresholds > grinqh.packed_layers(high)[name].thresholds).all()


def test_the_model_s_mode_gradients_and_counts_are_left_as_they_were() -> None:
    model = quantized().train()
    model.model.norm.eval()
    model.lm_head.weight.requires_grad_(False)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    grinqh.count_reads(model)
    grinqh.calibrate(model, token_ids(1, 8))
    assert model.training
    assert not model.model.norm.training
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(InputError, match="no rows were counted"):
        grinqh.read_stats(model)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in grinqh.packed_layers(model).values())


@pytest.mark.parametrize("target", [6.0, 4.5, 3.0])
def test_stored_bits_are_met_by_leaving_out_low_planes_of_unimportant_channels(target: float) -> None:
    model = calibrated(config=GrinqhConfig(stored_bits=target))
    assert target - 0.15 < grinqh.stored_bits(model) <= target
    stored = [layer.stored_channels for layer in grinqh.packed_layers(model).values()]
    assert all(channels == sorted(channels, reverse=True) for channels in stored)
    assert all(c[0] == layer.in_features for c, layer in zip(stored, grinqh.packed_layers(model).values(), strict=True))
    assert len({tuple(channels) for channels in stored}) > 1


def test_the_dial_knows_what_is_left_out() -> None:
    model = calibrated(config=GrinqhConfig(stored_bits=4.5))
    assert float(grinqh.dial_table(model).read_bits[0]) == pytest.approx(grinqh.stored_bits(model), abs=0.05)
    grinqh.count_reads(model)
    for target in (2, 3):
        grinqh.set_bits(model, target)
        grinqh.reset_read_stats(model)
        with grinqh.graded(model):
            logits(model, token_ids())
        assert grinqh.read_stats(model).read_bits == pytest.approx(target, rel=0.03)


def test_an_override_gives_a_layer_stored_bits_of_its_own() -> None:
    model = calibrated(config=GrinqhConfig(overrides={"layers.0.mlp.down_proj": {"stored_bits": 3}}))
    for name, layer in grinqh.packed_layers(model).items():
        if name == "model.layers.0.mlp.down_proj":
            assert 2.8 < layer.stored_bits <= 3
        else:
            assert layer.stored_bits == 8


def test_a_layer_that_sees_no_token_keeps_reading_everything(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = grinqh.quantize_model(Unused())
    with caplog.at_level(logging.WARNING):
        grinqh.calibrate(model, token_ids(2, 16))
    assert "unused saw no token" in caplog.text
    assert grinqh.dial_table(model).layers.keys() == {"used"}
    grinqh.set_bits(model, 3)
    assert model.used.thresholds.all()
    assert not model.unused.thresholds.any()


def test_activations_that_are_not_finite_are_refused_by_name_and_nothing_changes() -> None:
    model = quantized()
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[5] = torch.nan
    before = state(model)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.gate_proj saw activations that are NaN"):
        grinqh.calibrate(model, token_ids())
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("data", "arguments", "message"),
    [
        ("text", {}, "texts but no tokenizer"),
        ([], {}, "calibration data is empty"),
        ("", {"tokenizer": Tokenizer()}, "calibration data is empty"),
        (["a", ""], {"tokenizer": Tokenizer()}, "calibration data is empty"),
        ([3], {}, "holds a int"),
        (["text", torch.ones(2)], {}, "holds a str"),
        (torch.ones(2, 8), {}, r"token ids are torch.float32 \[2, 8\]"),
        (torch.ones(2, 2, 8, dtype=torch.int64), {}, r"\[2, 2, 8\]"),
        (torch.ones(3, 1, dtype=torch.int64), {}, r"\[3, 1\]"),
        (torch.ones(0, 8, dtype=torch.int64), {}, r"\[0, 8\]"),
        (torch.ones(8, dtype=torch.int64), {"sequence_length": 1}, "sequence_length is 1"),
        (torch.ones(8, dtype=torch.int64), {"max_tokens": 0}, "max_tokens is 0"),
    ],
)
def test_bad_calibration_data_is_refused(data: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        grinqh.calibrate(quantized(), data, **arguments)


def test_a_model_without_logits_needs_sensitivity_switched_off() -> None:
    model = grinqh.quantize_model(nn.Sequential(nn.Embedding(256, 8), nn.Linear(8, 8), nn.Flatten()))
    with pytest.raises(InputError, match="returns no logits"):
        grinqh.calibrate(model, token_ids(2, 8))
    grinqh.calibrate(model, token_ids(2, 8), sensitivity=False)
    grinqh.set_bits(model, 3)


def test_an_unconverted_model_is_refused() -> None:
    with pytest.raises(InputError, match=r"call grinqh\.quantize_model first"):
        grinqh.calibrate(tiny_model(), token_ids())
