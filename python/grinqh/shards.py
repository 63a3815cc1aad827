"""The option for the size of weight files."""

from __future__ import annotations

import re

from grinqh.errors import InputError

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def shard_bytes(size: int | str) -> int:
    """Bytes that a size such as 2_000_000, "2000000", "2MB" or "1.5GB" means; units are of 1000, as transformers' are.

    Raises:
        InputError: no such size, or one below a byte.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([KMGT]B|)", str(size).strip().upper())
    size_in_bytes = int(float(found[1]) * UNITS[found[2]]) if found else 0
    if size_in_bytes < 1:
        raise InputError(f"max_shard_size is {size!r}, must be a number of bytes, or one with KB, MB, GB or TB, as 5GB")
    return size_in_bytes
