"""What benchmarks/gemv.py --report writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gemv_report


def record(gpu: str, us: float) -> dict[str, Any]:
    same = {"n": 4096, "k": 4096, "m": 1}
    own = {"name": "grinqh", "x": "gaussian", "bits": 3, "read_bits": 3.0, "us": us, "bytes": us * 1e6}
    rows = [same | own, same | {"name": "cublas", "bits": 16, "us": 3 * us}]
    return {"gpu": gpu, "commit": "abc", "date": "today", "torch": "2", "read_tb_s": 4.0, "rows": rows}


def test_every_record_has_a_section_and_a_picture_of_its_own_in_the_order_given(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text(f"before {gemv_report.BEGIN} old {gemv_report.END} after")
    files = [tmp_path / "second.json", tmp_path / "first.json"]
    for file, us in zip(files, (8.0, 5.0), strict=True):
        file.write_text(json.dumps(record(f"GPU {us:g}", us)))
    gemv_report.write_report(files, tmp_path)
    text = page.read_text()
    assert text.startswith("before ")
    assert text.endswith(" after")
    assert " old " not in text
    sections = text.split("### ")[1:]
    for section, time, picture in zip(sections, ("8", "5"), ("second.png", "first.png"), strict=True):
        assert section.startswith(f"GPU {time}\n")
        assert f"| 4096 x 4096 | {time}.0 (25%, 3.0x) |" in section
        assert f"]({picture})" in section
        assert (tmp_path / picture).stat().st_size > 1000
