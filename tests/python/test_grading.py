"""The arithmetic of grading, against brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grinqh import grading

BITS = (0, 2, 3, 4, 6, 8)


@settings(deadline=None, max_examples=50)
@given(
    errors=st.lists(st.floats(1e-6, 1.0), min_size=6, max_size=6),
    importance=st.floats(1e-3, 1e3),
    tau=st.floats(1e-2, 1e2),
    sensitivity=st.floats(1e-3, 1e3),
)
def test_thresholds_choose_the_cheapest_grade(
    errors: list[float], importance: float, tau: float, sensitivity: float
) -> None:
    units = grading.unit_thresholds(BITS, torch.tensor(errors), sensitivity)
    grade = int((importance >= tau * units.double()).sum())

    def cost(g: int) -> float:
        return sensitivity * importance**2 * errors[g] + tau**2 * BITS[g]

    assert cost(grade) <= min(map(cost, range(6))) * (1 + 1e-5)


def test_thresholds_never_fall_and_are_infinite_where_nothing_is_gained() -> None:
    units = grading.unit_thresholds(BITS, torch.tensor([1.0, 0.5, 0.5, 0.1, 0.1, 0.1]))
    assert units.tolist() == sorted(units.tolist())
    assert torch.isinf(units).tolist() == [False, False, False, True, True]
    assert units[1] == units[2]


def test_a_layer_of_zeros_is_never_read() -> None:
    error = torch.zeros(6, 4)
    assert torch.isinf(grading.unit_thresholds(BITS, error.mean(1))).all()
    assert torch.equal(grading.column_weight(error), torch.ones(4))


def test_column_weights_are_the_root_of_the_columns_share_of_the_error() -> None:
    share = torch.tensor([0.0, 0.25, 1.75, 2.0])
    error = torch.tensor([8.0, 2.0, 0.5])[:, None] * share
    torch.testing.assert_close(grading.column_weight(error), share.sqrt())


def test_a_histogram_tells_the_share_of_values_that_reach_a_threshold() -> None:
    values = torch.rand(20000, generator=torch.Generator().manual_seed(0)).exp() - 1
    histogram = grading.importance_histogram(values)
    thresholds = torch.tensor([[1e-6, 0.01, 0.3], [1.0, 1.7, 2.0]])
    exact = (values >= thresholds[..., None]).float().mean(-1)
    torch.testing.assert_close(grading.share_at_least(histogram, thresholds), exact, atol=2e-3, rtol=0)


def test_zeros_reach_no_threshold_and_infinity_is_reached_by_none() -> None:
    histogram = grading.importance_histogram(torch.zeros(7))
    assert grading.share_at_least(histogram, torch.tensor([1e-30, torch.inf])).tolist() == [0, 0]
    histogram = grading.importance_histogram(torch.ones(7))
    assert grading.share_at_least(histogram, torch.tensor([0.5, torch.inf])).tolist() == [1, 0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_invalid_importances_are_noticed(bad: float) -> None:
    assert grading.has_invalid(grading.importance_histogram(torch.tensor([1.0, bad])))
    assert not grading.has_invalid(grading.importance_histogram(torch.tensor([1.0, 3e38])))
