"""The methods that the quality lab compares with: each takes weights [N, K] and gives what they become.

They are written from their papers, plainly, and share one integer grid: groups along K, a float16 scale and zero
point for each group, the group's range narrowed where that lowers the squared error (clip search).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6)
SCALE_BITS = 32  # of a group: scale and zero point


@dataclass
class Inputs:
    """What calibration says of a layer's input x [K]."""

    hessian: Tensor  # float32 [K, K], mean of x x^T
    mean_magnitude: Tensor  # float32 [K], mean of |x|


@dataclass
class Grid:
    """w = scale * (code - zero), codes 0..2^bits - 1; one entry for each group of a row."""

    scale: Tensor
    zero: Tensor
    bits: int

    def round(self, values: Tensor) -> Tensor:
        """The nearest points of the grid."""
        codes = (values / self.scale + self.zero).round().clamp(0, 2**self.bits - 1)
        return self.scale * (codes - self.zero)


def fit_grid(groups: Tensor, bits: int, clips: tuple[float, ...] = CLIPS) -> Grid:
    """The grid of groups [..., group]: from least to largest value, narrowed by the best of the clips."""
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    best: Grid | None = None
    best_error = torch.full_like(low, float("inf"))
    for clip in clips:
        scale = ((high - low) * clip / (2**bits - 1)).clamp(min=1e-8).half().float().clamp(min=1e-7)
        grid = Grid(scale, (-low * clip / scale).half().float(), bits)
        error = (grid.round(groups) - groups).square().sum(-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        if best is None:
            best = grid
        else:
            best = Grid(torch.where(better, scale, best.scale), torch.where(better, grid.zero, best.zero), bits)
    assert best is not None
    return best


def _grouped(weight: Tensor, group: int) -> Tensor:
    """[N, K / group, group]; K is padded with zeros."""
    padding = -weight.shape[1] % group
    return torch.nn.functional.pad(weight, (0, padding)).view(weight.shape[0], -1, group)


def _ungrouped(groups: Tensor, k: int) -> Tensor:
    return groups.reshape(groups.shape[0], -1)[:, :k]


def round_to_nearest(weight: Tensor, _: Inputs, bits: int, group: int) -> Tensor:
    """Every weight to the nearest point of its group's grid."""
    groups = _grouped(weight, group)
    return _ungrouped(fit_grid(groups, bits).round(groups), weight.shape[1])


def gptq(weight: Tensor, inputs: Inputs, bits: int, group: int, damping: float = 0.01, block: int = 128) -> Tensor:
    """Columns one after the other, each one's error carried to those that follow (arXiv 2210.17323).

    Takes several layers of one shape at once, [layers, N, K] with Hessians [layers, K, K]: so steps are worth a GPU's.
    """
    k = weight.shape[-1]
    hessian = inputs.hessian.double()
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    hessian = hessian + damping * mean * torch.eye(k, dtype=torch.float64, device=weight.device)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True).float()
    left, result = weight.clone(), torch.empty_like(weight)
    grid = None
    for begin in range(0, k, block):
        end = min(begin + block, k)
        errors = weight.new_empty(*weight.shape[:-1], end - begin)
        for j in range(begin, end):
            if j % group == 0:
                grid = fit_grid(left[..., j : j + group], bits)
            assert grid is not None
            result[..., j] = grid.round(left[..., j : j + 1])[..., 0]
            error = (left[..., j] - result[..., j]) / factor[..., j, j, None]
            errors[..., j - begin] = error
            left[..., j:end] -= error[..., None] * factor[..., None, j, j:end]
        left[..., end:] -= errors @ factor[..., begin:end, end:]
    return result


def awq(weight: Tensor, inputs: Inputs, bits: int, group: int, steps: int = 10) -> Tensor:
    """Channels scaled by a power of their mean magnitude, the power that loses least (arXiv 2306.00978).

    The power is searched without clipping, as in the paper; the grid at the best one is clipped.
    """
    magnitude = inputs.mean_magnitude.clamp(min=1e-6)
    best, best_loss = torch.ones_like(magnitude), float("inf")
    for step in range(steps + 1):
        scale = magnitude ** (step / steps)
        scale = scale / (scale.max() * scale.min()).sqrt()
        groups = _grouped(weight * scale, group)
        rounded = _ungrouped(fit_grid(groups, bits, clips=(1.0,)).round(groups), weight.shape[1]) / scale
        error = rounded - weight
        loss = float(((error @ inputs.hessian) * error).sum())
        if loss < best_loss:
            best, best_loss = scale, loss
    return round_to_nearest(weight * best, inputs, bits, group) / best


def hqq(weight: Tensor, _: Inputs, bits: int, group: int, power: float = 0.7, steps: int = 20) -> Tensor:
    """Zero points by half-quadratic splitting, for an error norm that outliers weigh little in (Badri, Shaji 2023)."""
    groups = _grouped(weight, group)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-8)
    grid = Grid(scale, -low / scale, bits)
    beta, best_error, best = 10.0, float("inf"), grid
    for _step in range(steps):
        rounded = grid.round(groups)
        error = float((groups - rounded).abs().mean())
        if error >= best_error:
            break
        best_error, best = error, grid
        difference = groups - rounded
        shrunk = difference.sign() * (difference.abs() - difference.abs().pow(power - 1) / beta).clamp(min=0)
        shrunk = torch.where(difference == 0, 0, shrunk)
        codes = (groups / grid.scale + grid.zero).round().clamp(0, 2**bits - 1)
        grid = Grid(scale, (codes - (groups - shrunk) / scale).mean(-1, keepdim=True), bits)
        beta *= 1.01
    grid = Grid(best.scale.half().float().clamp(min=1e-7), best.zero.half().float(), bits)
    return _ungrouped(grid.round(groups), weight.shape[1])


METHODS: dict[str, Callable[[Tensor, Inputs, int, int], Tensor]] = {
    "RTN": round_to_nearest,
    "GPTQ": gptq,
    "AWQ": awq,
    "HQQ": hqq,
}
