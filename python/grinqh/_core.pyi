"""The core for NumPy arrays, without torch; the docstrings are the module's own."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

# An array that speaks DLPack or the buffer protocol, C-contiguous, on the CPU.
_Array: TypeAlias = Any

format_version: int

def sort_channels(weight: _Array, mean_square: _Array | None = None) -> NDArray[np.int32]: ...
def quantize(
    weight: _Array, channel_order: _Array, block: int = 64
) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]: ...
def pack(codes: _Array, widths: Sequence[int], channels: Sequence[int]) -> list[NDArray[np.uint8]]: ...
def unpack(planes: Sequence[_Array], widths: Sequence[int], n: int, k: int) -> NDArray[np.uint8]: ...
def grade(
    x: _Array,
    planes: Sequence[_Array],
    channel_order: _Array,
    channel_weight: _Array,
    thresholds: _Array,
    widths: Sequence[int],
    budget: float | None = None,
) -> NDArray[np.uint8]: ...
def dequantize(
    planes: Sequence[_Array],
    block_scale: _Array,
    row_scale: _Array,
    gain: _Array,
    channel_order: _Array,
    widths: Sequence[int],
    block: int,
    grade: int,
    dtype: str = "float32",
) -> NDArray[Any]: ...
def gemv(
    x: _Array,
    planes: Sequence[_Array],
    block_scale: _Array,
    row_scale: _Array,
    gain: _Array,
    channel_order: _Array,
    channel_weight: _Array,
    thresholds: _Array,
    widths: Sequence[int],
    block: int,
    bias: _Array | None = None,
    budget: float | None = None,
    isa: str | None = None,
) -> NDArray[Any]: ...
def gemv_read_bits(
    x: _Array,
    planes: Sequence[_Array],
    block_scale: _Array,
    row_scale: _Array,
    gain: _Array,
    channel_order: _Array,
    channel_weight: _Array,
    thresholds: _Array,
    widths: Sequence[int],
    block: int,
    bias: _Array | None = None,
    budget: float | None = None,
    isa: str | None = None,
) -> tuple[NDArray[Any], NDArray[np.float32]]: ...
def available_isas() -> list[str]: ...
def current_isa() -> str: ...
def num_threads() -> int: ...
def set_num_threads(count: int) -> None: ...
