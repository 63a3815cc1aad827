"""The arithmetic of grading: which channels of a layer matter, and how many bits a setting of the dial reads.

A channel's importance for a token is |x| times the channel's weight, and its grade the number of thresholds at or
below it. Thresholds are `tau * unit_thresholds`: tau is the dial, one number for a model; unit thresholds belong to a
layer and hold everything that sets it apart from the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# A histogram's bins are the leading bits of a non-negative float32: 32 bins for each power of two.
_BIN_SHIFT = 18
_FIRST_INFINITE_BIN = 0x7F800000 >> _BIN_SHIFT
_BINS = 0x80000000 >> _BIN_SHIFT


def column_weight(channel_error: Tensor) -> Tensor:
    """Weights that say how a channel's quantization error compares with the layer's.

    Args:
        channel_error: float32 [G + 1, K], mean squared weight error of each channel at the grades 0..G.

    Returns:
        float32 [K], root of the channel's error over the mean error, every grade counting alike; all ones where there
        is no error at all.
    """
    error = channel_error.double()
    mean = error.mean(dim=1, keepdim=True)
    share = (error / mean)[mean.squeeze(1) > 0]
    if share.numel() == 0:
        return torch.ones_like(channel_error[0])
    return share.mean(dim=0).sqrt().float()


def unit_thresholds(grade_bits: Sequence[int], error: Tensor, sensitivity: float = 1.0) -> Tensor:
    """Thresholds of a layer at dial setting 1.

    Minimising `sensitivity * importance^2 * error[g] + tau^2 * bits[g]` over the grades g compares the importance with
    `tau * sqrt((bits[g] - bits[g-1]) / (error[g-1] - error[g]) / sensitivity)`. Grades that no importance would choose
    (above the lower convex hull of error over bits) share one threshold with the grade above them.

    Args:
        grade_bits: bits read at the grades 0..G.
        error: float32 [G + 1], mean squared weight error at the grades 0..G.
        sensitivity: mean squared gradient of the loss with respect to the layer's outputs.

    Returns:
        float32 [G], never falling; infinity where a grade gains nothing.
    """
    errors = error.tolist()
    segments: list[tuple[float, float, int]] = []  # error removed, bits spent, grades covered
    for below, above, b0, b1 in zip(errors, errors[1:], grade_bits, grade_bits[1:], strict=False):
        segment = (below - above, float(b1 - b0), 1)
        while segments and segment[0] * segments[-1][1] > segments[-1][0] * segment[1]:
            previous = segments.pop()
            segment = (previous[0] + segment[0], previous[1] + segment[1], previous[2] + segment[2])
        segments.append(segment)
    units: list[float] = []
    for gain, bits, grades in segments:
        units += [(bits / gain / sensitivity) ** 0.5 if gain > 0 else float("inf")] * grades
    return torch.tensor(units, dtype=torch.float32)


def importance_histogram(importance: Tensor) -> Tensor:
    """Counts the values of a float32 tensor of finite numbers >= 0, as int64 [bins]."""
    bins = importance.reshape(-1).view(torch.int32) >> _BIN_SHIFT
    return torch.bincount(bins, minlength=_BINS)


def has_invalid(histogram: Tensor) -> bool:
    """Whether NaN or infinity was among the values counted."""
    return bool(histogram[_FIRST_INFINITE_BIN:].any())


def share_at_least(histogram: Tensor, thresholds: Tensor) -> Tensor:
    """The part of a histogram's values that reaches each threshold (float32, any shape), linear within a bin."""
    counts = histogram.double()
    above = counts.sum() - counts.cumsum(0)  # values in higher bins
    thresholds = thresholds.clamp(max=2.0**126)  # infinity, and whatever else no importance reaches
    bins = thresholds.view(torch.int32) >> _BIN_SHIFT
    low, high = ((bins + i) << _BIN_SHIFT for i in (0, 1))
    low, high = low.view(torch.float32).double(), high.view(torch.float32).double()
    within = (high - thresholds.double()) / (high - low)
    return ((above[bins] + counts[bins] * within) / counts.sum().clamp(min=1)).float()


def read_shares(histograms: Sequence[Tensor], stored: Sequence[float], units: Tensor, tau: Tensor) -> Tensor:
    """The dial of a layer: how much of each plane is read at each setting.

    Args:
        histograms: for each plane, the importances of the channels stored in it.
        stored: for each plane, the part of all channels that is stored in it.
        units: float32 [G], unit thresholds.
        tau: float32 [T], settings of the dial.

    Returns:
        float32 [G, T], the part of the layer's channels whose bits are read from each plane.
    """
    thresholds = units[:, None] * tau
    return torch.stack([part * share_at_least(h, t) for h, part, t in zip(histograms, stored, thresholds, strict=True)])
