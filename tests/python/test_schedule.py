"""BitsSchedule: the dial turns at the right token, in place, without compiling again, and is put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny_models import calibrated, tiny_model, token_ids
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from transformers import CompileConfig

import grinqh
from grinqh import BitsSchedule, InputError
from grinqh.model import model_config

PROMPT = token_ids(1, 24)  # more rows than are graded: read in full


@pytest.fixture(scope="module")
def shared_model() -> Any:
    return calibrated()


@pytest.fixture
def model(shared_model: Any) -> Any:
    grinqh.set_bits(shared_model, 3)
    grinqh.count_reads(shared_model, False)
    return shared_model


def generate(model: Any, new_tokens: int, prompt: Tensor = PROMPT, **settings: Any) -> Tensor:
    return model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, do_sample=False, **settings
    )


def thresholds(model: Any) -> Tensor:
    return torch.stack([layer.thresholds for layer in grinqh.packed_layers(model).values()])


def budgets(model: Any) -> list[float]:
    found = [layer.budget for layer in grinqh.packed_layers(model).values()]
    return [float(budget) for budget in found if budget is not None]


def thresholds_at(model: Any, read_bits: Any) -> Tensor:
    grinqh.set_bits(model, read_bits)
    found = thresholds(model)
    grinqh.set_bits(model, 3)
    return found


@contextmanager
def recorded_passes(model: Any) -> Iterator[list[Tensor]]:
    """The thresholds that every pass of the model finds."""
    found: list[Tensor] = []
    handle = model.register_forward_pre_hook(lambda *_: found.append(thresholds(model)))
    yield found
    handle.remove()


def test_every_token_is_computed_at_the_bits_of_its_phase(model: Any) -> None:
    expected = [thresholds_at(model, bits) for bits in (6, 4, 2)]
    with recorded_passes(model) as found, BitsSchedule(model, [(3, 6), (2, 4), (None, 2)]):
        generate(model, 8)
    assert len(found) == 8
    for token, phase in enumerate([0, 0, 0, 1, 1, 2, 2, 2]):
        assert torch.equal(found[token], expected[phase])


def test_the_tokens_read_the_bits_that_the_schedule_says(model: Any) -> None:
    grinqh.count_reads(model, keep_tokens=64)
    with BitsSchedule(model, [(10, 8), (None, 2.5)]):
        generate(model, 40)
    bits = grinqh.token_reads(model).read_bits
    assert len(bits) == 39  # the first is of the prompt's pass, which is not graded
    assert (bits[:9] == 8).all()
    assert (bits[9:] < 5).all()
    assert bits[9:].mean() == pytest.approx(2.5, rel=0.2)


def test_each_generation_begins_at_the_first_token(model: Any) -> None:
    with recorded_passes(model) as found, BitsSchedule(model, [(2, 8), (None, 2)]):
        generate(model, 4)
        generate(model, 4)
    assert [not state.any() for state in found] == [True, True, False, False] * 2


def test_a_prompt_in_pieces_is_one_token(model: Any) -> None:
    with recorded_passes(model) as found, BitsSchedule(model, [(2, 8), (None, 2)]):
        generate(model, 4, prefill_chunk_size=8)
    assert [not state.any() for state in found] == [True] * 3 + [True, False, False]


@pytest.mark.parametrize("settings", [{"use_cache": False}, {"num_beams": 2}, {"cache_implementation": "static"}])
def test_other_ways_to_generate_follow_the_schedule(model: Any, settings: dict[str, Any]) -> None:
    with recorded_passes(model) as found, BitsSchedule(model, [(2, 8), (None, 2)]):
        generate(model, 4, **settings)
    assert [not state.any() for state in found] == [True, True, False, False]


def test_a_schedule_of_one_phase_generates_as_the_dial_does(model: Any) -> None:
    with BitsSchedule(model, [(None, 2)]):
        found = generate(model, 12)
    grinqh.set_bits(model, 2)
    assert torch.equal(found, generate(model, 12))


def test_the_dial_of_before_is_restored(model: Any) -> None:
    before = thresholds(model)
    tensors = [layer.thresholds for layer in grinqh.packed_layers(model).values()]
    with BitsSchedule(model, [(2, 8), (None, 2)]):
        generate(model, 4)
        assert model_config(model).read_bits == 3
        grinqh.set_bits(model, 5, exact_budget=True)
    assert torch.equal(thresholds(model), before)
    assert all(a is b.thresholds for a, b in zip(tensors, grinqh.packed_layers(model).values(), strict=True))
    assert all(layer.budget is None for layer in grinqh.packed_layers(model).values())
    assert (model_config(model).read_bits, model_config(model).exact_budget) == (3, False)
    assert "prepare_inputs_for_generation" not in vars(model)


def test_the_dial_is_restored_after_an_error(model: Any) -> None:
    before = thresholds(model)
    with pytest.raises(ZeroDivisionError), BitsSchedule(model, [(None, 2)]):
        raise ZeroDivisionError
    assert torch.equal(thresholds(model), before)


def test_an_exact_budget_changes_with_the_phase(model: Any) -> None:
    grinqh.set_bits(model, 3, exact_budget=True)
    before = budgets(model)
    grinqh.count_reads(model, keep_tokens=64)
    with BitsSchedule(model, [(8, 4), (None, 2)]):
        generate(model, 20)
    bits = grinqh.token_reads(model).read_bits
    assert (bits[:7] <= 4.001).all()
    assert (bits[:7] > 3.5).all()
    assert (bits[7:] <= 2.001).all()
    assert budgets(model) == before


def test_phases_may_set_layers_by_pattern(model: Any) -> None:
    expected = thresholds_at(model, {"mlp.*": 6})
    with BitsSchedule(model, [(1, {"mlp.*": 6}), (None, 3)]) as schedule:
        assert torch.equal(thresholds(model), expected)
        schedule.turn(2)
        assert torch.equal(thresholds(model), thresholds_at(model, 3))


def test_a_loop_of_one_s_own_turns_the_schedule(model: Any) -> None:
    with BitsSchedule(model, [(2, 8), (None, 2)]) as schedule:
        found = []
        for token in (1, 2, 3, 4, 1):
            schedule.turn(token)
            found.append(not thresholds(model).any())
    assert found == [True, True, False, False, True]


def test_nothing_is_written_within_a_phase(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    copy = torch._foreach_copy_

    def counted(*tensors: Any) -> None:
        written.append(1)
        copy(*tensors)

    monkeypatch.setattr(torch, "_foreach_copy_", counted)
    with BitsSchedule(model, [(3, 8), (None, 2)]):
        generate(model, 20)
    assert len(written) == 3  # on entering, at the fourth token, on leaving


def test_a_schedule_compiles_nothing_again() -> None:
    model, counter = calibrated(), CompileCounter()
    torch._dynamo.reset()
    compiled = CompileConfig(backend=lambda graph, inputs: counter(graph, inputs), mode=None, fullgraph=True)
    compiled._compile_all_devices = True  # transformers compiles on accelerators alone

    def compiled_generate() -> Tensor:
        return generate(model, 12, cache_implementation="static", compile_config=compiled)

    grinqh.count_reads(model, keep_tokens=64)
    grinqh.set_bits(model, 4)
    compiled_generate()
    frames = counter.frame_count
    assert frames > 0
    grinqh.reset_read_stats(model)
    with (
        torch._dynamo.config.patch(error_on_recompile=True),
        BitsSchedule(model, [(4, 8), (4, 3), (None, 2)]),
    ):
        found = compiled_generate()
    assert counter.frame_count == frames
    bits = grinqh.token_reads(model)
    with BitsSchedule(model, [(4, 8), (4, 3), (None, 2)]):
        assert torch.equal(generate(model, 12), found)
    assert (bits.read_bits[:3] == 8).all()
    assert (bits.read_bits[3:] < 6).all()
    assert len(bits.read_bits) == 11


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([], "phases is empty"),
        ([3.0], r"phases\[0\] is 3.0, must be a pair"),
        ([(16, 4.0)], r"phases\[0\] is for 16 tokens, the last one must be for None"),
        ([(None, 4.0), (None, 2.0)], r"phases\[0\] is for None tokens, must be an integer of at least 1"),
        ([(0, 4.0), (None, 2.0)], r"phases\[0\] is for 0 tokens"),
        ([(2.5, 4.0), (None, 2.0)], r"phases\[0\] is for 2.5 tokens"),
        ([(16, 9), (None, 2.0)], "read_bits is 9"),
        ([(16, 4), (None, {"mpl": 2.0})], "the pattern 'mpl' matches none"),
    ],
)
def test_a_bad_schedule_is_refused_and_the_dial_unchanged(model: Any, phases: Any, message: str) -> None:
    before = thresholds(model)
    with pytest.raises(InputError, match=message):
        BitsSchedule(model, phases)
    assert torch.equal(thresholds(model), before)


def test_a_model_follows_one_schedule_at_a_time(model: Any) -> None:
    schedule = BitsSchedule(model, [(None, 2)])
    with pytest.raises(InputError, match="not in force"):
        schedule.turn(1)
    with schedule:
        with pytest.raises(InputError, match="token is 0"):
            schedule.turn(0)
        with pytest.raises(InputError, match="already follows a BitsSchedule"), BitsSchedule(model, [(None, 4)]):
            pass
    with schedule:
        assert thresholds(model).any()


def test_an_uncalibrated_model_has_no_schedule() -> None:
    with pytest.raises(InputError, match="no dial yet"):
        BitsSchedule(grinqh.quantize_model(tiny_model(), progress=False), [(None, 2)])
