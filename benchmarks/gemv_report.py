"""docs/performance.md and its pictures from the results of gemv.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

OWN = ("grinqh", "in full", "dense copy", "dequantize")  # rows that are not rivals
BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"


def _shapes(rows: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return list(dict.fromkeys((row["n"], row["k"]) for row in rows))


def _time(
    rows: list[dict[str, Any]], name: str, n: int, k: int, m: int, bits: float | None = None
) -> dict[str, Any] | None:
    for row in rows:
        same = (row["name"], row["n"], row["k"], row["m"]) == (name, n, k, m) and row.get("x", "gaussian") == "gaussian"
        if same and (bits is None or row["bits"] == bits):
            return row
    return None


def one_row_table(results: dict[str, Any]) -> str:
    """Microseconds at one row: ours by read bits, then the rivals."""
    rows = results["rows"]
    bits = sorted({row["bits"] for row in rows if row["name"] == "grinqh" and row["m"] == 1})
    rivals = list(dict.fromkeys(row["name"] for row in rows if row["name"] not in OWN))
    head = ["N x K", *(f"{b:g} bits" for b in bits), *rivals]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for n, k in _shapes(rows):
        cells = [f"{n} x {k}"]
        dense = _time(rows, "cublas", n, k, 1)
        for b in bits:
            own = _time(rows, "grinqh", n, k, 1, b)
            share = own["bytes"] / own["us"] / 1e6 / results["read_tb_s"] if own else 0
            ratio = f", {dense['us'] / own['us']:.1f}x" if own and dense else ""
            cells.append(f"{own['us']:.1f} ({share:.0%}{ratio})" if own else "")
        for rival in rivals:
            other = _time(rows, rival, n, k, 1)
            cells.append(f"{other['us']:.1f}" if other else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def many_rows_table(results: dict[str, Any]) -> str:
    """Microseconds at 3 read bits by number of rows, and the ratio to the dense product."""
    rows = results["rows"]
    counts = sorted({row["m"] for row in rows if row["name"] == "grinqh"})
    lines = ["| N x K | " + " | ".join(f"M = {m}" for m in counts) + " |", "|---" * (len(counts) + 1) + "|"]
    for n, k in _shapes(rows):
        cells = [f"{n} x {k}"]
        for m in counts:
            own, dense = _time(rows, "grinqh", n, k, m, 3), _time(rows, "cublas", n, k, m)
            cells.append(f"{own['us']:.1f} ({dense['us'] / own['us']:.1f}x)" if own and dense else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def full_table(results: dict[str, Any]) -> str:
    """Microseconds with everything read: as `linear` does it, with a dense copy, and of float16 weights."""
    rows = results["rows"]
    counts = sorted({row["m"] for row in rows if row["name"] == "in full"})
    head = ["N x K", "dense copy alone (share of the streaming read)", *(f"M = {m}" for m in counts)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for n, k in _shapes(rows):
        copy = _time(rows, "dequantize", n, k, 0)
        share = copy["bytes"] / copy["us"] / 1e6 / results["read_tb_s"] if copy else 0
        cells = [f"{n} x {k}", f"{copy['us']:.1f} ({share:.0%})" if copy else ""]
        for m in counts:
            times = [_time(rows, name, n, k, m) for name in ("in full", "dense copy", "cublas")]
            cells.append(" / ".join(f"{t['us']:.0f}" if t else "" for t in times))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: dict[str, Any], to: Path) -> None:
    """Time against read bits for each shape, with the rivals and the bandwidth floor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, shapes = results["rows"], _shapes(results["rows"])
    figure, axes = plt.subplots(2, (len(shapes) + 1) // 2, figsize=(4 * ((len(shapes) + 1) // 2), 7))
    for axis, (n, k) in zip(axes.flat, shapes, strict=False):
        own = sorted(
            (row for row in rows if (row["name"], row["n"], row["k"], row["m"]) == ("grinqh", n, k, 1)
             and row["x"] == "gaussian"),
            key=lambda row: row["read_bits"],
        )  # fmt: skip
        axis.plot([r["read_bits"] for r in own], [r["us"] for r in own], "o-", label="grinqh")
        axis.plot([r["read_bits"] for r in own], [r["bytes"] / results["read_tb_s"] / 1e6 for r in own], ":k",
                  label="bytes / streaming read")  # fmt: skip
        for row in rows:
            if (row["n"], row["k"], row["m"]) == (n, k, 1) and row["name"] not in OWN and row["bits"] < 16:
                axis.plot(row["bits"], row["us"], "x", label=row["name"])
        axis.set_title(f"{n} x {k}")
        axis.set_xlabel("read bits")
        axis.set_ylabel("us")
        axis.set_ylim(bottom=0)
    axes.flat[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(to, dpi=110)


def _section(results: dict[str, Any], picture: str) -> str:
    text = (
        f"### {results['gpu']}\n\n"
        f"Commit {results['commit']}, {results['date']}; torch {results['torch']}; streaming read "
        f"{results['read_tb_s']:.2f} TB/s.\n\n"
        "One row, microseconds (share of the streaming read, speed over cuBLAS float16):\n\n"
        f"{one_row_table(results)}\n\n![Time against read bits]({picture})\n\n"
    )
    if len({row["m"] for row in results["rows"] if row["name"] == "grinqh"}) > 1:
        text += f"More rows at 3 read bits each, microseconds (speed over cuBLAS):\n\n{many_rows_table(results)}\n\n"
    if any(row["name"] == "in full" for row in results["rows"]):
        text += (
            "All stored bits, microseconds: as `linear` reads them above `max_graded_rows` rows / a dense copy and "
            f"cuBLAS / cuBLAS with float16 weights:\n\n{full_table(results)}\n\n"
        )
    return text


def write_report(files: list[Path], docs: Path) -> None:
    """Replaces the generated part of docs/performance.md and draws a picture of each file beside it."""
    page = docs / "performance.md"
    text, sections = page.read_text(), ""
    for file in files:
        results, picture = json.loads(file.read_text()), f"{file.stem}.png"
        sections += _section(results, picture)
        plot(results, docs / picture)
    before, rest = text.split(BEGIN)
    page.write_text(before + BEGIN + "\n" + sections + END + rest.split(END)[1])
