"""What benchmarks/ablation.py changes about a layer, and its table."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import ablation
import pytest
import torch

import grinqh

ROOT = Path(__file__).parents[2]


@pytest.fixture
def layer() -> grinqh.GrinqhLinear:
    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 40, bias=False)
    linear.weight.data *= torch.logspace(-1, 1, 96)[torch.randperm(96)]
    model = torch.nn.Sequential(linear)
    grinqh.quantize_model(model, progress=False)
    return grinqh.packed_layers(model)["0"]


def test_plain_importance_is_the_size_of_x(layer: grinqh.GrinqhLinear) -> None:
    ablation.plain_importance(layer)
    assert bool((layer.channel_weight == 1).all())


def test_the_first_tokens_read_everything_and_the_others_what_the_dial_says(layer: grinqh.GrinqhLinear) -> None:
    layer.set_thresholds([torch.inf] * layer.format.planes)
    x = torch.randn(1, 7, 96, generator=torch.Generator().manual_seed(1))
    ablation.read_in_full(layer, 3)
    got = layer(x)
    torch.testing.assert_close(got[:, :3], x[:, :3] @ layer.dense())
    assert bool((got[:, 3:] == 0).all())


def test_norm_importance_follows_the_norms_of_the_stored_columns(layer: grinqh.GrinqhLinear) -> None:
    ablation.norm_importance(layer)
    norm = layer.dense().norm(dim=1)[layer.channel_order.long()]
    torch.testing.assert_close(layer.channel_weight / layer.channel_weight[0], norm / norm[0])
    assert layer.channel_weight.square().mean() == pytest.approx(1)


def test_no_gain_leaves_the_size_of_leading_bits(layer: grinqh.GrinqhLinear) -> None:
    assert not bool((layer.gain == 1).all())
    ablation.no_gain(layer)
    assert bool((layer.gain == 1).all())


def test_variants_have_names_of_their_own_and_settings_that_exist() -> None:
    assert len({variant.name for variant in ablation.VARIANTS}) == len(ablation.VARIANTS)
    for variant in ablation.VARIANTS:
        grinqh.GrinqhConfig(**variant.config)


def result() -> dict[str, Any]:
    rows = [
        {"variant": name, "bits": bits, "read_bits": bits - 0.01, "kl": kl / bits, "log_ratio": 0.0}
        for name, kl in (("default", 0.4), ("planes 4,4", 0.8))
        for bits in ablation.READ_BITS
    ]
    machine = {"cpu": "c", "threads": 2, "vector_isa": "v", "last_cache_mb": 1}
    return {
        "hardware": machine, "versions": {"torch": "2", "python": "3"}, "commit": "abc", "date": "today",
        "model": "m", "text": "speeches", "window": 512, "windows": 4, "rows": rows,
    }  # fmt: skip


def test_the_report_fills_the_page(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "quality.md", tmp_path / "docs")
    ablation.write_report(result(), tmp_path)
    page = (tmp_path / "docs" / "quality.md").read_text(encoding="utf-8")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    assert ["planes 4,4", "0.2000 (3.99)", "0.2667 (2.99)", "0.3200 (2.49)", "0.4000 (1.99)"] in lines
