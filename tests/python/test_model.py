"""quantize_model: what it converts, what it leaves alone, what it refuses; and what can be asked of a packed model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import calibrated, logits, qwen3, tiny_model, token_ids
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import grinqh
from grinqh import GrinqhConfig, GrinqhLinear, InputError
from grinqh.model import model_config


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x))


class Router(nn.Module):
    """A matrix that no conversion of nn.Linear finds, and a stack of one, which is a matrix too."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.weight = nn.Parameter(torch.zeros(4, 8))
        self.positions = nn.Parameter(torch.zeros(1, 6, 8))


def packed_names(model: nn.Module) -> set[str]:
    return set(grinqh.packed_layers(model))


@pytest.mark.parametrize("make", [tiny_model, qwen3])
def test_every_linear_layer_but_the_head_is_converted(make: Any) -> None:
    model = make()
    exact = logits(model)
    assert grinqh.quantize_model(model) is model
    kinds = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    assert packed_names(model) == {f"model.layers.{i}.{kind}" for i in (0, 1) for kind in kinds}
    assert (logits(model) - exact).abs().max() < 0.02


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_converted_on_demand_and_a_tied_one_leaves_the_embeddings(tied: bool) -> None:
    model = tiny_model(tied=tied)
    embeddings, exact = model.get_input_embeddings().weight.clone(), logits(model)
    grinqh.quantize_model(model, GrinqhConfig(convert_lm_head=True))
    assert isinstance(model.lm_head, GrinqhLinear)
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
    assert (logits(model) - exact).abs().max() < 0.02
    model.tie_weights()
    assert isinstance(model.lm_head, GrinqhLinear)


def test_weights_shared_outside_transformers_are_left_alone() -> None:
    embedding, head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, Block(), head)
    grinqh.quantize_model(model)
    assert packed_names(model) == {"1.up", "1.down"}


def test_a_layer_with_two_names_stays_one_layer() -> None:
    block = Block()
    model = nn.ModuleDict({"first": block, "again": block, "other": Block()})
    grinqh.quantize_model(model)
    assert model["first"].up is model["again"].up
    assert len(packed_names(model)) == 4


def test_a_layer_that_its_module_has_by_two_names_stays_one_layer() -> None:
    model: Any = nn.Module()
    model.first = model.second = nn.Linear(8, 12)
    grinqh.quantize_model(model, progress=False)
    assert isinstance(model.first, GrinqhLinear)
    assert model.second is model.first


def test_biases_and_devices_and_training_mode_are_kept() -> None:
    model = Block().train()
    model.down.eval()
    bias = model.up.bias
    grinqh.quantize_model(model)
    assert torch.equal(model.up.bias, bias)
    assert model.up.training
    assert not model.down.training


def test_patterns_leave_layers_alone_and_change_their_format() -> None:
    config = GrinqhConfig(
        plane_widths=(2, 2, 2, 2),
        modules_to_not_convert=["o_proj", "layers.0.mlp.*"],
        overrides={"down_proj": {"plane_widths": (4, 4), "block": 32}},
    )
    model = grinqh.quantize_model(tiny_model(), config)
    assert len(packed_names(model)) == 14 - 2 - 3
    assert model.model.layers[1].mlp.down_proj.format == grinqh.LayerFormat((4, 4), 32)
    assert model.model.layers[1].mlp.up_proj.format == grinqh.LayerFormat((2, 2, 2, 2), 64)


@pytest.mark.parametrize("setting", [{"modules_to_not_convert": ["o_prj"]}, {"overrides": {"o_prj": {"block": 32}}}])
def test_a_pattern_that_matches_nothing_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(setting))}: the pattern 'o_prj' matches none of the model's 15"):
        grinqh.quantize_model(tiny_model(), GrinqhConfig(**setting))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("tensor", ["up.weight", "up.bias"])
def test_weights_that_are_not_finite_are_refused_by_name_and_nothing_is_converted(tensor: str, bad: float) -> None:
    model = nn.Sequential(Block(), Block())
    with torch.no_grad():
        model[1].get_parameter(tensor).view(-1)[3] = bad
    with pytest.raises(InputError, match=f"1.{tensor} holds"):
        grinqh.quantize_model(model)
    assert not any(isinstance(module, GrinqhLinear) for module in model.modules())


def test_a_skeleton_without_data_is_refused() -> None:
    with torch.device("meta"):
        model = Block()
    with pytest.raises(InputError, match=r"up\.weight is on the meta device"):
        grinqh.quantize_model(model)


def test_a_model_without_anything_to_convert_is_refused() -> None:
    with pytest.raises(InputError, match="has no layer to convert"):
        grinqh.quantize_model(nn.Sequential(nn.LayerNorm(4)))
    with pytest.raises(InputError, match="has no layer to convert: its 2 layers"):
        grinqh.quantize_model(Block(), GrinqhConfig(modules_to_not_convert=["*"]))
    model = grinqh.quantize_model(Block())
    with pytest.raises(InputError, match="has no layer to convert"):
        grinqh.quantize_model(model)


def test_other_matrices_are_named_in_a_warning() -> None:
    model = nn.ModuleList([Router(), Router()])
    left = r"\*\.weight \(2 of shape \[4, 8\]\); \*\.positions \(2 of shape \[1, 6, 8\]\)$"
    with pytest.warns(UserWarning, match=f"left at full precision, .*: {left}"):
        grinqh.quantize_model(model)
    assert packed_names(model) == {"0.up", "1.up"}


def test_matrices_that_are_named_need_no_warning() -> None:
    # Warnings are errors here.
    config = GrinqhConfig(modules_to_not_convert=["0.weight", "1", "positions"])
    grinqh.quantize_model(nn.ModuleList([Router(), Router()]), config)


def test_embeddings_norms_and_convolutions_need_no_warning() -> None:
    # Warnings are errors here.
    grinqh.quantize_model(nn.ModuleList([nn.Embedding(4, 4), nn.Conv1d(2, 2, 3), nn.LayerNorm(4), Block()]))


@pytest.mark.parametrize("while_loading", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_bytes_that_untying_a_head_costs_are_logged(
    tied: bool, while_loading: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, config = tiny_model(tied=tied), GrinqhConfig(convert_lm_head=True)
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, logger="grinqh.model"):
        if while_loading:
            model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
        else:
            grinqh.quantize_model(model, config)
    size = sum(tensor.nbytes for tensor in model.lm_head.parameters())
    line = f"lm_head: untied, its packed weights take {size:,} bytes of their own"
    assert [record.getMessage() for record in caplog.records if "untied" in record.getMessage()] == [line] * tied


def test_every_layer_is_logged_with_its_error_at_each_grade(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="grinqh.model"):
        grinqh.quantize_model(Block())
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["up", "down"]
    assert "at 0 bits 100.00%, 2 bits" in caplog.text


def test_the_config_is_found_again_and_missing_in_an_unconverted_model() -> None:
    config = GrinqhConfig(block=32)
    assert model_config(grinqh.quantize_model(tiny_model(), config)) is config
    assert model_config(grinqh.quantize_model(Block(), config)) is config
    with pytest.raises(InputError, match="Block records no GrinqhConfig"):
        model_config(Block())
    with pytest.raises(InputError, match="Block has no packed layers"):
        grinqh.packed_layers(Block())


def test_sizes_count_planes_scales_and_tables() -> None:
    model = grinqh.quantize_model(
        nn.Sequential(nn.Linear(10, 100, bias=False)), GrinqhConfig(plane_widths=(2, 2, 2, 2))
    )
    assert grinqh.stored_bits(model) == 8
    planes, block_scale, row_scale, order_and_weight = 4 * 10 * 25, 10 * 2 * 2, 100 * 4, 2 * 10 * 4
    gain_and_thresholds, error, dial = 2 * 4 * 4, 5 * 4, 4 * 64 * 4
    expected = planes + block_scale + row_scale + order_and_weight + gain_and_thresholds + error + dial
    assert grinqh.packed_bytes(model) == expected


def test_graded_grades_every_row_of_a_window_and_ends() -> None:
    model = calibrated()
    grinqh.set_bits(model, 2)
    ids = token_ids(1, 40)
    full = logits(model, ids)
    with grinqh.graded(model):
        graded = logits(model, ids)
    assert torch.equal(logits(model, ids), full)
    assert not torch.equal(graded, full)
    with pytest.raises(RuntimeError, match="stop"), grinqh.graded(model):
        raise RuntimeError("stop")
    assert torch.equal(logits(model, ids), full)


def test_a_graded_window_reads_what_decoding_token_by_token_reads() -> None:
    model = calibrated()
    grinqh.set_bits(model, 3)
    ids = token_ids(1, 20)
    with grinqh.graded(model):
        window = logits(model, ids)
    cache, steps = None, []
    for token in ids[0]:
        with torch.no_grad():
            output = model(token.view(1, 1), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits[0, 0])
    torch.testing.assert_close(torch.stack(steps), window[0], atol=1e-4, rtol=1e-4)


def test_read_stats_count_between_switching_on_and_reset() -> None:
    model = calibrated()
    grinqh.set_bits(model, 8)
    logits(model, token_ids(1, 5))
    with pytest.raises(InputError, match="no rows were counted"):
        grinqh.read_stats(model)
    grinqh.count_reads(model)
    logits(model, token_ids(1, 5))
    stats = grinqh.read_stats(model)
    assert stats.read_bits == 8
    assert stats.layers.keys() == packed_names(model)
    grinqh.reset_read_stats(model)
    grinqh.count_reads(model, False)
    logits(model, token_ids(1, 5))
    with pytest.raises(InputError, match="no rows were counted"):
        grinqh.read_stats(model)


@pytest.mark.parametrize("keep", [0, 4])
def test_counts_hold_no_graph_where_gradients_are_enabled(keep: int) -> None:
    model = calibrated()
    grinqh.count_reads(model, keep_tokens=keep)
    model(input_ids=token_ids(1, 5)).logits.sum().backward()
    assert not any(buffer.requires_grad for buffer in model.buffers())
    assert grinqh.read_stats(model).read_bits > 0


def test_the_model_s_read_bits_are_the_mean_over_weights_of_the_layers() -> None:
    model = calibrated()
    grinqh.set_bits(model, 3)
    grinqh.count_reads(model)
    logits(model, token_ids(1, 8))
    stats = grinqh.read_stats(model)
    layers = grinqh.packed_layers(model)
    total = sum(stats.layers[name] * layer.weights for name, layer in layers.items())
    assert stats.read_bits == pytest.approx(total / sum(layer.weights for layer in layers.values()))
    assert len({round(bits, 3) for bits in stats.layers.values()}) > 1


# ---- read bits of single tokens


def test_token_reads_are_those_of_each_row_alone() -> None:
    model, ids = calibrated(), token_ids(1, 8)
    grinqh.set_bits(model, 2.5)
    grinqh.count_reads(model, keep_tokens=20)
    logits(model, ids)
    found = grinqh.token_reads(model)
    stats = grinqh.read_stats(model)
    assert len(found.read_bits) == 8
    assert float(found.read_bits.mean()) == pytest.approx(stats.read_bits)
    assert found.layers.keys() == stats.layers.keys()
    for name, bits in found.layers.items():
        assert float(bits.mean()) == pytest.approx(stats.layers[name])
    assert found.read_bits.std() > 0.01
    grinqh.reset_read_stats(model)
    logits(model, ids[:, :1])
    assert torch.equal(grinqh.token_reads(model).read_bits, found.read_bits[:1])


def test_token_reads_are_weighted_by_the_layers_weights() -> None:
    model = calibrated()
    grinqh.set_bits(model, {"*": 2, "down_proj": 8})
    grinqh.count_reads(model, keep_tokens=20)
    logits(model, token_ids(1, 5))
    found, layers = grinqh.token_reads(model), grinqh.packed_layers(model)
    total = sum(found.layers[name] * layer.weights for name, layer in layers.items())
    torch.testing.assert_close(found.read_bits, total / sum(layer.weights for layer in layers.values()))


def test_the_last_tokens_are_kept_if_there_are_more() -> None:
    model = calibrated()
    grinqh.count_reads(model, keep_tokens=64)
    for part in token_ids(1, 40).split(8, 1):
        logits(model, part)
    found = grinqh.token_reads(model).read_bits
    assert len(found) == 40
    for keep in (11, 3):  # more and less than the rows of a pass
        grinqh.count_reads(model, keep_tokens=keep)
        for part in token_ids(1, 40).split(8, 1):
            logits(model, part)
        assert torch.equal(grinqh.token_reads(model).read_bits, found[-keep:])


def test_what_was_kept_stays_when_counting_stops_and_goes_when_it_begins_anew() -> None:
    model = calibrated()
    grinqh.count_reads(model, keep_tokens=20)
    logits(model, token_ids(1, 5))
    grinqh.count_reads(model, False)
    logits(model, token_ids(1, 5))
    assert len(grinqh.token_reads(model).read_bits) == 5
    grinqh.count_reads(model, keep_tokens=20)
    with pytest.raises(InputError, match="no rows were kept"):
        grinqh.token_reads(model)


def test_a_step_of_a_batch_gives_a_row_for_each_sequence() -> None:
    model, prompts = calibrated(), token_ids(2, 24)
    grinqh.set_bits(model, 3)

    def read(prompts: Tensor) -> Tensor:
        grinqh.count_reads(model, keep_tokens=64)
        model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=6, do_sample=False)
        return grinqh.token_reads(model).read_bits

    together = read(prompts)
    assert together.shape == (2 * 5,)
    torch.testing.assert_close(together[::2], read(prompts[:1]), atol=0.05, rtol=0)
    torch.testing.assert_close(together[1::2], read(prompts[1:]), atol=0.05, rtol=0)


@pytest.mark.parametrize("length", [24, 4])  # a prompt that is read in full, and one that is graded
def test_a_converted_head_that_sees_fewer_rows_is_paired_from_the_newest(length: int) -> None:
    model = calibrated(config=GrinqhConfig(convert_lm_head=True))
    grinqh.count_reads(model, keep_tokens=64)
    prompt = token_ids(1, length)
    model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
    found = grinqh.token_reads(model)
    assert "lm_head" in found.layers
    assert len(found.read_bits) == (5 if length == 24 else 6)


def test_layers_that_see_different_rows_have_no_mean_row_by_row() -> None:
    model = calibrated()
    grinqh.count_reads(model, keep_tokens=64)
    logits(model, token_ids(1, 5))
    model.model.layers[0].mlp.up_proj(torch.zeros(1, 64))
    with pytest.raises(InputError, match=r"up_proj saw 6"):
        grinqh.token_reads(model)


@pytest.mark.parametrize("keep", [-1, 2.5, True])
def test_a_bad_number_of_tokens_to_keep_is_refused(keep: Any) -> None:
    with pytest.raises(InputError, match=f"keep_tokens is {keep}, must be an integer"):
        grinqh.count_reads(calibrated(), keep_tokens=keep)


def test_token_reads_without_counting_say_what_to_do() -> None:
    model = calibrated()
    grinqh.count_reads(model)
    logits(model, token_ids(1, 5))
    with pytest.raises(InputError, match=r"no rows were kept: call grinqh\.count_reads\(model, keep_tokens"):
        grinqh.token_reads(model)
