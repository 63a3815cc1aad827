"""Conversion of a folder: what is written, what is refused, and that nothing half written is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_gguf import make_gguf
from tiny_source import make_source, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import grinqh
from grinqh import convert as conversion
from grinqh import model, streaming
from grinqh.convert import convert
from grinqh.evaluate import token_windows
from grinqh.gguf import check_gguf
from grinqh.source import Source

TEXT = "It was the best of times, it was the worst of times. " * 40


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def converted(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "converted"
    convert(source, out, calibration=text, command="the command of this test")
    return out


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test where a refusal comes only after loading has begun."""

    def load(*_: Any) -> None:
        pytest.fail("work began before the input was refused")

    monkeypatch.setattr(Source, "load_quantized", load)


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---- what is written


def test_a_converted_folder_loads_as_any_other_and_reads_in_full_almost_as_before(
    source: Path, converted: Path
) -> None:
    ids = make_tokenizer()(TEXT[:100], return_tensors="pt").input_ids
    full = AutoModelForCausalLM.from_pretrained(source)(ids).logits
    packed = AutoModelForCausalLM.from_pretrained(converted)
    assert len(grinqh.packed_layers(packed)) == 14
    assert (packed(ids).logits - full).norm() < 0.03 * full.norm()


def test_the_dial_is_calibrated(converted: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted)
    read = []
    for target in (2.0, 4.0):
        grinqh.set_bits(model, target)
        grinqh.count_reads(model)
        grinqh.reset_read_stats(model)
        with grinqh.graded(model), torch.no_grad():
            model(make_tokenizer()(TEXT[:300], return_tensors="pt").input_ids)
        read.append(grinqh.read_stats(model).read_bits)
    assert read == pytest.approx([2.0, 4.0], rel=0.1)


def test_shards_and_a_single_file_convert_alike(text: Path, converted: Path, tmp_path: Path) -> None:
    sharded = make_source(tmp_path / "sharded", shards=True)
    assert len(list(sharded.glob("*.safetensors"))) > 1
    convert(sharded, tmp_path / "out", calibration=text)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", converted))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_tokenizer_and_generation_config_are_copied_as_they_are(source: Path, converted: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (converted / name).read_bytes() == (source / name).read_bytes()


def test_the_model_card_gives_command_and_figures(converted: Path) -> None:
    card = (converted / "README.md").read_text(encoding="utf-8")
    assert "the command of this test" in card
    assert "14 linear layers, 61,440 weights" in card
    assert "stored bits | 8.000" in card
    assert "read bits | 3: the dial's setting" in card
    assert "perplexity" not in card


def test_the_model_card_gives_read_bits_by_pattern(source: Path, text: Path, tmp_path: Path) -> None:
    config = grinqh.GrinqhConfig(read_bits={"*": 3.5, "mlp.*": 2})
    convert(source, tmp_path / "out", config, calibration=text)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "read bits | 3.5 for `*`, 2 for `mlp.*`: the dial's setting" in card


def test_the_model_card_gives_the_perplexity_on_a_text(source: Path, text: Path, tmp_path: Path) -> None:
    made = convert(source, tmp_path / "out", grinqh.GrinqhConfig(read_bits=2.5), calibration=text, evaluation=text)
    assert made.evaluation is not None
    full = AutoModelForCausalLM.from_pretrained(source)
    windows = token_windows(make_tokenizer(), TEXT, 512)
    with torch.no_grad():
        loss = torch.stack([full(ids[None], labels=ids[None]).loss for ids in windows.ids]).mean()
    assert made.evaluation.reference_perplexity == pytest.approx(float(loss.exp()), rel=1e-4)
    assert made.evaluation.read_bits == pytest.approx(2.5, rel=0.1)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"perplexity | {made.evaluation.perplexity:.2f} at {made.evaluation.read_bits:.2f} read bits, " in card
    assert "of calibration.txt; every token graded |\n\nThe licence" in card


def test_evaluating_changes_nothing_in_the_model(converted: Path, source: Path, text: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", calibration=text, evaluation=text)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (converted / name).read_bytes()


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_have_the_mode_that_the_umask_gives(source: Path, text: Path, tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        convert(source, tmp_path / "out", calibration=text)
    finally:
        os.umask(before)
    out = tmp_path / "out"
    assert out.stat().st_mode & 0o777 == 0o777 & ~umask
    assert {file.stat().st_mode & 0o777 for file in out.iterdir()} == {0o666 & ~umask}


def test_stored_bits_are_what_was_asked_for(source: Path, text: Path, tmp_path: Path) -> None:
    made = convert(source, tmp_path / "out", grinqh.GrinqhConfig(stored_bits=5.0), calibration=text)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert 4.8 < made.stored_bits <= 5.0
    assert grinqh.stored_bits(model) == pytest.approx(made.stored_bits)


def test_a_tied_head_is_converted_when_asked_for(source: Path, text: Path, tmp_path: Path) -> None:
    made = convert(source, tmp_path / "out", grinqh.GrinqhConfig(convert_lm_head=True), calibration=text)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert made.layers == 15
    assert isinstance(model.lm_head, grinqh.GrinqhLinear)
    assert not isinstance(model.get_input_embeddings().weight, type(None))


def test_force_replaces_a_model(source: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, out, calibration=text)
    (out / "stale").touch()
    convert(source, out, calibration=text, force=True)
    assert "stale" not in left_in(out)
    assert left_in(tmp_path) == {"out"}


# ---- what is refused, before any work


@pytest.mark.usefixtures("no_work")
def test_an_existing_output_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(grinqh.InputError, match="out exists"):
        convert(source, tmp_path / "out")


@pytest.mark.usefixtures("no_work")
def test_force_does_not_replace_what_is_no_model(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").touch()
    with pytest.raises(grinqh.InputError, match="is no model folder"):
        convert(source, tmp_path / "out", force=True)
    assert left_in(tmp_path / "out") == {"precious.txt"}


@pytest.mark.usefixtures("no_work")
def test_an_output_that_cannot_be_written_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "missing" / "out", tmp_path / "file" / "out"):
        with pytest.raises(grinqh.InputError, match="does not exist"):
            convert(source, out)
    monkeypatch.setattr(os, "access", lambda *_: False)  # a test may run as root, whom no mode stops
    with pytest.raises(grinqh.InputError, match="is not writable"):
        convert(source, tmp_path / "out")


@pytest.mark.usefixtures("no_work")
def test_a_damaged_or_truncated_weight_file_is_refused(tmp_path: Path) -> None:
    folder = make_source(tmp_path / "model")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:40], b"", b"\xff" * 100, whole[:20] + b"}" + whole[21:]):
        weights.write_bytes(damaged)
        with pytest.raises(grinqh.InputError, match=r"model\.safetensors"):
            convert(folder, tmp_path / "out")
    weights.unlink()
    with pytest.raises(grinqh.InputError, match=r"holds no model\.safetensors"):
        convert(folder, tmp_path / "out")
    assert left_in(tmp_path) == {"model"}


@pytest.mark.usefixtures("no_work")
def test_a_missing_or_truncated_shard_and_a_bad_index_are_refused(tmp_path: Path) -> None:
    folder = make_source(tmp_path / "model", shards=True)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(grinqh.InputError, match=shard.name):
        convert(folder, tmp_path / "out")
    shard.unlink()
    with pytest.raises(grinqh.InputError, match=shard.name):
        convert(folder, tmp_path / "out")
    for index in ("not JSON", "[]", "{}"):
        (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
        with pytest.raises(grinqh.InputError, match=r"index\.json"):
            convert(folder, tmp_path / "out")


@pytest.mark.usefixtures("no_work")
def test_what_is_no_full_precision_model_is_refused(converted: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello", encoding="utf-8")
    for source, words in (
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "empty", r"holds no config\.json"),
        (tmp_path / "notes.txt", "neither"),
        (converted, "quantized already"),
    ):
        with pytest.raises(grinqh.InputError, match=words):
            convert(source, tmp_path / "out")


@pytest.mark.usefixtures("no_work")
def test_a_text_that_cannot_be_read_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    for name, words in (("nowhere", "cannot read"), ("empty", "is empty"), ("latin", "not UTF-8")):
        with pytest.raises(grinqh.InputError, match=words):
            convert(source, tmp_path / "out", calibration=tmp_path / name)
        with pytest.raises(grinqh.InputError, match=words):
            convert(source, tmp_path / "out", evaluation=tmp_path / name)


# ---- what is refused or interrupted while working, with nothing half written left behind


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, bad: float) -> None:
    folder = make_source(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = bad
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(grinqh.InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        convert(folder, tmp_path / "out")
    assert left_in(tmp_path) == {"model"}


def test_a_model_whose_layers_are_all_excluded_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(grinqh.InputError, match="no layer to convert"):
        convert(source, tmp_path / "out", grinqh.GrinqhConfig(modules_to_not_convert=["*"]))
    assert left_in(tmp_path) == set()


def test_a_pattern_that_matches_nothing_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(grinqh.InputError, match="no_such_layer"):
        convert(source, tmp_path / "out", grinqh.GrinqhConfig(modules_to_not_convert=["no_such_layer"]))


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_conversion_leaves_only_its_packed_layers(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruption: type[BaseException]
) -> None:
    def interrupted(*_: Any) -> None:
        raise interruption

    monkeypatch.setattr(Source, "copy_companions", interrupted)  # after the weights were written
    with pytest.raises(interruption):
        convert(source, tmp_path / "out", calibration_tokens=256)
    assert left_in(tmp_path) == {"out.packing"}


def test_a_failed_replacement_leaves_the_old_model(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(source, tmp_path / "out", calibration=text)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr(conversion, "calibrate", fail)
    with pytest.raises(RuntimeError):
        convert(source, tmp_path / "out", force=True)
    assert left_in(tmp_path) == {"out", "out.packing"}
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_terminated_conversion_leaves_only_its_packed_layers(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "grinqh", "convert", str(source), str(tmp_path / "out")]
    process = subprocess.Popen([*command, "--calibration-tokens", "100000000"], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not left_in(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert any(name.startswith("out.partial-") for name in left_in(tmp_path))
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert left_in(tmp_path) <= {"out.packing"}


# ---- GGUF


def write_gguf(path: Path) -> bytes:
    """A well-formed GGUF file of an architecture that is none."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "nonesuch")
    writer.add_tensor("weight", torch.randn(64, 64).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_a_gguf_file_converts_as_the_folder_of_the_same_model(text: Path, converted: Path, tmp_path: Path) -> None:
    convert(make_gguf(tmp_path / "tiny.gguf"), tmp_path / "out", calibration=text)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", converted))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(TEXT).input_ids == make_tokenizer()(TEXT).input_ids


def test_an_unreadable_gguf_file_is_refused(tmp_path: Path) -> None:
    whole = make_gguf(tmp_path / "whole.gguf").read_bytes()
    foreign = write_gguf(tmp_path / "foreign.gguf")
    file = tmp_path / "model.gguf"
    for content in (b"", b"NOPE" + whole[4:], b"GGUF" + b"\xff" * 64, whole[: len(whole) // 2], whole[:30], foreign):
        file.write_bytes(content)
        with pytest.raises(grinqh.InputError, match=r"cannot read GGUF file .*model\.gguf"):
            convert(file, tmp_path / "out")
    assert left_in(tmp_path) == {"whole.gguf", "foreign.gguf", "model.gguf"}


def test_a_missing_package_for_gguf_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "model.gguf")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(grinqh.InputError, match=r"needs the package gguf: pip install"):
        convert(tmp_path / "model.gguf", tmp_path / "out")


@pytest.mark.parametrize(
    ("version", "refused"), [("5.17.0", True), ("5.22.2", True), ("5.23.0", False), ("6.0.0", False)]
)
def test_a_transformers_that_gets_tokenizers_of_gguf_files_wrong_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, refused: bool
) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file)
    monkeypatch.setattr("importlib.metadata.version", lambda package: {"transformers": version}[package])
    if refused:
        with pytest.raises(grinqh.InputError, match=rf"needs transformers 5\.23 or later, {version} is installed"):
            check_gguf(file)
    else:
        check_gguf(file)


def test_the_recorded_config_is_the_one_asked_for(source: Path, text: Path, tmp_path: Path) -> None:
    config = grinqh.GrinqhConfig(
        plane_widths=(2, 2, 2, 2), block=32, modules_to_not_convert=["down_proj"], read_bits=2.5
    )
    convert(source, tmp_path / "out", config, calibration=text)
    recorded = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert recorded["plane_widths"] == [2, 2, 2, 2]
    assert (recorded["block"], recorded["read_bits"]) == (32, 2.5)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(model.model.layers[0].mlp.down_proj, torch.nn.Linear)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = make_source(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        fewer = {key: tensor for key, tensor in tensors.items() if key != name}
        save_file(fewer, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(grinqh.InputError, match=name):
            convert(folder, tmp_path / "out")


@pytest.mark.parametrize("convert_lm_head", [False, True])
def test_packing_while_loading_gives_what_packing_a_loaded_model_gives(tmp_path: Path, convert_lm_head: bool) -> None:
    folder = make_source(tmp_path / "model", shards=True)
    config = grinqh.GrinqhConfig(convert_lm_head=convert_lm_head, modules_to_not_convert=["k_proj"])
    loaded = grinqh.quantize_model(AutoModelForCausalLM.from_pretrained(folder), config, progress=False)
    streamed = Source(folder).load_quantized(config)
    ours, theirs = streamed.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if not name.endswith(".dial"))
    assert type(streamed.model.layers[0].self_attn.k_proj) is torch.nn.Linear


def test_one_weight_at_a_time_is_at_full_precision_while_loading(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []
    most = []

    def watch(name: str, weight: torch.Tensor, *options: Any) -> Any:
        alive.append(weakref.ref(weight.untyped_storage()))
        most.append(sum(storage() is not None for storage in alive))
        return pack_weight(name, weight, *options)

    pack_weight = model.pack_weight
    monkeypatch.setattr(streaming, "pack_weight", watch)
    Source(source).load_quantized(grinqh.GrinqhConfig())
    assert len(most) == 14
    assert max(most) == 1
