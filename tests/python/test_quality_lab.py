"""The pure parts of benchmarks/quality.py: rivals, continuous weights, tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import quality_models
import quality_report
import quality_rivals as rivals
import torch
from torch import Tensor

BITS, GROUP = 3, 32


@pytest.fixture
def inputs() -> rivals.Inputs:
    """Correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    x *= torch.logspace(-1, 1, 96)
    return rivals.Inputs(x.T @ x / len(x), x.abs().mean(0))


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(40, 96, generator=torch.Generator().manual_seed(1))


def loss(rounded: Tensor, weight: Tensor, inputs: rivals.Inputs) -> float:
    error = rounded - weight
    return float(((error @ inputs.hessian) * error).sum())


@pytest.mark.parametrize("method", rivals.METHODS)
def test_more_bits_lose_less(method: str, weight: Tensor, inputs: rivals.Inputs) -> None:
    losses = [loss(rivals.METHODS[method](weight, inputs, bits, GROUP), weight, inputs) for bits in (2, 3, 4, 8)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-2 * losses[0]


@pytest.mark.parametrize("method", ["RTN", "GPTQ", "HQQ"])
def test_a_group_of_a_row_has_no_more_values_than_its_bits_allow(
    method: str, weight: Tensor, inputs: rivals.Inputs
) -> None:
    rounded = rivals.METHODS[method](weight, inputs, BITS, GROUP)
    for row in rounded.view(-1, GROUP):
        assert len(row.unique()) <= 2**BITS


def test_gptq_loses_less_than_rounding_where_inputs_are_correlated(weight: Tensor) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2048, 24, generator=generator) @ torch.randn(24, 96, generator=generator)
    x += 0.1 * torch.randn(x.shape, generator=generator)
    inputs = rivals.Inputs(x.T @ x / len(x), x.abs().mean(0))
    rounding = loss(rivals.round_to_nearest(weight, inputs, BITS, GROUP), weight, inputs)
    assert loss(rivals.gptq(weight, inputs, BITS, GROUP), weight, inputs) < 0.5 * rounding


def test_awq_loses_less_than_rounding_where_few_inputs_are_large(weight: Tensor) -> None:
    x = torch.randn(2048, 96, generator=torch.Generator().manual_seed(5))
    x[:, ::16] *= 30
    inputs = rivals.Inputs(x.T @ x / len(x), x.abs().mean(0))
    rounding = loss(rivals.round_to_nearest(weight, inputs, BITS, GROUP), weight, inputs)
    assert loss(rivals.awq(weight, inputs, BITS, GROUP), weight, inputs) < 0.5 * rounding


def test_clip_search_never_loses_against_the_full_range(weight: Tensor) -> None:
    groups = weight.view(40, -1, GROUP)
    full = rivals.fit_grid(groups, BITS, clips=(1.0,)).round(groups)
    searched = rivals.fit_grid(groups, BITS).round(groups)
    assert bool(((searched - groups).square().sum(-1) <= (full - groups).square().sum(-1) + 1e-6).all())


@pytest.mark.parametrize("k", [96, 70, 1])
def test_groups_need_not_divide_the_row(k: int, inputs: rivals.Inputs) -> None:
    weight = torch.randn(5, k, generator=torch.Generator().manual_seed(2))
    part = rivals.Inputs(inputs.hessian[:k, :k], inputs.mean_magnitude[:k])
    for method in rivals.METHODS.values():
        rounded = method(weight, part, 8, GROUP)
        assert rounded.shape == weight.shape
        assert float((rounded - weight).norm() / weight.norm()) < 0.02


def test_continuous_weights_move_by_half_a_step_of_their_grid_at_most() -> None:
    generator = torch.Generator().manual_seed(3)
    step = torch.rand(8, 4, 1, generator=generator) + 0.1
    codes = torch.randint(0, 16, (8, 4, 16), generator=generator).float()
    codes[..., :2] = torch.tensor([7.0, 8.0])  # neighbours on the grid, so that the step shows
    weight = (step * codes).view(8, 64)
    moved = (quality_models.continuous(weight, generator) - weight).view(8, 4, 16).abs()
    assert bool((moved <= 0.5001 * step).all())
    assert bool((moved.amax(-1) > 0.3 * step[..., 0]).all())


def test_constant_weights_stay() -> None:
    weight = torch.full((2, 32), 0.25)
    assert torch.equal(quality_models.continuous(weight, torch.Generator().manual_seed(0)), weight)


def test_tables_hold_a_line_for_each_method_and_text() -> None:
    def row(method: str, target: float | None, read: float, stored: float, ratio: float) -> dict[str, Any]:
        return {
            "model": "m", "text": "t", "method": method, "target": target, "read_bits": read, "stored_bits": stored,
            "log_ratio": ratio, "kl": ratio / 2,
        }  # fmt: skip

    rows = [
        row("grinqh", 3.0, 2.98, 8.0, 0.05),
        row("grinqh, fewer stored", 3.0, 2.97, 4.0, 0.2),
        row("RTN, groups of 64", None, 3.0, 3.0, 1.5),
    ]
    table = quality_report.read_table(rows)
    assert "3 read bits" in table
    assert "0.0500, 0.0250" in table
    assert "1.5000, 0.7500" in table
    assert "fewer" not in table
    stored = quality_report.stored_table(rows)
    assert "4 stored bits" in stored
    assert "0.2000, 0.1000" in stored


def test_the_picture_has_a_point_from_the_last_run_that_holds_it() -> None:
    def result(*rows: tuple[str, float, float]) -> dict[str, Any]:
        same = {"model": "m", "text": "t", "target": None, "stored_bits": 8.0}
        return {"rows": [same | {"method": method, "read_bits": bits, "kl": kl} for method, bits, kl in rows]}

    found = quality_report._latest(
        [result(("grinqh", 3.0, 0.2), ("grinqh", 4.0, 0.1), ("RTN", 3.0, 1.0)), result(("grinqh", 3.0, 0.05))]
    )
    assert {(row["method"], row["read_bits"]): row["kl"] for row in found} == {
        ("grinqh", 3.0): 0.05, ("grinqh", 4.0): 0.1, ("RTN", 3.0): 1.0
    }  # fmt: skip


def test_messages_of_a_catalogue_are_whole_sentences(tmp_path: Path) -> None:
    folder = tmp_path / "conf" / "locale" / "de" / "LC_MESSAGES"
    folder.mkdir(parents=True)
    folder.joinpath("django.po").write_text(
        'msgid ""\nmsgstr ""\n"Project-Id-Version: a header that is long enough\\n"\n\n'
        'msgid "German"\nmsgstr "Deutsch"\n\n'
        'msgid "a"\nmsgstr ""\n"Dieser Satz steht in "\n"zwei \\"Zeilen\\"."\n\n'
        'msgid "b"\nmsgid_plural "c"\nmsgstr[0] "Ein Satz in der Einzahl."\nmsgstr[1] "Ein Satz in der Mehrzahl."\n',
        encoding="utf-8",
    )
    wanted = ['Dieser Satz steht in zwei "Zeilen".', "Ein Satz in der Einzahl.", "Ein Satz in der Mehrzahl."]
    assert list(quality_models._messages(tmp_path, "de")) == wanted


def test_chats_are_questions_and_answers_from_the_half_of_the_topics_that_does_not_calibrate() -> None:
    from pydoc_data.topics import topics

    class Template:
        def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
            assert not tokenize
            return " ".join(f"<{message['role']}> {message['content']}" for message in messages)

    chats: Any = quality_models.chat(Template())
    last = sorted(topics)[-1]
    assert chats[-1] == f"<user> What does Python's help say about {last}? <assistant> {topics[last]}"
    assert len(chats) == len(topics) - len(topics) // 2
