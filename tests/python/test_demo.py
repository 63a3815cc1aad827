"""The demo's promises and tables, without the model."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return {name: importlib.import_module(name) for name in ("common", "tables", "demo")}


def row(target: float | None, read_bits: float, ratio: float) -> dict[str, Any]:
    return {
        "setting": "float32" if target is None else f"grinqh {target:g}",
        "target": target,
        "read_bits": read_bits,
        "stored_bits": 8.0,
        "disk_mb": 225.3,
        "perplexity": 31.04,
        "log_ppl_ratio": ratio,
        "kl": 0.0123,
        "top1": 0.957,
        "tokens_per_s": 61.24,
    }


def test_promises_hold_at_their_limits_and_break_beyond(modules: dict[str, Any]) -> None:
    broken = modules["demo"].broken_promises
    assert broken([row(None, 32, 0), row(4, 4.11, 0.02), row(3, 2.92, 0.08), row(2, 2.0, 0.40), row(6, 6, 9.0)]) == []
    assert len(broken([row(4, 4, 0.021)])) == 1
    assert len(broken([row(3, 3, 0.081)])) == 1
    assert len(broken([row(2, 2, 0.41)])) == 1
    assert len(broken([row(2.5, 2.4, 0)])) == 1
    assert len(broken([row(2.5, 2.6, 0)])) == 1


def test_a_figure_that_is_no_number_breaks_a_promise(modules: dict[str, Any]) -> None:
    assert len(modules["demo"].broken_promises([row(4, float("nan"), float("nan"))])) == 2


def test_the_table_shows_target_and_realised_bits(modules: dict[str, Any]) -> None:
    header, rule, full, ours = (
        modules["tables"].demo_table({"rows": [row(None, 32, 0), row(3, 2.98, 0.0412)]}).splitlines()
    )
    assert len({len(header), len(rule), len(full), len(ours)}) == 1
    cells = [cell.strip() for cell in ours.strip("|").split("|")]
    assert cells == ["grinqh 3", "2.98", "8.00", "225", "31.04", "0.0412", "0.0123", "95.7%", "61.2"]


def test_tables_go_between_their_markers_and_nowhere_else(modules: dict[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    replace = modules["common"].replace_between_markers
    page.write_text("before\n<!-- t -->\nold\n<!-- /t -->\nafter\n", encoding="utf-8")
    for _ in range(2):
        replace(page, "t", "new")
        assert page.read_text(encoding="utf-8") == "before\n<!-- t -->\nnew\n<!-- /t -->\nafter\n"
    with pytest.raises(ValueError, match="markers"):
        replace(page, "other", "new")


@pytest.mark.parametrize(
    ("page", "name"),
    [("README.md", "demo-table"), ("README.md", "cpu-table"), ("docs/cpu-performance.md", "cpu-tables")],
)
def test_the_documents_have_the_markers_that_tables_go_between(page: str, name: str) -> None:
    text = (BENCHMARKS.parent / page).read_text(encoding="utf-8")
    assert text.count(f"<!-- {name} -->") == text.count(f"<!-- /{name} -->") == 1


def test_the_demo_is_done_anew_when_a_source_changes(
    modules: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    demo = modules["demo"]
    monkeypatch.setattr(demo.metadata, "version", lambda name: "1")
    monkeypatch.setattr(demo, "package_folder", lambda name: tmp_path)
    (tmp_path / "module.py").write_text("x = 1", encoding="utf-8")
    before = demo.fingerprint()
    assert demo.fingerprint() == before
    (tmp_path / "module.py").write_text("x = 2", encoding="utf-8")
    assert demo.fingerprint() != before
