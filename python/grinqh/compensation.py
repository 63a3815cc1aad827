"""Codes that make up for each other's rounding, for layers that keep few bits.

A channel that keeps 4 bits is wrong by what rounding took from it, whatever a token reads. Where the inputs of two
channels move together, the one that is rounded later can take back part of the other's error. Channels are rounded in
their stored order, the most important first. Source: GPTQ (Frantar et al., arXiv 2210.17323), with the correlations of
the inputs shrunk, since those of a short calibration text do not hold on other texts (docs/quality.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as functional
from torch import Tensor

from grinqh import packing
from grinqh.config import CODE_BITS
from grinqh.linear import GrinqhLinear

SHRINKAGE = 0.5  # of the correlation of two inputs
DAMPING = 0.01  # of the mean square, added to each input's: a rare input must not carry much
PANEL = 128  # channels whose errors are carried on together


def compensated(layer: GrinqhLinear, second_moment: Tensor, stored: Sequence[int]) -> packing.PackedTensors:
    """The tensors of a layer that keeps fewer channels in its planes, rounded anew.

    Scales of rows, gains, and what grading goes by stay as they are.

    Args:
        layer: stores all channels in every plane.
        second_moment: float32 [K, K], the mean of x x^T by input feature, on the layer's device.
        stored: for each plane, the channels to keep: K_p.

    Returns:
        The packed layer, in canonical order.
    """
    tensors = layer.tensors
    order = tensors["channel_order"].long()
    bits = torch.zeros(layer.in_features, dtype=torch.long)
    for width, channels in zip(layer.format.plane_widths, stored, strict=True):
        bits[:channels] += width
    gain = dict(zip(accumulate(layer.format.plane_widths), tensors["gain"].tolist(), strict=True))
    rounding = _Rounding(tensors["row_scale"], layer.format.block)
    carry = _carry(second_moment[order][:, order])

    left = layer.dense()[order]  # [K, N], each channel with the errors of those before it
    codes = torch.empty(left.shape, dtype=torch.uint8, device=left.device)
    block_scale = tensors["block_scale"].clone()
    for begin in range(0, layer.in_features, PANEL):
        end = min(begin + PANEL, layer.in_features)
        errors = torch.empty_like(left[begin:end])
        for c in range(begin, end):
            channel_bits = int(bits[c])
            codes[c], block_scale[c], value = rounding.round(left[c], block_scale[c], channel_bits, gain[channel_bits])
            errors[c - begin] = left[c] - value
            left[c + 1 : end].addr_(carry[c, c + 1 : end], errors[c - begin], alpha=-1)
        left[end:].addmm_(carry[begin:end, end:].T, errors, alpha=-1)
    planes = torch.ops.grinqh.pack(codes, list(layer.format.plane_widths), list(stored))
    return {
        **tensors,
        **{packing.plane_name(p): plane for p, plane in enumerate(planes)},
        "block_scale": block_scale,
    }


class _Rounding:
    """Rounds one channel at a time, as the op `quantize` does (cpp/include/grinqh/format.h)."""

    def __init__(self, row_scale: Tensor, block: int) -> None:
        self.row_scale = row_scale
        self.block = block

    def round(self, channel: Tensor, block_scale: Tensor, bits: int, gain: float) -> tuple[Tensor, Tensor, Tensor]:
        """Codes uint8 [N], block scales float16 [blocks], and the weights [N] that the leading bits stand for.

        Blocks keep their scale unless a value has outgrown it: a channel that carries nothing keeps its codes.
        """
        outputs = channel.numel()
        relative = torch.where(self.row_scale > 0, channel.abs() / self.row_scale, 0)
        padded = functional.pad(relative, (0, block_scale.numel() * self.block - outputs))
        block_scale = torch.maximum(block_scale, padded.view(-1, self.block).amax(1).half())
        scale = self.row_scale * block_scale.float().repeat_interleave(self.block)[:outputs]
        middle = 2 ** (CODE_BITS - 1)
        codes = torch.where(scale > 0, (channel / scale * middle).floor() + middle, middle).clamp(0, 2**CODE_BITS - 1)
        leading = (codes / 2 ** (CODE_BITS - bits)).floor()
        return codes.to(torch.uint8), block_scale, scale * ((2 * leading + 1) / 2**bits - 1) * gain


def _carry(second_moment: Tensor) -> Tensor:
    """What part of a channel's error each later channel takes back: [K, K], above the diagonal.

    By least squares on the shrunk second moment; computed on correlations, which are well conditioned.
    """
    square = second_moment.diagonal() + DAMPING * second_moment.diagonal().mean().clamp(min=1e-30)
    root = square.sqrt()
    correlation = (1 - SHRINKAGE) * second_moment / torch.outer(root, root)
    correlation.diagonal().fill_(1)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(correlation))
    factor = torch.linalg.cholesky(inverse, upper=True)
    return factor / factor.diagonal()[:, None] * root[:, None] / root
