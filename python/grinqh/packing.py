"""The tensors of a packed layer: what they are called, how they are made, how they are checked.

A packed layer is a dict of tensors by these names, in a state dict behind the layer's own name (G planes, K inputs,
N outputs, T dial settings; plane_p and the scales are defined in format.h):

    plane_0 .. plane_<G-1>   uint8 [K_p, ceil(N * width_p / 8)]   K_p <= K never grows with p
    block_scale              float16 [K, ceil(N / block)]
    row_scale                float32 [N]
    gain                     float32 [G]
    channel_order            int32 [K]         input feature of each stored channel
    channel_weight           float32 [K]       importance = |x| * channel_weight
    error                    float32 [G + 1]   mean squared weight error at the grades 0..G
    unit_thresholds          float32 [G]       thresholds at dial setting 1; [S, G] for a layer of S > 1 sections
    dial                     float32 [G, T]    part of each plane read at each dial setting; NaN before calibration
    bias                     any float [N]     if the layer has one
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grinqh import grading
from grinqh.config import CODE_BITS, LayerFormat
from grinqh.errors import InputError

PackedTensors = dict[str, Tensor]


class TensorSpec(NamedTuple):
    """Type and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def plane_name(plane: int) -> str:
    """Name of a plane's tensor."""
    return f"plane_{plane}"


def tensor_specs(
    format: LayerFormat, in_features: int, out_features: int, stored: Sequence[int], dial_points: int, sections: int = 1
) -> dict[str, TensorSpec]:
    """What the tensors of a layer without bias must be; `stored` are the K_p, `sections` is S."""
    planes = format.planes
    rows = [(out_features * width + 7) // 8 for width in format.plane_widths]
    blocks = -(-out_features // format.block)
    return {
        **{plane_name(p): TensorSpec(torch.uint8, (stored[p], rows[p])) for p in range(planes)},
        "block_scale": TensorSpec(torch.float16, (in_features, blocks)),
        "row_scale": TensorSpec(torch.float32, (out_features,)),
        "gain": TensorSpec(torch.float32, (planes,)),
        "channel_order": TensorSpec(torch.int32, (in_features,)),
        "channel_weight": TensorSpec(torch.float32, (in_features,)),
        "error": TensorSpec(torch.float32, (planes + 1,)),
        "unit_thresholds": TensorSpec(torch.float32, (planes,) if sections == 1 else (sections, planes)),
        "dial": TensorSpec(torch.float32, (planes, dial_points)),
    }


def check_weight(name: str, weight: Tensor) -> None:
    """Raises InputError, with the tensor's name, unless a tensor can be packed: a finite float matrix with data."""
    if weight.ndim != 2 or weight.numel() == 0:
        raise InputError(f"{name} has shape {list(weight.shape)}, must be a matrix of at least 1 x 1")
    if not weight.is_floating_point():
        raise InputError(f"{name} is {weight.dtype}, must be a floating-point type")
    if weight.is_meta:
        raise InputError(f"{name} is on the meta device: it has no data to quantize")
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise InputError(f"{name} holds {bad} values that are NaN or infinite, must be finite")


def pack_weight(
    weight: Tensor,
    format: LayerFormat,
    *,
    name: str = "weight",
    dial_points: int = 64,
) -> PackedTensors:
    """Quantizes one weight matrix and packs all its planes in full, in the order of features, not yet calibrated.

    Args:
        weight: any float type [N, K].
        format: plane widths and block.
        name: what to call the weight in an error.
        dial_points: T.

    Returns:
        The layer's tensors but for a bias, on the weight's device if that has kernels (CPU, CUDA), else on the CPU.

    Raises:
        InputError: a weight that is no matrix, has no data, or holds NaN or infinity.

    Source: docs/method.md, after arXiv 2606.23419; the steps are the ops quantize and pack of docs/ops.md.
    """
    check_weight(name, weight)
    ops = torch.ops.grinqh
    device = weight.device if weight.is_cuda else "cpu"
    weight = weight.detach().to(device, torch.float32).contiguous()
    planes, in_features = format.planes, weight.shape[1]
    order = torch.arange(in_features, dtype=torch.int32, device=device)
    codes, block_scale, row_scale, gain, channel_error = ops.quantize(weight, order, format.block)
    packed = ops.pack(codes, list(format.plane_widths), [in_features] * planes)
    bits = list(format.grade_bits)
    # On the CPU wherever the layer is, so that its tables are the same everywhere.
    channel_error = channel_error[bits].cpu()
    error = channel_error.double().mean(dim=1).float()
    tensors = {
        **{plane_name(p): plane for p, plane in enumerate(packed)},
        "block_scale": block_scale,
        "row_scale": row_scale,
        "gain": gain[bits[1:]].contiguous(),
        "channel_order": order,
        "channel_weight": grading.column_weight(channel_error),
        "error": error,
        "unit_thresholds": grading.unit_thresholds(bits, error),
        "dial": torch.full((planes, dial_points), torch.nan),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def is_tiled(tensors: Mapping[str, Tensor | None]) -> bool:
    """Whether planes and block scales are in the tile order of the CUDA kernels (cuda/layout.h)."""
    first = tensors[plane_name(0)]
    return first is not None and first.ndim == 4


def to_tiles(tensors: Mapping[str, Tensor], format: LayerFormat) -> PackedTensors:
    """A layer on an NVIDIA GPU with its planes and block scales in tile order; they are copies."""
    return _reordered(torch.ops.grinqh.repack, tensors, format)


def from_tiles(tensors: Mapping[str, Tensor], format: LayerFormat) -> PackedTensors:
    """The inverse of `to_tiles`."""
    return _reordered(torch.ops.grinqh.unpack_tiles, tensors, format)


def _reordered(reorder: Callable[..., Any], tensors: Mapping[str, Tensor], format: LayerFormat) -> PackedTensors:
    names = [plane_name(p) for p in range(format.planes)]
    outputs = tensors["row_scale"].shape[0]
    planes, block_scale = reorder(
        [tensors[name].detach() for name in names],
        tensors["block_scale"].detach(),
        list(format.plane_widths),
        outputs,
        format.block,
    )
    return {**tensors, **dict(zip(names, planes, strict=True)), "block_scale": block_scale}


def check_specs(
    name: str,
    format: LayerFormat,
    in_features: int,
    out_features: int,
    bias: bool,
    dial_points: int,
    found: Mapping[str, TensorSpec],
    sections: int = 1,
) -> None:
    """Raises InputError, naming the tensor, unless the tensors found for a layer are those that the config demands.

    `found` holds the tensors by their names within the layer; nothing but types and shapes is looked at.
    """
    stored = [found[plane_name(p)].shape[0] if _is_matrix(found, plane_name(p)) else 0 for p in range(format.planes)]
    expected = tensor_specs(format, in_features, out_features, stored, dial_points, sections)
    if bias and "bias" in found:
        expected["bias"] = TensorSpec(found["bias"].dtype, (out_features,))
    demanded = [*expected, *(["bias"] if bias else [])]
    for tensor in demanded:
        if tensor not in found:
            raise InputError(f"{name}.{tensor} is missing from the checkpoint")
        if found[tensor] != expected[tensor]:
            want, have = expected[tensor], found[tensor]
            raise InputError(
                f"{name}.{tensor} is {have.dtype} {list(have.shape)}, must be {want.dtype} {list(want.shape)} by the "
                f"model's config (plane_widths {list(format.plane_widths)}, block {format.block})"
            )
    for tensor in found:
        if tensor not in demanded:
            raise InputError(f"{name}.{tensor} is in the checkpoint, but the model's config has no such tensor")
    above = in_features
    for p, channels in enumerate(stored):
        if channels > above:
            raise InputError(f"{name}.{plane_name(p)} holds {channels} channels, must hold at most {above}")
        above = channels


def _is_matrix(found: Mapping[str, TensorSpec], tensor: str) -> bool:
    return tensor in found and len(found[tensor].shape) == 2


def check_values(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises InputError, naming the tensor, for contents that no conversion writes (a corrupted file)."""
    order = tensors["channel_order"]
    if not torch.equal(order.sort().values, torch.arange(len(order), dtype=order.dtype, device=order.device)):
        raise InputError(f"{name}.channel_order is no permutation of 0..{len(order) - 1}")
    for tensor in ("block_scale", "row_scale", "gain", "channel_weight", "error"):
        if not torch.isfinite(tensors[tensor]).all():
            raise InputError(f"{name}.{tensor} holds NaN or infinity, must be finite")
    for tensor in ("channel_weight", "error"):
        if (tensors[tensor] < 0).any():
            raise InputError(f"{name}.{tensor} holds a negative number, must be at least 0")
    check_thresholds(f"{name}.unit_thresholds", tensors["unit_thresholds"])
    dial = tensors["dial"]
    if not (dial.isnan().all() or ((dial >= 0) & (dial <= 1)).all()):
        raise InputError(f"{name}.dial holds numbers outside 0..1")


def check_thresholds(name: str, thresholds: Tensor) -> None:
    """Raises InputError unless thresholds [.., G] are at least 0 and never fall; infinity is allowed."""
    for values in thresholds.reshape(-1, thresholds.shape[-1]).tolist():
        if not all(value >= 0 for value in values):  # NaN compares false
            raise InputError(f"{name} is {values}, must hold numbers of at least 0, none NaN")
        if values != sorted(values):
            raise InputError(f"{name} is {values}, must never fall")


def sort_channels(tensors: PackedTensors, key: Tensor) -> PackedTensors:
    """The layer with its channels by rising key [K], and those first that are stored in more planes."""
    planes = [name for name in tensors if name.startswith("plane_")]
    stored_in = torch.zeros_like(key)
    for name in planes:
        stored_in[: len(tensors[name])] += 1
    by_key = key.argsort(stable=True)
    order = by_key[(-stored_in[by_key]).argsort(stable=True)]
    by_channel = {name: tensors[name][order] for name in ("block_scale", "channel_order", "channel_weight")}
    return tensors | {name: tensors[name][order[: len(tensors[name])]] for name in planes} | by_channel


def keep_channels(tensors: PackedTensors, stored: Sequence[int]) -> PackedTensors:
    """The layer with only the first stored[p] channels of each plane p."""
    planes = {plane_name(p): tensors[plane_name(p)][:channels].clone() for p, channels in enumerate(stored)}
    return tensors | planes


def keep_planes(tensors: PackedTensors, planes: int) -> PackedTensors:
    """The layer with only its first planes; `tensors` need not hold the others."""
    by_plane = {"gain": planes, "dial": planes, "error": planes + 1}
    dropped = {plane_name(p) for p in range(planes, CODE_BITS)}
    kept = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    kept |= {name: kept[name][:count].clone() for name, count in by_plane.items()}
    return kept | {"unit_thresholds": kept["unit_thresholds"][..., :planes].clone()}
