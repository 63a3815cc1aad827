"""Converted models in several weight files: written on request, loaded bit for bit, refused when one is damaged."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_source import make_source
from transformers import AutoModelForCausalLM

import grinqh
from grinqh.cli import main
from grinqh.convert import convert
from grinqh.shards import shard_bytes
from grinqh.source import Source

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    convert(source, out, calibration_tokens=256)
    return out


@pytest.fixture
def sharded(source: Path, tmp_path: Path) -> Path:
    convert(source, tmp_path / "out", calibration_tokens=256, max_shard_size="50KB")
    return tmp_path / "out"


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*-of-*.safetensors"))


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def tensors(files: Iterable[Path]) -> dict[str, torch.Tensor]:
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_shards_hold_what_a_single_file_holds(sharded: Path, whole: Path) -> None:
    assert len(shards(sharded)) > 2
    for file in shards(sharded):
        sizes = [tensor.nbytes for tensor in load_file(file).values()]
        assert sum(sizes) <= 50_000 or len(sizes) == 1
    assert_same(tensors(shards(sharded)), tensors([whole / "model.safetensors"]))
    weight_map = json.loads((sharded / INDEX).read_text(encoding="utf-8"))["weight_map"]
    assert set(weight_map.values()) == {file.name for file in shards(sharded)}


def test_without_a_size_there_is_one_file(whole: Path) -> None:
    assert [file.name for file in whole.glob("*.safetensors")] == ["model.safetensors"]


def test_shards_are_loaded_bit_for_bit(sharded: Path, whole: Path) -> None:
    assert_same(load(sharded).state_dict(), load(whole).state_dict())


def test_low_planes_can_be_left_in_the_shards(sharded: Path, whole: Path) -> None:
    ours, theirs = (grinqh.from_pretrained(folder, stored_bits=4) for folder in (sharded, whole))
    assert grinqh.stored_bits(ours) == 4
    assert_same(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_shards_are_loaded_where_a_device_map_says(sharded: Path, whole: Path, device_map: Any) -> None:
    pytest.importorskip("accelerate")
    if device_map == "auto" and torch.accelerator.is_available():
        pytest.skip("auto would choose the accelerator")
    loaded = load(sharded, device_map=device_map)
    assert {tensor.device.type for tensor in loaded.state_dict().values()} == {"cpu"}
    assert_same(loaded.state_dict(), load(whole).state_dict())


def test_a_missing_shard_is_named(sharded: Path) -> None:
    lost = shards(sharded)[1]
    lost.unlink()
    for loading in (load, grinqh.from_pretrained):
        with pytest.raises(grinqh.InputError, match=f"{lost.name} does not exist"):
            loading(sharded)


def test_a_truncated_shard_is_named_with_its_tensor(sharded: Path) -> None:
    cut = shards(sharded)[-1]
    cut.write_bytes(cut.read_bytes()[:-10])
    with pytest.raises(grinqh.InputError, match=rf"{cut.name} is cut off: \S+ should end at byte"):
        load(sharded)


def test_the_command_takes_a_shard_size(source: Path, tmp_path: Path) -> None:
    command = ["convert", str(source), str(tmp_path / "out"), "--calibration-tokens", "256"]
    with warnings.catch_warnings():  # puts back how Python shows them
        assert main([*command, "--max-shard-size", "50KB"]) == 0
    assert len(shards(tmp_path / "out")) > 2


@pytest.mark.parametrize(
    ("size", "meant"),
    [(1, 1), ("200", 200), ("2KB", 2000), ("1.5 mb", 1_500_000), ("50GB", 50 * 10**9), ("1TB", 10**12)],
)
def test_a_size_is_a_number_of_bytes_or_has_a_unit(size: int | str, meant: int) -> None:
    assert shard_bytes(size) == meant


@pytest.mark.parametrize("size", [0, -5, "", "GB", "5 apples", "5MiB", "0.0001KB", "1e3"])
def test_what_is_no_size_is_refused_before_any_work(
    size: int | str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Source, "load_quantized", lambda *_: pytest.fail("work began"))
    with pytest.raises(grinqh.InputError, match="max_shard_size is"):
        convert(source, tmp_path / "out", max_shard_size=size)
    assert not list(tmp_path.iterdir())
