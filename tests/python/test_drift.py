"""Read bits on text unlike that of calibration: they are compared with the dial's promise, and recorded anew."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import drift
import pytest
import rotated_heads
import torch
from quality_models import LabModel
from tiny_models import calibrated, logits, tiny_model, token_ids
from torch import Tensor

import grinqh
from grinqh import InputError, heads

USUAL = token_ids() % 128
OTHER = USUAL + 128  # tokens whose embeddings `two_kinds` changes


def two_kinds() -> Any:
    """A model in which half of the tokens have one huge feature, so that the others are small; calibrated without."""
    model = tiny_model()
    embeddings = model.get_input_embeddings().weight.data
    embeddings[128:, 5] = 100 * embeddings.abs().mean()
    grinqh.quantize_model(model, progress=False)
    grinqh.calibrate(model, USUAL, progress=False)
    return model


def drift_on(model: Any, ids: Tensor) -> grinqh.DialDrift:
    grinqh.count_reads(model)
    grinqh.reset_read_stats(model)
    with grinqh.graded(model):
        logits(model, ids)
    return grinqh.dial_drift(model)


@pytest.mark.parametrize("exact", [False, True])
def test_text_of_calibration_reads_what_the_dial_promises(exact: bool) -> None:
    model = calibrated()
    for target in (2.0, 4.0):
        grinqh.set_bits(model, target, exact_budget=exact)
        found = drift_on(model, token_ids())
        assert found.expected_bits == pytest.approx(target, rel=1e-3)
        assert found.drift < 0.03
        assert found.drift > -0.03 or exact  # a budget is kept from above
    assert set(found.layers) == set(grinqh.packed_layers(model))


def test_other_text_drifts_with_a_warning_until_the_dial_is_recorded_anew(caplog: pytest.LogCaptureFixture) -> None:
    model = two_kinds()
    with caplog.at_level(logging.WARNING, "grinqh.dial"):
        drift_on(model, USUAL)
        assert not caplog.records
        before = drift_on(model, OTHER)
    assert abs(before.drift) > 0.1
    assert "call grinqh.record_dial" in caplog.text
    assert min(before.layers.values()) < before.read_bits - before.expected_bits < max(before.layers.values())
    table = grinqh.record_dial(model, OTHER, progress=False)
    assert torch.equal(table.read_bits, grinqh.dial_table(model).read_bits)
    assert abs(drift_on(model, OTHER).drift) < 0.03
    assert abs(drift_on(model, USUAL).drift) > 0.1


def test_recording_on_the_same_text_changes_nothing() -> None:
    model = calibrated()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grinqh.record_dial(model, token_ids(), progress=False)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], atol=1e-6, rtol=1e-6)


def test_recording_keeps_the_setting_of_the_dial_by_layers() -> None:
    model = two_kinds()
    grinqh.set_bits(model, {"*": 3.0, "down_proj": 5.0})
    grinqh.record_dial(model, OTHER, progress=False)
    found = drift_on(model, OTHER)
    for name, layer in grinqh.packed_layers(model).items():
        assert name in found.layers
        assert layer.calibrated
    assert abs(found.drift) < 0.03
    down = [n for n in found.layers if n.endswith("down_proj")]
    read = grinqh.read_stats(model).layers
    assert sum(read[n] for n in down) / len(down) == pytest.approx(5.0, rel=0.03)


def test_a_model_that_was_not_calibrated_or_did_not_count_is_refused() -> None:
    model = grinqh.quantize_model(tiny_model(), progress=False)
    with pytest.raises(InputError, match="no dial yet"):
        grinqh.record_dial(model, USUAL)
    with pytest.raises(InputError, match="no dial yet"):
        grinqh.dial_drift(model)
    with pytest.raises(InputError, match="no rows were counted"):
        grinqh.dial_drift(calibrated())


MACHINE = {
    "hardware": {"cpu": "c", "threads": 2, "vector_isa": "v", "last_cache_mb": 1},
    "versions": {"torch": "2", "python": "3"}, "commit": "abc", "date": "today",
    "model": "m", "window": 512, "windows": 2,
}  # fmt: skip


def written(write_report: Callable[[dict[str, Any], Path], None], result: dict[str, Any], root: Path) -> list[Any]:
    """The cells of the page's lines after a report."""
    (root / "docs").mkdir()
    shutil.copy(Path(__file__).parents[2] / "docs" / "quality.md", root / "docs")
    write_report(MACHINE | result, root)
    page = (root / "docs" / "quality.md").read_text(encoding="utf-8")
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]


def test_the_report_of_rotated_heads_fills_the_page(tmp_path: Path) -> None:
    rows = [
        {"tokens": 64, "distinct": 45, "rotated": rotated, "read": "code", "bits": bits, "drift": 0.1 * rotated + bits}
        for rotated in (False, True)
        for bits in (2.0, 3.0)
    ]
    lines = written(rotated_heads.write_report, {"rows": rows, "head_size": 64}, tmp_path)
    assert ["64", "45", "+200.0% → +210.0%"] in lines


def test_heads_are_rotated_for_the_record_however_short_the_text() -> None:
    lab = LabModel("tiny", tiny_model(), None)  # no text is read
    few = [torch.tensor([1, 2, 3, 4])]
    kept, rotated = (rotated_heads.calibrated(lab, few, rotate) for rotate in (False, True))
    v, o = "model.layers.0.self_attn.v_proj", "model.layers.0.self_attn.o_proj"
    for name in (v, o):
        assert not torch.equal(*(grinqh.packed_layers(m)[name].tensors["plane_0"] for m in (kept, rotated)))
    assert heads.DISTINCT_TOKENS == 2


def test_the_report_fills_the_page(tmp_path: Path) -> None:
    rows = [
        {"calibrated": "code", "read": read, "bits": bits, "drift": 0.123, "recorded_anew": anew}
        for read, anew in (("code", None), ("speeches", -0.004))
        for bits in drift.READ_BITS
    ]
    lines = written(drift.write_report, {"rows": rows}, tmp_path)
    assert ["code", "code", "+12.3%", "+12.3%", "+12.3%"] in lines
    assert ["code", "speeches", *["+12.3% → -0.4%"] * 3] in lines
