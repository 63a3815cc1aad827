"""The table of benchmarks/noise.py, and where it goes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import noise
from common import stamp

ROOT = Path(__file__).parents[2]


SETTINGS = [(recipe, bits) for recipe in noise.RECIPES for bits in noise.READ_BITS]
# The KL divergence tells the recipes apart.
ROWS: list[dict[str, Any]] = [
    {"seed": seed, "recipe": recipe, "bits": bits, "read_bits": bits, "perplexity": 30.0, "log_ratio": log_ratio,
     "kl": 0.1 * len(recipe)}
    for recipe, bits in SETTINGS
    for seed, log_ratio in enumerate((-0.01, 0.01, 0.03))
]  # fmt: skip


def test_the_table_has_means_deviations_and_extremes_by_recipe_and_setting_of_the_dial() -> None:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in noise.table(ROWS).splitlines()[2:]]
    spread = ["0.0100 ± 0.0200", "-0.0100 to 0.0300"]
    assert lines == [[recipe, f"{bits:g}", *spread, f"{0.1 * len(recipe):.4f} ± 0.0000"] for recipe, bits in SETTINGS]


def test_the_report_goes_into_the_documents_section(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "quality.md", tmp_path / "docs")
    sample = {"model": "m", "text": "speeches", "window": 512, "windows": 4, "rows": ROWS}
    noise.write_report(stamp() | sample, tmp_path)
    written = (tmp_path / "docs" / "quality.md").read_text(encoding="utf-8")
    assert "m, 3 seeds, 4 windows of 512 tokens of the speeches." in written
    assert noise.table(ROWS) in written
