"""GrinqhConfig: what it records, what it refuses, and how patterns name layers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from grinqh import GrinqhConfig, InputError, LayerFormat
from grinqh.config import FORMAT_VERSION, matches


def test_a_config_survives_json() -> None:
    config = GrinqhConfig(
        plane_widths=(2, 2, 2, 2),
        block=32,
        stored_bits=5.5,
        read_bits={"*": 3, "down_proj": 4.5},
        exact_budget=True,
        modules_to_not_convert=["o_proj"],
        convert_lm_head=True,
        overrides={"down_proj": {"block": 128}},
        max_graded_rows=4,
    )
    again = GrinqhConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    assert again.plane_widths == (2, 2, 2, 2)


def test_the_record_names_method_and_version_and_nothing_private() -> None:
    record = GrinqhConfig(stored_bits=4, read_bits=2).to_dict()
    assert record["quant_method"] == "grinqh"
    assert record["format_version"] == FORMAT_VERSION
    assert "stored_bits_to_load" not in record
    assert not [key for key in record if key.startswith("_")]


def test_the_format_version_is_the_header_s() -> None:
    header = Path(__file__).parents[2] / "cpp/include/grinqh/format.h"
    version = re.search(r"kFormatVersion = (\d+)", header.read_text())
    assert version is not None
    assert int(version[1]) == FORMAT_VERSION


def test_only_settings_that_were_given_replace_a_loaded_model_s() -> None:
    assert GrinqhConfig().get_loading_attributes() == {}
    assert GrinqhConfig(read_bits=3.0).get_loading_attributes() == {"read_bits": 3.0}
    assert GrinqhConfig(stored_bits=6).get_loading_attributes() == {"stored_bits_to_load": 6}
    assert GrinqhConfig(exact_budget=False, max_graded_rows=2).get_loading_attributes() == {
        "exact_budget": False,
        "max_graded_rows": 2,
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format_version": FORMAT_VERSION + 1}, "newer grinqh"),
        ({"format_version": 0}, "format_version is 0, must be 1"),
        ({"format_version": "1"}, "format_version is '1'"),
        ({"plane_widths": ()}, "plane_widths"),
        ({"plane_widths": (3, 5)}, r"plane_widths is \(3, 5\)"),
        ({"plane_widths": (8, 1)}, "at most 8 bits"),
        ({"block": 48}, "block is 48, must be 32, 64 or 128"),
        ({"stored_bits": 1.5}, "stored_bits is 1.5, must be at least 2"),
        ({"stored_bits": 9}, "stored_bits is 9"),
        ({"stored_bits": float("nan")}, "stored_bits is nan"),
        ({"read_bits": 0}, "read_bits is 0, must be above 0"),
        ({"read_bits": 8.1}, "at most 8"),
        ({"read_bits": float("nan")}, "read_bits is nan"),
        ({"read_bits": "3"}, "read_bits is '3'"),
        ({"read_bits": {"up_proj": -1}}, r"read_bits\['up_proj'\] is -1"),
        ({"max_graded_rows": -1}, "max_graded_rows is -1"),
        ({"max_graded_rows": 1.5}, "max_graded_rows is 1.5"),
        ({"overrides": {"up_proj": {"block": 48}}}, r"overrides\['up_proj'\]: block is 48"),
        ({"overrides": {"up_proj": {"plane_widths": (5,)}}}, r"overrides\['up_proj'\]: plane_widths"),
        ({"overrides": {"up_proj": {"stored_bits": 0}}}, r"overrides\['up_proj'\]: stored_bits is 0"),
        ({"overrides": {"up_proj": {"bits": 3}}}, "sets 'bits', may set plane_widths, block, stored_bits"),
        ({"dial_grid": (0, 1)}, "dial_grid"),
        ({"dial_grid": (0, -1, 64)}, "dial_grid"),
        ({"bits": 4}, "no setting named 'bits'"),
        ({"quant_method": "gptq"}, "quant_method"),
    ],
)
def test_bad_settings_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GrinqhConfig(**settings)


def test_the_later_of_two_overrides_wins() -> None:
    config = GrinqhConfig((2, 2), overrides={"*_proj": {"block": 32, "stored_bits": 4}, "up_proj": {"block": 128}})
    assert config.format("mlp.up_proj") == LayerFormat((2, 2), 128)
    assert config.format("mlp.down_proj").block == 32
    assert config.format("mlp.experts").block == 64
    assert config.layer_stored_bits("mlp.up_proj") == 4
    assert config.layer_stored_bits("mlp.experts") is None


@pytest.mark.parametrize(
    ("pattern", "matching"),
    [
        ("down_proj", True),
        ("mlp.*", True),
        ("model.layers.1?.mlp.down_proj", True),
        ("layers.12.*", True),
        ("proj", False),
        ("layers.1.*", False),
        ("mlp", False),
        ("DOWN_PROJ", False),
    ],
)
def test_a_pattern_means_the_whole_name_or_its_last_parts(pattern: str, matching: bool) -> None:
    assert matches(pattern, "model.layers.12.mlp.down_proj") is matching


def test_keeping_planes_shortens_the_widths_of_every_layer() -> None:
    config = GrinqhConfig((2, 1, 1, 2, 2), overrides={"up_proj": {"plane_widths": (4, 2, 1)}})
    config.keep_planes(6)
    assert config.plane_widths == (2, 1, 1, 2)
    assert config.format("up_proj").plane_widths == (4, 2)
    config.keep_planes(None)
    assert config.plane_widths == (2, 1, 1, 2)
    with pytest.raises(InputError, match="stored_bits is 1, must be at least 2"):
        config.keep_planes(1)
