"""Conversions that go on where an interrupted one stopped, and the packed layers that they keep for it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_gguf import make_gguf
from tiny_source import make_source

import grinqh
from grinqh import packing
from grinqh.cli import main
from grinqh.convert import convert
from grinqh.resume import KeptLayers

LAYERS = 14


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source(tmp_path / "model", shards=True)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the weights that are packed from now on."""
    names: list[str] = []
    pack = packing.pack_weight

    def watch(weight: torch.Tensor, format: Any, *, name: str, **options: Any) -> Any:
        names.append(name)
        return pack(weight, format, name=name, **options)

    monkeypatch.setattr(packing, "pack_weight", watch)
    return names


def run(source: Path, out: Path, config: grinqh.GrinqhConfig | None = None, **options: Any) -> dict[str, torch.Tensor]:
    convert(source, out, config, calibration_tokens=256, **options)
    return load_file(out / "model.safetensors")


def interrupt(
    source: Path, out: Path, after: int = 5, error: type[BaseException] = KeyboardInterrupt, **options: Any
) -> None:
    """Stops a conversion in the middle of its layers."""
    pack = packing.pack_weight
    done = 0

    def stop(*arguments: Any, **named: Any) -> Any:
        nonlocal done
        if done == after:
            raise error
        done += 1
        return pack(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "pack_weight", stop)
        with pytest.raises((error, grinqh.InputError)):
            run(source, out, **options)


def kept(out: Path) -> list[Path]:
    return sorted(out.with_name("out.packing").glob("*.safetensors"))


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- going on


@pytest.mark.parametrize("after", [0, 5, 13])
def test_a_resumed_conversion_packs_only_what_is_left_and_gives_the_same(
    source: Path, out: Path, packed: list[str], after: int, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = run(source, out.with_name("uninterrupted"))
    interrupt(source, out, after)
    assert not out.exists()
    assert len(kept(out)) == after
    packed.clear()
    capsys.readouterr()
    assert_same(run(source, out), expected)
    assert len(packed) == LAYERS - after
    assert (f"{after} layers were packed by an earlier run" in capsys.readouterr().err) == (after > 0)


def test_rotated_heads_are_packed_anew_for_another_calibration_text(
    source: Path, out: Path, tmp_path: Path, packed: list[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times. " * 40, encoding="utf-8")
    expected = run(source, out.with_name("uninterrupted"), calibration=text)
    interrupt(source, out, LAYERS - 1)
    packed.clear()
    assert_same(run(source, out, calibration=text), expected)
    assert len(packed) == LAYERS


def test_errors_of_the_machine_interrupt_too(source: Path, out: Path, packed: list[str]) -> None:
    interrupt(source, out, error=OSError)
    packed.clear()
    run(source, out)
    assert len(packed) == LAYERS - 5


def test_a_gguf_file_is_resumed_too(tmp_path: Path, out: Path, packed: list[str]) -> None:
    source = make_gguf(tmp_path / "tiny.gguf")
    expected = run(source, tmp_path / "uninterrupted")
    interrupt(source, out)
    packed.clear()
    assert_same(run(source, out), expected)
    assert len(packed) == LAYERS - 5


def test_a_conversion_interrupted_after_packing_packs_nothing_again(
    source: Path, out: Path, packed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("grinqh.convert.calibrate", _raise(RuntimeError))
        with pytest.raises(RuntimeError):
            run(source, out)
    packed.clear()
    run(source, out)
    assert packed == []


def _raise(error: type[Exception]) -> Callable[..., None]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def test_nothing_is_kept_once_the_model_is_complete(source: Path, out: Path, tmp_path: Path) -> None:
    run(source, out)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}


# ---- what is not used again


def test_a_changed_source_is_packed_anew(source: Path, out: Path, packed: list[str]) -> None:
    interrupt(source, out)
    shard = sorted(source.glob("*.safetensors"))[0]
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))
    packed.clear()
    run(source, out)
    assert len(packed) == LAYERS


@pytest.mark.parametrize(
    "changed",
    [
        {"config": grinqh.GrinqhConfig(block=32)},
        {"config": grinqh.GrinqhConfig(plane_widths=(4, 4))},
        {"dtype": "bfloat16"},
    ],
)
def test_other_settings_discard_what_is_kept(source: Path, out: Path, packed: list[str], changed: Any) -> None:
    interrupt(source, out)
    packed.clear()
    interrupt(source, out, after=3, **changed)
    assert len(packed) == 3
    assert len(kept(out)) == 3
    run(source, out, **changed)
    assert len(packed) == LAYERS


def test_damaged_layers_are_packed_anew(source: Path, out: Path, packed: list[str]) -> None:
    expected = run(source, out.with_name("uninterrupted"))
    interrupt(source, out, 4)
    cut, empty, foreign, whole = kept(out)
    cut.write_bytes(cut.read_bytes()[:-1])
    empty.write_bytes(b"")
    foreign.write_bytes(next(f for f in kept(out) if f.stat().st_size != foreign.stat().st_size).read_bytes())
    packed.clear()
    assert_same(run(source, out), expected)
    assert f"{whole.stem}.weight" not in packed
    assert len(packed) == LAYERS - 1


def test_without_resuming_nothing_is_used_or_kept(source: Path, out: Path, packed: list[str]) -> None:
    interrupt(source, out)
    packed.clear()
    interrupt(source, out, after=6, resume=False)
    assert len(packed) == 6
    assert not out.with_name("out.packing").exists()
    packed.clear()
    assert main(["convert", str(source), str(out), "--calibration-tokens", "256", "--no-resume"]) == 0
    assert len(packed) == LAYERS


def test_bad_weights_leave_nothing(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "check_weight", _raise(grinqh.InputError))
    with pytest.raises(grinqh.InputError):
        run(source, out)
    assert {path.name for path in out.parent.iterdir()} == {"model"}


# ---- the folder


def test_a_folder_of_another_origin_is_left_alone(source: Path, out: Path) -> None:
    other = out.with_name("out.packing")
    other.mkdir()
    (other / "precious.safetensors").touch()
    for resume in (True, False):
        with pytest.raises(grinqh.InputError, match=r"out\.packing holds something else"):
            run(source, out, resume=resume)
    assert (other / "precious.safetensors").exists()


def test_two_conversions_to_one_place_are_refused(source: Path, out: Path) -> None:
    with KeptLayers(out, "of the first"), pytest.raises(grinqh.InputError, match="another conversion"):
        run(source, out)
    run(source, out)


def test_a_killed_conversion_is_resumed(source: Path, out: Path, packed: list[str]) -> None:
    killed = """
import os, sys
from grinqh import packing
from grinqh.cli import main
pack, done = packing.pack_weight, []
def stop(*arguments, **named):
    done.append(0)
    return pack(*arguments, **named) if len(done) < 8 else os.kill(os.getpid(), 9)
packing.pack_weight = stop
main(["convert", *sys.argv[1:], "--calibration-tokens", "256"])
"""
    done = subprocess.run([sys.executable, "-c", killed, str(source), str(out)], stderr=subprocess.DEVNULL)
    assert done.returncode == -9
    assert len(kept(out)) == 7
    run(source, out)
    assert len(packed) == LAYERS - 7
