"""What the benchmarks share: a stamp for result files, tables, and their place in the documentation."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from grinqh.benchmark import hardware, versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CACHE = ROOT / ".cache"


def stamp(device: str | None = None) -> dict[str, Any]:
    """Where, when and from which commit figures come; `device` is what the models run on, the CPU for None."""
    on_gpu = device is not None and device.startswith("cuda")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "hardware": hardware() | ({"gpu": torch.cuda.get_device_name(device)} if on_gpu else {}),
        "versions": versions(),
    }


def commit() -> str:
    """Short hash of the commit, with `-dirty` where sources differ from it (results and documents may).

    A machine that has the sources but not the repository is told by the environment variable GRINQH_COMMIT.
    """
    if told := os.environ.get("GRINQH_COMMIT"):
        return told
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git(
            "status", "--porcelain", "--untracked-files=no", "--", "cpp", "cuda", "python", "benchmarks/*.py"
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-dirty" if changed else head


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def describe_machine(result: dict[str, Any]) -> str:
    """One line that says where the figures of a result file were measured."""
    machine, version = result["hardware"], result["versions"]
    if "gpu" in machine:
        return (
            f"{machine['gpu']}; torch {version['torch']}, Python {version['python']}; commit {result['commit']}, "
            f"{result['date']}."
        )
    return (
        f"{machine['cpu']}, {machine['threads']} threads, {machine['vector_isa']}, "
        f"{machine['last_cache_mb']} MB last-level cache; torch {version['torch']}, Python {version['python']}; "
        f"commit {result['commit']}, {result['date']}."
    )


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Writes a result file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with its columns lined up, so that it reads well in a terminal too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join([first, *others]) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def replace_between_markers(path: Path, name: str, text: str) -> None:
    """Puts text between `<!-- name -->` and `<!-- /name -->` in a Markdown file."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    page = path.read_text(encoding="utf-8")
    if page.count(start) != 1 or page.count(end) != 1:
        raise ValueError(f"{path.name} must hold the markers {start} and {end} once each")
    before, _, rest = page.partition(start)
    _, _, after = rest.partition(end)
    path.write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")
