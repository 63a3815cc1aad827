"""Tables of the result files, and their places in the documentation.

python benchmarks/tables.py puts the figures of benchmarks/results/*.json into README.md and docs/.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from common import RESULTS, ROOT, describe_machine, markdown_table, replace_between_markers

TORCH_METHODS = ("torch float32", "torch bfloat16")


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def demo_table(result: dict[str, Any]) -> str:
    """Quality and speed of the demo's model at every setting of the dial."""
    header = (
        "setting",
        "read bits",
        "stored bits",
        "MB on disk",
        "perplexity",
        "ln(ppl/full)",
        "KL",
        "top-1",
        "tokens/s",
    )
    rows = [
        (
            row["setting"],
            number(row["read_bits"], 2),
            number(row["stored_bits"], 2),
            number(row["disk_mb"], 0),
            number(row["perplexity"], 2),
            number(row["log_ppl_ratio"], 4),
            number(row["kl"], 4),
            "" if row["top1"] is None else f"{row['top1']:.1%}",
            number(row["tokens_per_s"], 1),
        )
        for row in result["rows"]
    ]
    return markdown_table(header, rows)


def demo_notes(result: dict[str, Any]) -> str:
    """What the demo's table was measured on."""
    return (
        f"{result['model']}. Perplexity, KL divergence (nats per token) and top-1 agreement are against the model at "
        f"full precision, on {result['text']}: {result['windows']}; every token graded on its own. Calibration text: "
        f"{result['calibration']}. The model's file lies on a 4-bit grid, which flatters any method that quantizes "
        f"it. Read and stored bits are those of the quantized layers; MB on disk is the whole model, its embedding "
        f"left in float32. Measured on: {describe_machine(result)}"
    )


def speed_cell(us: float, rival: float) -> str:
    return f"{us:,.0f} ({rival / us:.2f}x)"


def by_shape(rows: Iterable[dict[str, Any]]) -> dict[tuple[int, int], dict[str, dict[str, Any]]]:
    """Rows of measurements by shape, then by method."""
    shapes: dict[tuple[int, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        shapes.setdefault((row["n"], row["k"]), {})[row["method"]] = row
    return shapes


def cpu_layer_table(result: dict[str, Any], m: int) -> str:
    """Microseconds of a layer for m tokens, and how many times faster than the faster of torch's."""
    shapes = by_shape(row for row in result["layers"] if row["m"] == m)
    methods = [method for method in next(iter(shapes.values())) if method.startswith("grinqh")]
    rows = []
    for (n, k), timed in shapes.items():
        rival = min(timed[method]["us"] for method in TORCH_METHODS)
        rows.append(
            [f"{n} x {k}"]
            + [f"{timed[method]['us']:,.0f}" for method in TORCH_METHODS]
            + [speed_cell(timed[method]["us"], rival) for method in methods]
        )
    bits = [f"{method.removeprefix('grinqh ')} bits" for method in methods]
    return markdown_table([f"N x K, M = {m}", *TORCH_METHODS, *bits], rows)


def cpu_prefill_table(result: dict[str, Any]) -> str:
    """Microseconds of a layer for many tokens at full precision, against float32."""
    by_rows: dict[int, dict[tuple[int, int], dict[str, dict[str, Any]]]] = {}
    for m in sorted({row["m"] for row in result["layers"] if row["method"] == "grinqh prefill"}):
        by_rows[m] = by_shape(row for row in result["layers"] if row["m"] == m)
    rows = [
        [
            f"{n} x {k}",
            *(
                f"{timed[n, k]['torch float32']['us']:,.0f} / {timed[n, k]['grinqh prefill']['us']:,.0f}"
                f" ({timed[n, k]['grinqh prefill']['us'] / timed[n, k]['torch float32']['us']:.2f})"
                for timed in by_rows.values()
            ),
        ]
        for n, k in next(iter(by_rows.values()))
    ]
    return markdown_table(["N x K: float32 / grinqh (ratio)", *(f"M = {m}" for m in by_rows)], rows)


def cpu_decode_table(result: dict[str, Any]) -> str:
    """Tokens per second of a whole model."""
    rows = result["model"]["decode"]
    base = rows[0]["tokens_per_s"]
    return markdown_table(
        (result["model"]["name"], "tokens/s", "against float32"),
        [(row["method"], number(row["tokens_per_s"], 1), f"{row['tokens_per_s'] / base:.2f}x") for row in rows],
    )


def cpu_tables(result: dict[str, Any]) -> str:
    """All tables of the CPU benchmark."""
    rows = sorted(
        {row["m"] for row in result["layers"] if row["method"].startswith("grinqh ") and "prefill" not in row["method"]}
    )
    return "\n\n".join(
        [
            f"Measured on: {describe_machine(result)}",
            "Microseconds of one call; in brackets, times faster than the faster of torch's two.",
            *(cpu_layer_table(result, m) for m in rows),
            "Prefill, every channel at its last grade: microseconds of one call.",
            cpu_prefill_table(result),
            "Decoding one sequence, whole model:",
            cpu_decode_table(result),
        ]
    )


def main() -> None:
    demo, cpu = (RESULTS / name for name in ("demo.json", "cpu.json"))
    if demo.exists():
        result = json.loads(demo.read_text(encoding="utf-8"))
        replace_between_markers(ROOT / "README.md", "demo-table", f"{demo_table(result)}\n\n{demo_notes(result)}")
    if cpu.exists():
        result = json.loads(cpu.read_text(encoding="utf-8"))
        replace_between_markers(
            ROOT / "README.md", "cpu-table", f"{cpu_layer_table(result, 1)}\n\n{cpu_decode_table(result)}"
        )
        replace_between_markers(ROOT / "docs" / "cpu-performance.md", "cpu-tables", cpu_tables(result))


if __name__ == "__main__":
    main()
