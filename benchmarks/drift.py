"""How far read bits drift on text of another kind than calibration's, and what recording the dial anew leaves of it.

    python benchmarks/drift.py --json benchmarks/results/drift.json
    python benchmarks/drift.py --report benchmarks/results/drift.json    # the table of docs/quality.md

The model, its noise and the texts are those of quality.py; further ones, which are only read, are help topics as a chat
in the model's template, and messages in other languages (`pip install django`). Each text is cut into windows; every
second one calibrates (or records the dial), others are read with every token graded on its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from common import markdown_table, stamp, write_json
from quality_models import LabModel, chat, converted, other_languages, texts
from quality_report import run_or_report, section_options, write_section
from torch import Tensor
from tqdm import tqdm

import grinqh
from grinqh.evaluate import token_windows

READ_BITS = (2.0, 3.0, 4.0)
LENGTH = 512  # tokens of a window
CALIBRATION_WINDOWS = 8
READ_WINDOWS = 2


def windows_of(lab: LabModel, parts: list[str]) -> tuple[list[Tensor], list[Tensor]]:
    """Windows of a text to calibrate with, and others to read."""
    ids = list(token_windows(lab.tokenizer, parts, LENGTH, 2 * CALIBRATION_WINDOWS).ids)
    return ids[::2], ids[1::2][:READ_WINDOWS]


@torch.no_grad()
def drifts(model: Any, ids: list[Tensor]) -> list[grinqh.DialDrift]:
    """At each setting of the dial."""
    found = []
    for bits in READ_BITS:
        grinqh.set_bits(model, bits)
        grinqh.count_reads(model)
        grinqh.reset_read_stats(model)
        with grinqh.graded(model):
            for window in ids:
                model(input_ids=window[None].to(model.device))
        found.append(grinqh.dial_drift(model))
        grinqh.count_reads(model, enabled=False)
    return found


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The rows for each pair of texts."""
    lab = LabModel.load(options.model, device=options.device)
    help_topics, evaluation = texts()
    found = evaluation | {"help": [help_topics]}
    calibrating = list(found)
    found |= {"chat": chat(lab.tokenizer)} | other_languages()
    cut = {name: windows_of(lab, parts) for name, parts in found.items()}
    result: dict[str, Any] = stamp(options.device) | {
        "model": options.model, "window": LENGTH, "windows": READ_WINDOWS, "rows": []
    }  # fmt: skip
    pairs = [(calibrated, read) for calibrated in calibrating for read in cut]
    model: Any = None
    for calibrated, read in tqdm(pairs, desc="drift", unit="pair", file=sys.stderr, disable=None):
        if read == next(iter(cut)):
            model = converted(lab.model, cut[calibrated][0])
        before = drifts(model, cut[read][1])
        after: list[Any] = [None] * len(READ_BITS)
        if read != calibrated:
            anew = copy.deepcopy(model)
            grinqh.record_dial(anew, cut[read][0], progress=False)
            after = drifts(anew, cut[read][1])
        for bits, first, second in zip(READ_BITS, before, after, strict=True):
            row = {"calibrated": calibrated, "read": read, "bits": bits, "drift": first.drift}
            result["rows"].append(row | {"recorded_anew": None if second is None else second.drift})
            print(json.dumps(result["rows"][-1]), flush=True)
        if options.json:
            write_json(options.json, result)
    return result


def table(rows: list[dict[str, Any]]) -> str:
    """Drift by pair of texts and setting of the dial; after the arrow, with the dial recorded anew."""
    lines = []
    for calibrated, read in dict.fromkeys((row["calibrated"], row["read"]) for row in rows):
        cells = {row["bits"]: row for row in rows if (row["calibrated"], row["read"]) == (calibrated, read)}
        lines.append([calibrated, read, *(_cell(cells[bits]) for bits in READ_BITS)])
    return markdown_table(["calibrated on", "read", *(f"{bits:g} read bits" for bits in READ_BITS)], lines)


def _cell(row: dict[str, Any]) -> str:
    anew = "" if row["recorded_anew"] is None else f" → {row['recorded_anew']:+.1%}"
    return f"{row['drift']:+.1%}{anew}"


def write_report(result: dict[str, Any], root: Path) -> None:
    """Replaces the generated table of docs/quality.md."""
    sample = f"{result['windows']} windows of {result['window']} tokens of each text"
    write_section(root, "drift-table", result, sample, table(result["rows"]))


def main() -> None:
    run_or_report(section_options(__doc__).parse_args(), run, write_report)


if __name__ == "__main__":
    main()
