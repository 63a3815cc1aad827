"""Gives memory that is no longer needed back to the system at once: Linux and the GNU C library, elsewhere nothing.

Without this a conversion takes about as much memory as the source has, however little of it is in use. transformers
maps weight files, and pages that were read stay in a process's resident memory as long as a file is mapped. And the
holes that a weight's temporaries leave in the heap are too scattered for the C library to return by itself.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

MAPPINGS = Path("/proc/self/maps")
M_MMAP_THRESHOLD, M_MMAP_MAX = -3, -4  # malloc.h


def release_file_pages(tensor: Tensor) -> None:
    """Drops the pages of a tensor that lies in a mapped file; they are read again if anybody asks for them.

    Of other tensors nothing is dropped. Nobody may have written to the tensor: that would be lost.
    """
    advise = _c_function("madvise", ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if advise is None or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    if start < end and _in_mapped_file(start, end):
        advise(start, end - start, mmap.MADV_DONTNEED)


def trim_heap() -> None:
    """Returns the free pages of the heap."""
    trim = _c_function("malloc_trim", ctypes.c_size_t)
    if trim is not None:
        trim(0)


def map_large_blocks() -> None:
    """Has blocks of a megabyte or more lie outside the heap for the rest of the process: no holes are left at all."""
    set_option = _c_function("mallopt", ctypes.c_int, ctypes.c_int)
    if set_option is not None:
        set_option(M_MMAP_THRESHOLD, 1 << 20)
        set_option(M_MMAP_MAX, 1 << 14)  # the system's own limit for all mappings is about four times that


@cache
def _c_function(name: str, *arguments: Any) -> Callable[..., int] | None:
    function = getattr(ctypes.CDLL(None), name, None) if MAPPINGS.exists() else None
    if function is not None:
        function.argtypes = arguments
    return function


def _in_mapped_file(start: int, end: int) -> bool:
    """Whether all of an address range belongs to one mapping of a file. To drop any other memory would destroy it."""
    for line in MAPPINGS.read_text(encoding="utf-8", errors="replace").splitlines():
        addresses, _, _, _, inode, *_ = line.split(maxsplit=5)
        first, last = (int(address, 16) for address in addresses.split("-"))
        if first <= start and end <= last:
            return inode != "0"
    return False
