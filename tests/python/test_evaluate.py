"""Windows of a text, and what perplexity, KL divergence, agreement and realised read bits mean."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_source import make_model, make_tokenizer
from torch import Tensor

import grinqh
from grinqh import evaluate as evaluation
from grinqh.evaluate import Reference, evaluate, token_windows, window_logits

TEXT = "The quick brown fox jumps over the lazy dog. " * 20


@pytest.fixture(scope="module")
def full() -> Any:
    return make_model()


@pytest.fixture(scope="module")
def model() -> Any:
    model = grinqh.quantize_model(make_model(), progress=False)
    grinqh.calibrate(model, TEXT * 3, make_tokenizer(), sequence_length=128, progress=False)
    return model


# ---- windows


def test_windows_are_the_text_cut_without_overlap() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer(TEXT).input_ids
    windows = token_windows(tokenizer, TEXT, window=64)
    assert windows.ids.flatten().tolist() == ids[: len(ids) // 64 * 64]
    assert windows.predicted_tokens == len(ids) // 64 * 63


def test_no_window_holds_tokens_of_two_texts() -> None:
    windows = token_windows(make_tokenizer(), ["a" * 100, "b" * 100], window=64)
    assert [len(set(row)) for row in windows.ids.tolist()] == [1, 1]


def test_windows_begin_with_bos_exactly_where_the_tokenizer_adds_one() -> None:
    with_bos = token_windows(make_tokenizer(adds_bos=True), TEXT, window=32)
    without = token_windows(make_tokenizer(), TEXT, window=32)
    assert with_bos.bos
    assert not without.bos
    assert (with_bos.ids[:, 0] == 0).all()
    assert (with_bos.ids[:, 1:] != 0).all()
    assert (without.ids != 0).all()
    assert "BOS at the start of each" in with_bos.describe()


def test_a_text_shorter_than_a_window_is_one_window() -> None:
    assert token_windows(make_tokenizer(), "abcdef", window=64).ids.shape == (1, 6)


def test_a_limit_takes_windows_from_all_over_the_text() -> None:
    text = "".join(chr(ord("a") + i) * 16 for i in range(20))
    windows = token_windows(make_tokenizer(), text, window=16, limit=4)
    letters = [make_tokenizer().decode(row[:1]) for row in windows.ids]
    assert letters == ["a", "f", "k", "p"]


@pytest.mark.parametrize(
    ("options", "words"), [({"window": 1}, "window is 1"), ({"limit": 0}, "0"), ({"text": "a"}, "shorter than 2")]
)
def test_windows_that_predict_nothing_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(grinqh.InputError, match=words):
        token_windows(make_tokenizer(), **{"text": TEXT, "window": 32, **options})


# ---- scores


def reference_scores(ours: Tensor, theirs: Tensor, ids: Tensor) -> tuple[float, float, float]:
    """Mean loss, KL divergence and top-1 agreement in float64, written out."""
    p, q = theirs[:-1].double().softmax(-1), ours[:-1].double().softmax(-1)
    loss = -q[torch.arange(len(ids) - 1), ids[1:]].log().mean()
    kl = (p * (p.log() - q.log())).sum(-1).mean()
    top1 = (p.argmax(-1) == q.argmax(-1)).double().mean()
    return float(loss), float(kl), float(top1)


def test_scores_are_their_definitions(model: Any, full: Any) -> None:
    windows = token_windows(make_tokenizer(), TEXT, window=64, limit=1)
    (score,) = evaluate(model, windows, [3.0], reference=Reference(lambda: full), progress=False)
    with grinqh.graded(model):
        ours = window_logits(model, windows.ids[0])
    theirs = window_logits(full, windows.ids[0])
    loss, kl, top1 = reference_scores(ours, theirs, windows.ids[0])
    full_loss, _, _ = reference_scores(theirs, theirs, windows.ids[0])
    assert score.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert score.reference_perplexity == pytest.approx(math.exp(full_loss), rel=1e-5)
    assert score.log_ratio == pytest.approx(loss - full_loss, abs=1e-5)
    assert score.kl == pytest.approx(kl, rel=1e-3, abs=1e-6)
    assert score.top1 == pytest.approx(top1)
    assert score.tokens == 63


def test_a_model_does_not_diverge_from_itself(full: Any) -> None:
    model = grinqh.quantize_model(make_model(), progress=False)
    windows = token_windows(make_tokenizer(), TEXT, window=64)
    (score,) = evaluate(model, windows, reference=Reference(lambda: model), grade_rows=False, progress=False)
    assert score.kl == pytest.approx(0, abs=1e-6)
    assert score.top1 == 1
    assert score.log_ratio == pytest.approx(0, abs=1e-6)


def test_scores_do_not_depend_on_how_many_rows_are_compared_at_once(
    model: Any, full: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = token_windows(make_tokenizer(), TEXT, window=64, limit=2)
    before = evaluate(model, windows, [2.0], reference=Reference(lambda: full), progress=False)[0].as_dict()
    monkeypatch.setattr(evaluation, "ROWS_AT_ONCE", 5)
    after = evaluate(model, windows, [2.0], reference=Reference(lambda: full), progress=False)[0].as_dict()
    assert after == pytest.approx(before, rel=1e-5, abs=1e-5)


def test_every_row_of_a_window_is_graded_on_its_own(model: Any) -> None:
    windows = token_windows(make_tokenizer(), TEXT, window=128, limit=2)
    bits = [8.0, 4.0, 2.0]
    scores = evaluate(model, windows, bits, progress=False)
    assert scores[0].read_bits == pytest.approx(8)
    assert [score.read_bits for score in scores] == pytest.approx(bits, rel=0.2)  # another sample of the same text
    grinqh.set_bits(model, 2.0)
    with grinqh.graded(model):
        logits = window_logits(model, windows.ids[0])
        rows = torch.cat([window_logits(model, windows.ids[0][:n])[-1:] for n in (1, 40, 128)])
    assert torch.allclose(logits[[0, 39, 127]], rows, atol=1e-4)


def test_an_exact_budget_stays_one_at_every_setting(model: Any) -> None:
    windows = token_windows(make_tokenizer(), TEXT, window=64, limit=1)
    grinqh.set_bits(model, 3.0, exact_budget=True)
    exact, _ = evaluate(model, windows, [2.0, 4.0], progress=False)
    assert all(layer.budget is not None for layer in grinqh.packed_layers(model).values())
    grinqh.set_bits(model, 3.0)
    mean, _ = evaluate(model, windows, [2.0, 4.0], progress=False)
    assert exact.read_bits is not None
    assert exact.read_bits <= 2
    assert exact.read_bits != mean.read_bits


def test_windows_read_in_full_count_no_read_bits(model: Any) -> None:
    windows = token_windows(make_tokenizer(), TEXT, window=64, limit=1)
    low, high = evaluate(model, windows, [1.0, 8.0], grade_rows=False, progress=False)
    assert low.read_bits is None
    assert low.perplexity == high.perplexity


def test_without_a_reference_nothing_is_compared(model: Any) -> None:
    (score,) = evaluate(model, token_windows(make_tokenizer(), TEXT, window=64, limit=1), progress=False)
    assert (score.target, score.reference_perplexity, score.log_ratio, score.kl, score.top1) == (None,) * 5


def test_a_cached_reference_is_computed_once_for_each_model(full: Any, tmp_path: Path) -> None:
    loads = []

    def load() -> Any:
        loads.append(1)
        return full

    windows = token_windows(make_tokenizer(), TEXT, window=64, limit=2)
    fresh = [Reference(load, tmp_path, "one").log_probabilities(ids) for ids in windows.ids]
    again = [Reference(load, tmp_path, "one").log_probabilities(ids) for ids in windows.ids]
    assert len(loads) == 2  # one for each window of the first round
    assert all(torch.equal(a, b) for a, b in zip(fresh, again, strict=True))
    exact = window_logits(full, windows.ids[0]).log_softmax(-1)
    assert torch.allclose(again[0].float(), exact, atol=4e-3)
    Reference(load, tmp_path, "another").log_probabilities(windows.ids[0])
    assert len(loads) == 3
