"""How much text the rotation of attention heads needs, so that the dial keeps its promise on other text.

    python benchmarks/rotated_heads.py --json benchmarks/results/rotated_heads.json
    python benchmarks/rotated_heads.py --report benchmarks/results/rotated_heads.json    # the table of docs/quality.md

The model is calibrated on the beginning of windows of help topics, with its heads as they are and rotated, also where
`grinqh.rotate_heads` would refuse a text of so few distinct tokens; then the texts of quality.py are read, every token
graded on its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import markdown_table, stamp, write_json
from drift import LENGTH, READ_BITS, READ_WINDOWS, drifts
from quality_models import LabModel, converted, texts
from quality_report import run_or_report, section_options, write_section
from torch import Tensor
from tqdm import tqdm

from grinqh import heads
from grinqh.evaluate import token_windows

TOKENS = (64, 128, 256, 512, 2048, 8192)  # of the calibration text
SHOWN_BITS = 2.0


def calibrated(lab: LabModel, ids: list[Tensor], rotate: bool) -> Any:
    """A copy of the model with the default recipe, its heads as they are or rotated, however short the text."""
    with patch.object(heads, "DISTINCT_TOKENS", 0):
        return converted(lab.model, ids, rotate_heads=rotate)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The rows for each length of the text, way with the heads, text that is read and setting of the dial."""
    lab = LabModel.load(options.model, device=options.device)
    help_topics, evaluation = texts()
    topics = list(token_windows(lab.tokenizer, [help_topics], LENGTH, max(TOKENS) // LENGTH).ids)
    cut = {name: list(token_windows(lab.tokenizer, parts, LENGTH, READ_WINDOWS).ids)
           for name, parts in evaluation.items()}  # fmt: skip
    size = max(of.size for of in heads.find_heads(lab.model))
    result: dict[str, Any] = stamp(options.device) | {
        "model": options.model, "window": LENGTH, "windows": READ_WINDOWS, "head_size": size, "rows": []
    }  # fmt: skip
    pairs = [(tokens, rotate) for tokens in TOKENS for rotate in (False, True)]
    for tokens, rotate in tqdm(pairs, desc="rotated heads", unit="model", file=sys.stderr, disable=None):
        ids = [topics[0][:tokens]] if tokens <= LENGTH else topics[: tokens // LENGTH]
        model = calibrated(lab, ids, rotate)
        distinct = len(torch.cat(ids).unique())
        for name, windows in cut.items():
            for bits, found in zip(READ_BITS, drifts(model, windows), strict=True):
                row = {"tokens": tokens, "distinct": distinct, "rotated": rotate, "read": name}
                result["rows"].append(row | {"bits": bits, "drift": found.drift})
                print(json.dumps(result["rows"][-1]), flush=True)
        if options.json:
            write_json(options.json, result)
    return result


def table(rows: list[dict[str, Any]]) -> str:
    """Drift by length of the calibration text, with heads as they are and, after the arrow, rotated."""
    shown = [row for row in rows if row["bits"] == SHOWN_BITS]
    names = list(dict.fromkeys(row["read"] for row in shown))
    lines = []
    for tokens, distinct in dict.fromkeys((row["tokens"], row["distinct"]) for row in shown):
        drift = {(row["read"], row["rotated"]): row["drift"] for row in shown if row["tokens"] == tokens}
        cells = [f"{drift[name, False]:+.1%} → {drift[name, True]:+.1%}" for name in names]
        lines.append([str(tokens), str(distinct), *cells])
    return markdown_table(["tokens", "distinct", *names], lines)


def write_report(result: dict[str, Any], root: Path) -> None:
    """Replaces the generated table of docs/quality.md."""
    sample = (
        f"heads of {result['head_size']} numbers, {SHOWN_BITS:g} read bits, {result['windows']} windows of "
        f"{result['window']} tokens of each text"
    )
    write_section(root, "rotated-heads-table", result, sample, table(result["rows"]))


def main() -> None:
    run_or_report(section_options(__doc__).parse_args(), run, write_report)


if __name__ == "__main__":
    main()
