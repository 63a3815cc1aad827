"""docs/quality.md's tables and the frontier's picture from the results of quality.py."""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, describe_machine, markdown_table, replace_between_markers
from quality_models import MODELS

Row = dict[str, Any]


def write_report(results: list[dict[str, Any]]) -> None:
    """Writes the generated part of docs/quality.md, and quality.png, from one or several runs.

    The picture has a method's point from the last run that holds it.
    """
    parts = []
    for result in results:
        for model in _values(result["rows"], "model"):
            of_model = [row for row in result["rows"] if row["model"] == model]
            parts += [f"### {model}", f"Measured on: {describe_machine(result)} {_sample(result)}"]
            for window in _values(of_model, "window"):
                rows = [row for row in of_model if row["window"] == window]
                parts += [f"Windows of {window} tokens:", read_table(rows), stored_table(rows)]
    replace_between_markers(ROOT / "docs" / "quality.md", "quality-tables", "\n\n".join(parts))
    _plot(_latest(results))


def _latest(results: list[dict[str, Any]]) -> list[Row]:
    latest: dict[tuple[str, str, float, int], list[Row]] = {}
    for result in results:
        found = defaultdict(list)
        for row in result["rows"]:
            found[row["model"], row["method"], _bits(row), round(row["stored_bits"])].append(row)
        latest |= found
    return [row for rows in latest.values() for row in rows]


def write_section(root: Path, name: str, result: dict[str, Any], sample: str, table: str) -> None:
    """Replaces a generated section of docs/quality.md: one model's sample, the machine and a table."""
    text = f"{result['model']}, {sample}. Measured on: {describe_machine(result)}\n\n{table}"
    replace_between_markers(root / "docs" / "quality.md", name, text)


def section_options(description: str | None) -> argparse.ArgumentParser:
    """The options of a benchmark that writes such a section."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--report", type=Path, help="write docs/quality.md from these results, measure nothing")
    parser.add_argument("--model", default="SmolLM2-135M-Instruct", choices=list(MODELS))
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: the CPU)")
    return parser


def run_or_report(
    options: argparse.Namespace,
    run: Callable[[argparse.Namespace], Row],
    report: Callable[[Row, Path], None],
) -> None:
    """Does what such options ask for: a run, or the report of an earlier one."""
    if options.report:
        report(json.loads(options.report.read_text(encoding="utf-8")), ROOT)
    else:
        run(options)


def read_table(rows: list[Row]) -> str:
    """ln(perplexity / full precision) and KL by method and read bits, one line for each text."""
    compared = [row for row in rows if row["method"] != "grinqh, fewer stored" and row["target"] != 8.0]
    bits = sorted({_bits(row) for row in compared}, reverse=True)
    lines = []
    for text in _values(rows, "text"):
        for method in _values(compared, "method"):
            cells = {_bits(r): r for r in compared if (r["text"], r["method"]) == (text, method)}
            lines.append([f"{method}, {text}", *(_cell(cells.get(b)) for b in bits)])
    return markdown_table(["ln(ppl / full), KL", *(f"{b:g} read bits" for b in bits)], lines)


def stored_table(rows: list[Row]) -> str:
    """The same for fewer stored bits, at one setting of the dial."""
    of_grinqh = [r for r in rows if r["method"] == "grinqh, fewer stored"]
    stored = sorted({round(r["stored_bits"]) for r in of_grinqh}, reverse=True)
    lines = []
    for text in _values(of_grinqh, "text"):
        cells = {round(r["stored_bits"]): r for r in of_grinqh if r["text"] == text}
        lines.append([f"grinqh at {_bits(of_grinqh[0]):g} read bits, {text}", *(_cell(cells[s]) for s in stored)])
    return markdown_table(["ln(ppl / full), KL", *(f"{s:g} stored bits" for s in stored)], lines)


def _cell(row: Row | None) -> str:
    return "" if row is None else f"{row['log_ratio']:.4f}, {row['kl']:.4f}"


def _bits(row: Row) -> float:
    """The setting: what a dial was asked for, or what a static method has."""
    return float(row["target"] if row["target"] is not None else row["read_bits"])


def _values(rows: list[Row], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def _sample(result: dict[str, Any]) -> str:
    windows = " and ".join(f"{count} windows of {length} tokens" for length, count in result["windows"].items())
    return f"{windows} of each text; calibration with {result['calibration_tokens']:,} tokens."


def _plot(rows: list[Row]) -> None:
    """KL against bits, all texts together: bits read on the left, bits stored on the right, scales counted."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    models = _values(rows, "model")
    figure, axes = plt.subplots(len(models), 2, figsize=(11, 4.2 * len(models)), layout="constrained", squeeze=False)
    for line, model in zip(axes, models, strict=True):
        for axis, kind in zip(line, ("read", "stored"), strict=True):
            for method in _values(rows, "method"):
                of_method = [r for r in rows if (r["model"], r["method"]) == (model, method)]
                if kind == "stored":  # one point for each memory: at 3 read bits where there is a dial
                    of_method = [r for r in of_method if r["target"] in (None, 3.0)]
                settings = defaultdict(list)  # texts read somewhat different bits at one setting
                for row in of_method:
                    place = (row[f"{kind}_bits"] + row["scale_bits"], row["kl"])
                    settings[_bits(row), round(row["stored_bits"])].append(place)
                curve = sorted(tuple(map(statistics.mean, zip(*of, strict=True))) for of in settings.values())
                style = "o-" if method.startswith("grinqh") else "s--"
                axis.semilogy(*zip(*curve, strict=True), style, markersize=4, label=method)
            axis.set(xlabel=f"bits {kind} per weight, scales included", ylabel="KL divergence (nats)")
            axis.set_title(f"{model}{'' if kind == 'read' else ', grinqh at 3 read bits'}", fontsize=10)
            axis.grid(True, which="both", alpha=0.2)
    axes[0][0].legend(fontsize=7)
    figure.savefig(RESULTS / "quality.png", dpi=130)
    plt.close(figure)
