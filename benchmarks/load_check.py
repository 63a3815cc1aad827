"""Whether one build of the op library works under this torch: its CPU ops against float64, and a record of both.

    python benchmarks/load_check.py [--name NAME]    writes benchmarks/results/load_NAME.json

The record names the library by its SHA-256, so that records from several machines can be seen to be of one build.
Exits with 1 where a value is wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, ROOT, stamp, write_json

sys.path.insert(0, str(ROOT / "tests" / "python"))
from layers import FINE, OPS, make_layer

SIZES = ((1, 1), (7, 33), (576, 1536), (4099, 33), (1024, 2048))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
TOLERANCE = 1e-4  # of the sum of the terms' magnitudes, as in tests/python/test_ops.py


def check(n: int, k: int, dtype: torch.dtype) -> dict[str, Any]:
    """One size and dtype: the graded product of three rows against float64."""
    layer = make_layer(n, k, FINE)
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(1)).to(dtype)
    want, magnitude = layer.reference(x)
    y = OPS.gemv(x, *layer.arguments).double()
    allowed = TOLERANCE * magnitude + ROUNDING[dtype] * want.abs() + 1e-7
    error = ((y - want).abs() / allowed).max().item()
    return {"n": n, "k": k, "dtype": str(dtype).removeprefix("torch."), "error_of_allowed": error}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--name", default="here", help="what to call this machine in the record's file name")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record")
    arguments = parser.parse_args()
    (library,) = map(Path, torch.ops.loaded_libraries)
    checks = [check(n, k, dtype) for n, k in SIZES for dtype in DTYPES]
    passed = all(found["error_of_allowed"] <= 1 for found in checks)
    result = {
        "library_sha256": hashlib.sha256(library.read_bytes()).hexdigest(),
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **stamp(),
        "passed": passed,
        "checks": checks,
    }
    write_json(arguments.out / f"load_{arguments.name}.json", result)
    print(json.dumps({key: value for key, value in result.items() if key != "checks"}, indent=1))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
