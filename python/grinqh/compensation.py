"""Codes that make up for each other's rounding, for layers that keep few bits.

A channel that keeps 4 bits is wrong by what rounding took from it, whatever a token reads. Where the inputs of two
channels move together, the one that is rounded later can take back part of the other's error. Channels are rounded in
their stored order, the most important first. Source: GPTQ (Frantar et al., arXiv 2210.17323), with the correlations of
the inputs shrunk, since those of a short calibration text do not hold on other texts (docs/quality.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor

from grinqh import packing
from grinqh.config import CODE_BITS, LayerFormat
from grinqh.linear import GrinqhLinear

SHRINKAGE = 0.5  # of the correlation of two inputs
DAMPING = 0.01  # of the mean square, added to each input's: a rare input must not carry much
PANEL = 64  # channels whose errors are carried on together
LEVELS = 2**CODE_BITS


class Task(NamedTuple):
    """A layer to round anew."""

    layer: GrinqhLinear  # stores all channels in every plane
    second_moment: Tensor  # float32 [K, K], the mean of x x^T by input feature, on the layer's device
    stored: Sequence[int]  # for each plane, the channels to keep: K_p

    @property
    def shape(self) -> tuple[int, int, LayerFormat]:
        """Layers that agree in this can be rounded together."""
        return self.layer.in_features, self.layer.out_features, self.layer.format


def compensated(tasks: Sequence[Task]) -> list[packing.PackedTensors]:
    """The packed tensors, in canonical order, of layers that keep fewer channels in their planes.

    Row scales, gains, and what grading goes by stay as they are. Block scales stay unless a weight outgrows them: with
    inputs that do not move together every code stays.

    Args:
        tasks: all of one shape. They share every step, since a step by itself is too small for a GPU.
    """
    ((inputs, outputs, format),) = {task.shape for task in tasks}
    before = [task.layer.tensors for task in tasks]
    # Weights by layer, channel in stored order, block and output, over their row's scale.
    left = torch.stack([_relative_weights(task.layer) for task in tasks])
    carry = torch.stack([_carry(task) for task in tasks])
    block_scale = torch.stack([tensors["block_scale"] for tensors in before])
    step, gain = (torch.stack(parts)[..., None, None] for parts in zip(*map(_grades, tasks), strict=True))

    codes = torch.empty(left.shape, dtype=torch.uint8, device=left.device)
    for begin in range(0, inputs, PANEL):
        end = min(begin + PANEL, inputs)
        errors = torch.empty_like(left[:, begin:end])
        for c in range(begin, end):
            channel = left[:, c]
            block_scale[:, c] = torch.maximum(block_scale[:, c], channel.abs().amax(-1).half())
            scale = block_scale[:, c, :, None].float()
            # As the op `quantize` rounds (cpp/include/grinqh/format.h); a scale of 0 is that of zeros alone.
            code = (channel / scale.clamp(min=1e-30) * (LEVELS // 2)).floor_().add_(LEVELS // 2).clamp_(0, LEVELS - 1)
            codes[:, c] = code
            middle = (code.div_(step[:, c]).floor_() + 0.5) * (step[:, c] * 2 / LEVELS) - 1
            errors[:, c - begin] = channel - middle * (scale * gain[:, c])
            later = carry[:, c, c + 1 : end, None, None]
            left[:, c + 1 : end].addcmul_(later, errors[:, c - begin, None], value=-1)
        later = carry[:, begin:end, end:].transpose(1, 2)
        left[:, end:].flatten(2).baddbmm_(later, errors.flatten(2), alpha=-1)

    rounded = []
    for task, tensors, code, scale in zip(tasks, before, codes, block_scale, strict=True):
        whole = code.flatten(1)[:, :outputs].contiguous()
        planes = torch.ops.grinqh.pack(whole, list(format.plane_widths), list(task.stored))
        names = [packing.plane_name(p) for p in range(format.planes)]
        rounded.append({**tensors, **dict(zip(names, planes, strict=True)), "block_scale": scale.clone()})
    return rounded


def _relative_weights(layer: GrinqhLinear) -> Tensor:
    """[K, blocks, block] by stored channel; the last block is filled up with zeros."""
    row_scale, block = layer.row_scale, layer.format.block
    weights = torch.where(row_scale > 0, layer.dense() / row_scale, 0)[layer.channel_order.long()]
    return functional.pad(weights, (0, -layer.out_features % block)).view(layer.in_features, -1, block)


def _grades(task: Task) -> tuple[Tensor, Tensor]:
    """Of each channel's last stored grade: how many codes share a level, and the gain; float32 [K] both."""
    widths, gains = task.layer.format.plane_widths, task.layer.gain.tolist()
    step, gain = torch.empty(task.layer.in_features), torch.empty(task.layer.in_features)
    for bits, grade_gain, channels in zip(accumulate(widths), gains, task.stored, strict=True):
        step[:channels], gain[:channels] = 2.0 ** (CODE_BITS - bits), grade_gain
    return step.to(task.layer.gain.device), gain.to(task.layer.gain.device)


def _carry(task: Task) -> Tensor:
    """What part of a channel's error each later channel takes back: [K, K] in stored order, above the diagonal.

    By least squares on the shrunk second moment; computed on correlations, which are well conditioned.
    """
    order = task.layer.channel_order.long()
    moment = task.second_moment[order][:, order]
    root = (moment.diagonal() + DAMPING * moment.diagonal().mean().clamp(min=1e-30)).sqrt()
    correlation = (1 - SHRINKAGE) * moment / torch.outer(root, root)
    correlation.diagonal().fill_(1)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(correlation))
    factor = torch.linalg.cholesky(inverse, upper=True)
    return factor / factor.diagonal()[:, None] * root[:, None] / root
