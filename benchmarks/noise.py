"""How much the lab's figures depend on the noise that its models' weights are given.

    python benchmarks/noise.py --json benchmarks/results/noise.json
    python benchmarks/noise.py --report benchmarks/results/noise.json    # the table of docs/quality.md

The model and the texts are those of quality.py, the recipes are the default one and the finest format that there is.
Only the seed of the noise differs, and with it what is taken as full precision.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import markdown_table, stamp, write_json
from quality_models import LabModel, converted, texts
from quality_report import run_or_report, section_options, write_section
from tqdm import tqdm

import grinqh
from grinqh.evaluate import Reference, Windows, evaluate, token_windows

RECIPES: dict[str, dict[str, Any]] = {  # what differs from GrinqhConfig's defaults
    "default": {},
    "planes of 1 bit, blocks of 32": {"plane_widths": (1,) * 8, "block": 32},
}
READ_BITS = (8.0, 4.0, 3.0, 2.5, 2.0)
LENGTH = 512  # tokens of a window, and of a calibration sequence
CALIBRATION_TOKENS = 4096


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The rows of every seed, also written to `options.json` after each."""
    help_topics, evaluation = texts()
    result: dict[str, Any] = stamp(options.device) | {
        "model": options.model, "text": "speeches", "window": LENGTH, "windows": options.windows, "rows": []
    }  # fmt: skip
    for seed in tqdm(range(options.seeds), desc="noise", unit="seed", file=sys.stderr, disable=None):
        lab = LabModel.load(options.model, seed, options.device)
        windows = token_windows(lab.tokenizer, evaluation["speeches"], LENGTH, options.windows)
        for row in measure(lab, help_topics, windows):
            result["rows"].append({"seed": seed, **row})
            print(json.dumps(result["rows"][-1]), flush=True)
        if options.json:
            write_json(options.json, result)
    return result


def measure(lab: LabModel, calibration: str, windows: Windows) -> Iterator[dict[str, Any]]:
    """Rows of one noise, by recipe and setting of the dial."""
    ids = list(token_windows(lab.tokenizer, calibration, LENGTH, CALIBRATION_TOKENS // LENGTH).ids)
    full = Reference(lambda: lab.model)
    for recipe, changes in RECIPES.items():
        model = converted(lab.model, ids, grinqh.GrinqhConfig(**changes))
        for bits in READ_BITS:
            grinqh.set_bits(model, bits)
            (score,) = evaluate(model, windows, reference=full, progress=False)
            row = {"recipe": recipe, "bits": bits, "read_bits": score.read_bits}
            yield row | {"perplexity": score.reference_perplexity, "kl": score.kl, "log_ratio": score.log_ratio}


def table(rows: list[dict[str, Any]]) -> str:
    """By recipe and setting of the dial: mean and standard deviation over the seeds, extremes of the log ratio."""
    lines = []
    for recipe in RECIPES:
        for bits in READ_BITS:
            of_bits = [row for row in rows if (row["recipe"], row["bits"]) == (recipe, bits)]
            ratio, kl = ([row[key] for row in of_bits] for key in ("log_ratio", "kl"))
            extremes = f"{min(ratio):.4f} to {max(ratio):.4f}"
            lines.append([recipe, f"{bits:g}", _spread(ratio), extremes, _spread(kl)])
    return markdown_table(["recipe", "read bits", "ln(ppl / full)", "least to most", "KL divergence"], lines)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


def write_report(result: dict[str, Any], root: Path) -> None:
    """Replaces the generated table of docs/quality.md."""
    seeds = len({row["seed"] for row in result["rows"]})
    sample = f"{seeds} seeds, {result['windows']} windows of {result['window']} tokens of the {result['text']}"
    write_section(root, "noise-table", result, sample, table(result["rows"]))


def main() -> None:
    parser = section_options(__doc__)
    parser.add_argument("--windows", type=int, default=4, help="of the text (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=6, help="of the noise, from 0 on (default: %(default)s)")
    run_or_report(parser.parse_args(), run, write_report)


if __name__ == "__main__":
    main()
