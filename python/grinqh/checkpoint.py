"""Reads what a safetensors file says it holds, without its data."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import torch

from grinqh.errors import InputError
from grinqh.packing import TensorSpec

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def read_specs(path: str | Path) -> dict[str, TensorSpec]:
    """Type and shape of every tensor in a safetensors file; tensors of other types than grinqh's are left out.

    Raises:
        InputError: the file is not of this format, or ends too early: the first tensor that is cut off is named.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start = 8 + length
        if not 8 < start <= size:
            raise InputError(
                f"{path} is no safetensors file, or is cut off: its header should end at byte {start} of {size}"
            )
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = {
                name: (entry["dtype"], tuple(entry["shape"]), tuple(entry["data_offsets"]))
                for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is no safetensors file: its header is corrupted ({error})") from error
    specs = {}
    for name, (dtype_name, shape, (begin, end)) in sorted(entries.items(), key=lambda entry: entry[1][2]):
        if start + end > size:
            raise InputError(
                f"{path} is cut off: {name} should end at byte {start + end}, the file ends at byte {size}"
            )
        dtype = _DTYPES.get(dtype_name)
        if dtype is None:
            continue
        if prod(shape) * dtype.itemsize != end - begin:
            raise InputError(f"{path} is corrupted: {name} is {dtype} {list(shape)} in {end - begin} bytes")
        specs[name] = TensorSpec(dtype, shape)
    return specs
