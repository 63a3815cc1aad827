"""Parts of a packed layer for several processes: cut out of its tensors, with no weight packed again.

Along the outputs a part is a range of columns of every plane. Along the inputs it is the stored channels whose input
feature lies in a range, in their order: every channel keeps its codes, its scales and, as thresholds are the whole
layer's, its grade.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, gcd, lcm

import torch
from torch import Tensor

from grinqh.config import LayerFormat
from grinqh.errors import InputError
from grinqh.packing import PackedTensors, plane_name

Range = tuple[int, int]  # first, and one past the last


def shard_outputs(tensors: Mapping[str, Tensor], format: LayerFormat, rank: int, world: int) -> PackedTensors:
    """The part of a layer that computes a range of its outputs; the parts of all ranks, one after the other, are all.

    Args:
        tensors: the packed layer (see `grinqh.packing`), in canonical order.
        format: plane widths and block, of the part as well.
        rank: which part, from 0.
        world: number of parts; they are as equal as whole blocks of outputs allow, the last one may be shorter.

    Raises:
        InputError: a rank that is no part, or more parts than blocks of outputs.
    """
    outputs = tensors["row_scale"].shape[0]
    return take_outputs(tensors, format, [cut("outputs", outputs, format.block, rank, world)])


def shard_inputs(tensors: Mapping[str, Tensor], format: LayerFormat, rank: int, world: int) -> PackedTensors:
    """The part of a layer that reads a range of its inputs; the sum over all ranks' outputs is the layer's.

    Ranges are cut as `shard_outputs` cuts the outputs of a layer with the same block: one layer's output is the
    input of the other. The bias is with rank 0 alone.

    Args:
        tensors: the packed layer (see `grinqh.packing`), in canonical order.
        format: plane widths and block, of the part as well.
        rank: which part, from 0.
        world: number of parts.

    Raises:
        InputError: a rank that is no part, or more parts than blocks of inputs.
    """
    inputs = tensors["channel_order"].shape[0]
    return take_inputs(tensors, format, cut("inputs", inputs, format.block, rank, world), bias=rank == 0)


def cut(what: str, size: int, step: int, rank: int, world: int) -> Range:
    """The rank's range of `size` things that are cut only at multiples of `step`; `what` names them in errors.

    Raises:
        InputError: a rank that is not in 0..world - 1, or a world that leaves a rank with nothing.
    """
    if world < 1 or not 0 <= rank < world:
        raise InputError(f"rank is {rank} and world is {world}, must be 0 <= rank < world")
    pieces = ceil(size / step)
    if world > pieces:
        raise InputError(
            f"world is {world}, must be at most {pieces}: {size} {what} are cut at multiples of {step} only"
        )
    return rank * pieces // world * step, min(size, (rank + 1) * pieces // world * step)


def common_step(units: Sequence[int], blocks: Sequence[int]) -> int:
    """How many parts stay together so that no block of any layer, with `units` outputs for a part, is divided."""
    return lcm(*(block // gcd(block, unit) for unit, block in zip(units, blocks, strict=True)))


def take_outputs(tensors: Mapping[str, Tensor], format: LayerFormat, ranges: Sequence[Range]) -> PackedTensors:
    """The layer with only the outputs of some ranges, one after the other.

    Raises:
        InputError: a range that is empty, outside of the layer or begins within a block, or one that is followed by
            another and ends within a block.
    """
    outputs = tensors["row_scale"].shape[0]
    for index, (first, end) in enumerate(ranges):
        if not 0 <= first < end <= outputs:
            raise InputError(f"outputs {first}..{end} are no range of the layer's {outputs}")
        if first % format.block:
            raise InputError(f"outputs begin at {first}, must begin at a multiple of the block, {format.block}")
        last = index == len(ranges) - 1
        if end % format.block and not (last and end == outputs):
            raise InputError(f"outputs end at {end}, must end at a multiple of the block, {format.block}")

    def columns(tensor: Tensor, codes: int, bits: int = 1) -> Tensor:
        """Columns that hold so many codes, or so many bits of a code, each."""
        each = [tensor[..., first * bits // codes : -(-end * bits // codes)] for first, end in ranges]
        return torch.cat(each, dim=-1)

    taken = {plane_name(p): columns(tensors[plane_name(p)], 8, width) for p, width in enumerate(format.plane_widths)}
    taken |= {name: columns(tensors[name], 1) for name in ("row_scale", "bias") if name in tensors}
    return {**tensors, **taken, "block_scale": columns(tensors["block_scale"], format.block)}


def take_inputs(tensors: Mapping[str, Tensor], format: LayerFormat, inputs: Range, *, bias: bool) -> PackedTensors:
    """The layer with only the channels of a range of input features, which are then counted from 0.

    Raises:
        InputError: a range that is empty or outside of the layer.
    """
    (first, end), order = inputs, tensors["channel_order"]
    if not 0 <= first < end <= len(order):
        raise InputError(f"inputs {first}..{end} are no range of the layer's {len(order)}")
    kept = ((order >= first) & (order < end)).nonzero().flatten()
    taken = {name: tensors[name][kept] for name in ("block_scale", "channel_weight")}
    for p in range(format.planes):
        plane = tensors[plane_name(p)]
        taken[plane_name(p)] = plane[kept[kept < len(plane)]]
    part = {**tensors, **taken, "channel_order": order[kept] - first}
    if not bias:
        part.pop("bias", None)
    return part
