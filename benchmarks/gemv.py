"""Times the GEMV on one GPU against dense and 4-bit rivals, in one run, and writes JSON.

    python benchmarks/gemv.py --json benchmarks/results/gemv_h100.json
    python benchmarks/gemv.py --report RESULTS ...   # the tables and pictures of docs/performance.md

Every figure is the median over replays of a CUDA graph of many calls on rotating copies of the weights, which
together exceed the L2 cache several times. Rivals that are not installed are left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import stamp
from gemv_report import write_report
from gemv_rivals import RIVALS
from torch import Tensor

import grinqh  # noqa: F401  registers torch.ops.grinqh

SHAPES = [
    (4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336),
    (8192, 8192), (16384, 16384), (57344, 8192), (8192, 28672),
]  # fmt: skip
BLOCK = 64
DEFAULT_WIDTHS = [2, 2, 2, 2]
MANY_ROWS_BITS = 3.0  # the setting that more than one row is timed at
MOST_GRADED_ROWS = 16  # of the GEMV
LEAST_FULL_ROWS = 8  # from which on products with all stored bits are timed too
WORKING_SET = 400 << 20  # bytes read before a copy of the weights comes again
Rows = Iterator[dict[str, Any]]
ops = torch.ops.grinqh


def median_microseconds(calls: list[Callable[[], object]], replays: int = 9) -> float:
    """Microseconds of one call, all of `calls` captured into one graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # whose work made the tensors
    with torch.cuda.stream(stream):
        calls[0]()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        times = []
        for _ in range(replays + 2):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[2:])


def copies_for(bytes_read: float) -> int:
    """Copies of the weights to rotate through."""
    return max(2, min(32, round(WORKING_SET / bytes_read)))


def rotating(make: Callable[[int], Callable[[], object]], copies: int) -> list[Callable[[], object]]:
    """At least 20 calls that take the copies in turn."""
    each = [make(c) for c in range(copies)]
    return [each[i % copies] for i in range(max(20, copies))]


def activations(kind: str, rows: int, k: int) -> Tensor:
    """Gaussian values, or heavy-tailed ones (Student's t with 3 degrees of freedom)."""
    generator = torch.Generator(device="cuda").manual_seed(k)
    x = torch.randn(rows, k, device="cuda", generator=generator)
    if kind == "heavy":
        x /= (torch.randn(3, rows, k, device="cuda", generator=generator).square().mean(0)).sqrt()
    return x.half()


def thresholds_for(x: Tensor, bits: float, widths: list[int]) -> Tensor:
    """Thresholds in the proportions that an error of 4^-bits gives, scaled so that x reads `bits` on average."""
    down_to = torch.tensor([0, *itertools.accumulate(widths)], device=x.device)
    error = 4.0**-down_to
    shape = ((down_to[1:] - down_to[:-1]) / (error[:-1] - error[1:])).sqrt()
    importance = x.float().abs().flatten()
    low, high = 0.0, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        read = sum(w * (importance >= middle * s).float().mean() for w, s in zip(widths, shape, strict=True))
        low, high = (middle, high) if read > bits else (low, middle)
    return shape * high


class PackedCopies:
    """Copies of a layer of random codes: the bits read and the work done are those of real ones."""

    def __init__(self, n: int, k: int, widths: list[int], copies: int) -> None:
        tiles = (n + 255) // 256
        self.widths = widths
        self.planes = [
            [torch.randint(0, 256, (1, tiles, k, 32 * w), dtype=torch.uint8, device="cuda") for w in widths]
            for _ in range(copies)
        ]
        self.scales = [torch.rand(tiles * 4 + 1, k, device="cuda").half() + 0.5 for _ in range(copies)]
        for scale in self.scales:
            scale[-1] = 1.5
        self.rest = [
            (
                torch.full((n,), 0.01, device="cuda"),
                torch.ones(len(widths), device="cuda"),
                torch.arange(k, dtype=torch.int32, device="cuda"),
                torch.ones(k, device="cuda"),
            )
            for _ in range(copies)
        ]

    def call(self, copy: int, x: Tensor, thresholds: Tensor) -> Callable[[], object]:
        arguments = (x, self.planes[copy], self.scales[copy], *self.rest[copy], thresholds, self.widths, BLOCK)
        return lambda: ops.gemv(*arguments)

    def full(self, copy: int, x: Tensor) -> Callable[[], object]:
        """The product with all stored bits, as `linear` chooses it."""
        thresholds = torch.zeros(len(self.widths), device="cuda")
        arguments = (x, self.planes[copy], self.scales[copy], *self.rest[copy], thresholds, self.widths, BLOCK)
        return lambda: ops.linear(*arguments, max_graded_rows=0)

    def dense(self, copy: int) -> Callable[[], Tensor]:
        """The weights in float16, [K, N]."""
        arguments = (self.planes[copy], self.scales[copy], *self.rest[copy][:3], self.widths, BLOCK, len(self.widths))
        return lambda: ops.dequantize(*arguments, torch.float16)


def bytes_read(x: Tensor, thresholds: Tensor, widths: list[int], n: int) -> tuple[float, float]:
    """Bytes of codes and block scales that rows x need together, and the bits a weight each row reads."""
    down_to = torch.tensor([0, *itertools.accumulate(widths)], device=x.device)
    bits = down_to[torch.bucketize(x.float().abs(), thresholds, right=True)]
    union = bits.amax(0)
    read = float(union.sum()) * n / 8 + float((union > 0).sum()) * n / BLOCK * 2
    return read, float(bits.float().mean())


def own_times(packed: PackedCopies, n: int, k: int, bits: list[float], rows: list[int], kinds: list[str]) -> Rows:
    """Graded rows: each reads what its values ask for."""
    widths = packed.widths
    name = "grinqh" if widths == DEFAULT_WIDTHS else f"grinqh {','.join(map(str, widths))}"
    for kind in kinds:
        for m in rows:
            for target in bits if m == 1 else [MANY_ROWS_BITS]:
                x = activations(kind, m, k)
                thresholds = thresholds_for(x, target, widths)
                read, realised = bytes_read(x, thresholds, widths, n)
                of_copy = [thresholds.clone() for _ in packed.planes]  # a layer has thresholds of its own

                def make(copy: int, x: Tensor = x, of_copy: list[Tensor] = of_copy) -> Callable[[], object]:
                    return packed.call(copy, x, of_copy[copy])

                us = median_microseconds(rotating(make, len(packed.planes)))
                yield {
                    "name": name, "n": n, "k": k, "m": m, "x": kind, "bits": target, "us": us,
                    "read_bits": realised, "bytes": read,
                }  # fmt: skip


def full_times(packed: PackedCopies, n: int, k: int, rows: list[int]) -> Rows:
    """Everything read: products of many rows, as `linear` makes them and with a dense copy of the weights."""
    copies, bits = len(packed.planes), sum(packed.widths)
    same = {"n": n, "k": k, "bits": bits}
    dense_copy = n * k * (bits / 8 + 2 / BLOCK + 2)  # bytes read and written
    us = median_microseconds(rotating(packed.dense, copies))
    yield {"name": "dequantize", "m": 0, "us": us, "bytes": dense_copy} | same
    for m in rows:
        x = activations("gaussian", m, k)

        def full(copy: int, x: Tensor = x) -> Callable[[], object]:
            return packed.full(copy, x)

        us = median_microseconds(rotating(full, copies))
        yield {"name": "in full", "m": m, "us": us} | same

        def copy_and_multiply(copy: int, x: Tensor = x) -> Callable[[], object]:
            dense = packed.dense(copy)
            return lambda: torch.mm(x, dense())

        us = median_microseconds(rotating(copy_and_multiply, copies))
        yield {"name": "dense copy", "m": m, "us": us} | same


def rival_times(n: int, k: int, rows: list[int], wanted: list[str]) -> Rows:
    for name in wanted:
        try:
            rival = RIVALS[name]
            copies = copies_for(n * k * rival.bits / 8)
            for m in (m for m in rows if m <= rival.most_rows):
                x = activations("gaussian", m, k)
                make = rival.prepare(x, n, k, copies)
                us = median_microseconds(rotating(make, copies))
                yield {"name": name, "n": n, "k": k, "m": m, "bits": rival.bits, "us": us}
                del make
        except Exception as problem:  # a rival that is missing or fails must not end the run
            print(f"{name} {n}x{k}: {type(problem).__name__}: {str(problem)[:200]}", file=sys.stderr)
        torch.cuda.empty_cache()


def shape_times(
    n: int, k: int, widths: list[str], bits: list[float], graded: list[int], full: list[int], kinds: list[str],
    rivals: list[str],
) -> Rows:  # fmt: skip
    for of_planes in widths:
        packed = PackedCopies(n, k, [int(w) for w in of_planes.split(",")], copies_for(n * k / 4))
        yield from own_times(packed, n, k, bits, graded, kinds)
        if full and packed.widths == DEFAULT_WIDTHS:
            yield from full_times(packed, n, k, full)
        del packed
    yield from rival_times(n, k, sorted({*graded, *full}), rivals)


def streaming_read() -> float:
    """Terabytes a second at which 512 MiB are read that no cache holds."""
    from streaming_read import read_call  # Triton is needed for this only

    calls = [read_call(torch.randint(0, 100, (1 << 27,), dtype=torch.int32, device="cuda")) for _ in range(4)]
    return calls[0][1] / median_microseconds([call for call, _ in calls]) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--report", type=Path, nargs="+", help="write docs/performance.md from these results only")
    parser.add_argument("--shapes", type=int, nargs="*", default=list(range(len(SHAPES))), help="indices of SHAPES")
    parser.add_argument("--widths", nargs="*", default=["2,2,2,2"], help="plane widths (default: %(default)s)")
    parser.add_argument("--bits", type=float, nargs="*", default=[1, 2, 2.5, 3, 4, 8])
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024])
    parser.add_argument("--x", nargs="*", default=["gaussian"], choices=["gaussian", "heavy"])
    parser.add_argument("--rivals", nargs="*", default=list(RIVALS), choices=list(RIVALS))
    options = parser.parse_args()
    if options.report:
        write_report(options.report, Path(__file__).parent.parent / "docs")
        return

    results: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        **stamp(),
        "read_tb_s": streaming_read(),
        "rows": [],
    }
    torch.cuda.empty_cache()
    graded = [m for m in options.rows if m <= MOST_GRADED_ROWS]
    full = [m for m in options.rows if m >= LEAST_FULL_ROWS]
    for n, k in (SHAPES[i] for i in options.shapes):
        for row in shape_times(n, k, options.widths, options.bits, graded, full, options.x, options.rivals):
            results["rows"].append(row)
            print(" ".join(f"{key}={value:.5g}" if isinstance(value, float) else f"{key}={value}"
                           for key, value in row.items()))  # fmt: skip
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(results, indent=1))
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
