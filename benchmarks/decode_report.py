"""docs/decode.md and its picture from the results of decode.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import markdown_table, replace_between_markers

Rows = list[dict[str, Any]]
LISTS = ("decode", "parts", "kernels", "prefill", "memory")  # of rows in the results
DENSE = "float16"
PARTS = ("linears_ms", "head_ms", "attention_ms", "rest_ms")


def together(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The rows of several runs, of one commit on one kind of GPU, as if they were of one run."""
    first = runs[0]
    for run in runs[1:]:
        for key in ("gpu", "commit", "versions", "cache_length", "position", "tiny", "layers", "attention"):
            if run[key] != first[key]:
                raise ValueError(f"the runs differ in {key}: {first[key]} and {run[key]}")
    return first | {kind: [row for run in runs for row in run[kind]] for kind in LISTS}


def by_gpu(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs of each kind of GPU together, in the order of their first."""
    kinds = dict.fromkeys(run["gpu"] for run in runs)
    return [together([run for run in runs if run["gpu"] == gpu]) for gpu in kinds]


def setting(row: dict[str, Any]) -> str:
    """Method and, where there are several, setting of the dial, as a table's first cell says it."""
    dial = f", {row['bits']:g} bits" if row["method"].startswith("grinqh") else ""
    compiled = ", compiled" if row.get("mode") == "compiled" else ""
    return f"{row['method']}{dial}{compiled}"


def of_model(results: dict[str, Any], kind: str, model: str) -> Rows:
    return [row for row in results[kind] if row["model"] == model]


def models(results: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["model"] for row in results["decode"]))


def decode_table(rows: Rows) -> str:
    """Tokens a second by batch, and how many times those of float16 in the same mode."""
    batches = sorted({row["batch"] for row in rows})
    dense = {(row["mode"], row["batch"]): row for row in rows if row["method"] == DENSE}
    by_setting: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        by_setting.setdefault(setting(row), {})[row["batch"]] = row
    lines = []
    for name, timed in by_setting.items():
        first = next(iter(timed.values()))
        cells = [name, f"{first['read_bits']:.2f}"]
        for batch in batches:
            speed = timed[batch]["tokens_per_s"] if batch in timed else None
            of = dense.get((first["mode"], batch))
            ratio = f" ({speed / of['tokens_per_s']:.2f}x)" if speed and of else ""
            cells.append(f"{speed:,.0f}{ratio}" if speed else "")
        lines.append(cells)
    return markdown_table(["tokens/s", "read bits", *(f"batch {batch}" for batch in batches)], lines)


def parts_table(rows: Rows) -> str:
    """Where the time of one step goes."""
    lines = []
    for row in rows:
        times = [row["ms"], *(row[part] for part in PARTS), row["ms"] - sum(row[part] for part in PARTS)]
        lines.append([setting(row), str(row["kernels"]), *(f"{ms:.3f}" for ms in times)])
    return markdown_table(
        ["ms of a step, batch 1", "kernels", "total", "linear layers", "head", "attention", "rest", "between"], lines
    )


def prefill_table(prefill: Rows, memory: Rows) -> str:
    """Milliseconds of prompts, launched one by one and as a graph, and the memory of each method."""
    columns = [(mode, n) for n in sorted({row["tokens"] for row in prefill}) for mode in ("eager", "graph")]
    lines = []
    for held in memory:
        ms = {(row["mode"], row["tokens"]): row["ms"] for row in prefill if row["method"] == held["method"]}
        gb = [f"{held[key]:.1f}" if held[key] else "" for key in ("weights_gb", "peak_gb")]
        lines.append([held["method"], *(f"{ms[key]:.1f}" if key in ms else "" for key in columns), *gb])
    header = [f"{n} tokens" + (", graph" if mode == "graph" else "") for mode, n in columns]
    return markdown_table(["ms of a prompt", *header, "GB held", "GB at most"], lines)


def tables(results: dict[str, Any]) -> str:
    """All tables of one kind of GPU, model by model."""
    version = results["versions"]
    parts = [
        f"{results['gpu']}; torch {version['torch']}, transformers {version['transformers']}, Python "
        f"{version['python']}; commit {results['commit']}, {results['date']}. Cache of {results['cache_length']} "
        f"tokens, {results['position']} of them filled; {results['attention']} attention."
    ]
    for model in models(results):
        parts += [
            f"### {model}, {results['gpu']}",
            decode_table(of_model(results, "decode", model)),
            parts_table(of_model(results, "parts", model)),
            prefill_table(of_model(results, "prefill", model), of_model(results, "memory", model)),
        ]
    return "\n\n".join(parts)


def of_one_sequence(rows: Rows) -> tuple[str, Rows]:
    """A mode, the compiled one if it was timed, and its rows at batch 1."""
    rows = [row for row in rows if row["batch"] == 1]
    mode = "compiled" if any(row["mode"] == "compiled" for row in rows) else "eager"
    return mode, [row for row in rows if row["mode"] == mode]


def summary_table(results: dict[str, Any]) -> str:
    """Tokens a second of one sequence, their ratio to float16 in the same mode, and the memory of weights."""
    lines = []
    for model in models(results):
        _, rows = of_one_sequence(of_model(results, "decode", model))
        held = {row["method"]: row["weights_gb"] for row in of_model(results, "memory", model)}
        dense = next((row["tokens_per_s"] for row in rows if row["method"] == DENSE), None)
        for row in rows:
            ratio = f"{row['tokens_per_s'] / dense:.2f}x" if dense else ""
            gb = f"{held[row['method']]:.1f}" if held.get(row["method"]) else ""
            speed = f"{row['tokens_per_s']:,.0f}"
            lines.append([f"{model}, {setting(row)}", f"{row['read_bits']:.2f}", speed, ratio, gb])
    return markdown_table(["one sequence", "read bits", "tokens/s", "over float16", "GB of weights"], lines)


def plot(results: dict[str, Any], to: Path) -> None:
    """Tokens a second of one sequence against read bits, with the other methods as lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = models(results)
    figure, grid = plt.subplots(1, len(names), figsize=(5.5 * len(names), 4), layout="constrained", squeeze=False)
    for axis, model in zip(grid[0], names, strict=True):
        mode, rows = of_one_sequence(of_model(results, "decode", model))
        colours = (f"C{i}" for i in range(10))
        for method in dict.fromkeys(row["method"] for row in rows):
            own = sorted((row for row in rows if row["method"] == method), key=lambda row: row["read_bits"])
            speed = [row["tokens_per_s"] for row in own]
            if method.startswith("grinqh"):
                axis.plot([row["read_bits"] for row in own], speed, "o-", color=next(colours), label=method)
            else:
                axis.axhline(speed[0], linestyle="--", color=next(colours), label=method)
        axis.set(title=model, xlabel="read bits per weight", ylabel=f"tokens/s, one sequence, {mode}", xlim=(0, 8.5))
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8)
    figure.savefig(to, dpi=110)
    plt.close(figure)


def write_report(runs: Sequence[dict[str, Any]], root: Path) -> None:
    """Replaces the generated parts of docs/decode.md and README.md and draws docs/decode.png.

    The document has the runs of every kind of GPU, README.md and the picture those of the first.

    Raises:
        ValueError: the models were not of full size, or runs of one kind of GPU differ in more than what they timed.
    """
    docs = root / "docs"
    if any(run["tiny"] or run["layers"] for run in runs):
        raise ValueError("the documentation shows models of full size, these results are of smaller ones")
    gpus = by_gpu(runs)
    replace_between_markers(docs / "decode.md", "decode-tables", "\n\n".join(map(tables, gpus)))
    first = gpus[0]
    gpu = f"{first['gpu']}, commit {first['commit']}, {first['date']}."
    replace_between_markers(root / "README.md", "decode-table", f"{summary_table(first)}\n\n{gpu}")
    plot(first, docs / "decode.png")
