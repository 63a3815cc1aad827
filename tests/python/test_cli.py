"""The command line: what goes to stdout and stderr, exit codes, and that each command does what it says."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_gguf import make_gguf
from tiny_source import make_source
from transformers import AutoModelForCausalLM

import grinqh
from grinqh.cli import bench, main
from grinqh.convert import convert
from grinqh.device import describe_device, find_device
from grinqh.ops import cpu_isa
from grinqh.source import Source

TEXT = "It was the best of times, it was the worst of times. " * 40
DEVICE_LINE = f"device: cpu ({cpu_isa()} kernels)\n"


@pytest.fixture(autouse=True)
def own_warnings() -> Iterator[None]:
    """Puts back how Python shows warnings, which the command line changes."""
    with warnings.catch_warnings():
        yield


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs by default is the CPU, also where there is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def two_gpus(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two GPUs, as far as one can tell without running anything."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU number {device.index}")
    monkeypatch.setattr("grinqh.device.has_cuda_kernels", lambda: True)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "converted"
    grinqh_convert = ["convert", str(source), str(out), "--calibration", str(text), "--stored-bits", "6"]
    assert main([*grinqh_convert, "--device", "cpu"]) == 0
    return out


@pytest.fixture
def result(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs a command with --json; nothing but the object may be printed, and on stderr what runs."""

    def run(*arguments: object) -> Any:
        assert main([*map(str, arguments), "--json"]) == 0
        printed = capsys.readouterr()
        assert printed.err == ("" if arguments[0] == "info" else DEVICE_LINE)
        return json.loads(printed.out)

    return run


# ---- the commands


def test_convert_reports_what_it_made(source: Path, text: Path, tmp_path: Path, result: Callable[..., Any]) -> None:
    options = ["--plane-widths", "2,2,2,2", "--block", "32", "--exclude", "down_proj", "lm_head", "--read-bits", "2.5"]
    made = result("convert", source, tmp_path / "out", "--calibration", text, "--calibration-tokens", "500", *options)
    assert made["layers"] == 12
    assert made["stored_bits"] == 8
    assert made["calibration"] == "text.txt"
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert (config["plane_widths"], config["block"], config["read_bits"]) == ([2, 2, 2, 2], 32, 2.5)
    assert "--exclude down_proj lm_head" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_convert_makes_one_layer_of_projections_with_one_input(
    source: Path, text: Path, tmp_path: Path, result: Callable[..., Any]
) -> None:
    apart = result("convert", source, tmp_path / "apart", "--calibration", text)
    fused = result("convert", source, tmp_path / "fused", "--calibration", text, "--fuse")
    assert fused["layers"] == apart["layers"] * 4 // 7  # qkv, o, gate and up, down
    assert fused["weights"] == apart["weights"]
    answer = result("generate", tmp_path / "fused", "the dial", "--max-new-tokens", 3, "--bits", 3)
    assert answer["new_tokens"] == 3


def test_convert_of_a_gguf_file_is_quiet_where_nobody_watches(
    text: Path, tmp_path: Path, result: Callable[..., Any]
) -> None:
    made = result("convert", make_gguf(tmp_path / "tiny.gguf"), tmp_path / "out", "--calibration", text)
    assert made["source"] == "tiny"


def test_info_agrees_with_the_loaded_model(model: Path, result: Callable[..., Any]) -> None:
    info = result("info", model)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    assert info["layers"] == len(grinqh.packed_layers(loaded)) == 14
    assert info["stored_bits"] == pytest.approx(grinqh.stored_bits(loaded))
    assert 5.8 < info["stored_bits"] <= 6
    assert info["packed_bytes"] == grinqh.packed_bytes(loaded)
    assert info["total_bytes"] == (model / "model.safetensors").stat().st_size
    assert [plane["width"] for plane in info["planes"]] == [2, 2, 2, 2]
    parts = [plane["channels_stored"] for plane in info["planes"]]
    assert parts[0] == 1
    assert parts == sorted(parts, reverse=True)
    settings = {row["read_bits"]: row for row in info["dial"]}
    assert 4.0 in settings
    assert all(row["least"] <= target <= row["most"] for target, row in settings.items())


def test_info_prints_tables(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(model)]) == 0
    printed = capsys.readouterr().out
    assert "stored bits:" in printed
    assert "plane  width" in printed
    assert "read bits" in printed


def test_generate_reads_the_bits_that_were_set(model: Path, result: Callable[..., Any]) -> None:
    read = [result("generate", model, "It was", "--bits", bits, "--max-new-tokens", 40)["read_bits"] for bits in (2, 4)]
    assert read == pytest.approx([2, 4], rel=0.15)


def test_generate_shows_the_least_and_the_most_that_a_token_read(model: Path, result: Callable[..., Any]) -> None:
    for prompt in ("It was", "It was the best of times"):  # graded, and too long for it
        found = result("generate", model, prompt, "--bits", 3, "--max-new-tokens", 40)
        assert 0 < found["read_bits_min"] < found["read_bits"] < found["read_bits_max"] <= 6
    one = result("generate", model, "It was", "--max-new-tokens", 1)
    assert (one["read_bits"], one["read_bits_min"], one["read_bits_max"]) == (None,) * 3


def test_generate_keeps_the_exact_budget_of_a_model_at_other_bits(
    model: Path, tmp_path: Path, result: Callable[..., Any]
) -> None:
    shutil.copytree(model, tmp_path / "exact")
    config = json.loads((tmp_path / "exact" / "config.json").read_text())
    config["quantization_config"]["exact_budget"] = True
    (tmp_path / "exact" / "config.json").write_text(json.dumps(config))
    found = result("generate", tmp_path / "exact", "It was", "--bits", 3, "--max-new-tokens", 40)
    assert found["read_bits_max"] <= 3
    assert result("generate", model, "It was", "--bits", 3, "--max-new-tokens", 40)["read_bits_max"] > 3


@pytest.mark.parametrize("exact", [False, True])
def test_bench_times_the_kind_of_budget_that_a_model_has(
    model: Path, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = grinqh.from_pretrained(model)
    kinds: list[list[bool]] = []
    grinqh.set_bits(loaded, 4, exact_budget=exact)
    budgets = [layer.budget is not None for layer in grinqh.packed_layers(loaded).values()]
    assert budgets == [exact] * len(budgets)

    def speed(timed: Any, *_: object) -> float:
        kinds.append([layer.budget is not None for layer in grinqh.packed_layers(timed).values()])
        return 1.0

    monkeypatch.setattr(bench, "decode_tokens_per_second", speed)
    bench._time_decoding(loaded, argparse.Namespace(bits=[3.0, 2.0], tokens=1), SimpleNamespace(update=lambda: None))
    assert kinds == [budgets, budgets]


def test_generate_prints_only_the_answer_unless_asked_for_statistics(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(model), "It was", "--max-new-tokens", "4"]) == 0
    plain = capsys.readouterr()
    assert "read_bits" not in plain.out
    assert plain.err == DEVICE_LINE
    assert main(["generate", str(model), "It was", "--max-new-tokens", "4", "--stats"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name}: " in printed for name in ("read_bits", "read_bits_min", "read_bits_max"))


def test_generate_puts_a_question_by_the_chat_template(model: Path, result: Callable[..., Any]) -> None:
    plain = result("generate", model, "Why?", "--max-new-tokens", 8)
    chat = result("generate", model, "Why?", "--max-new-tokens", 8, "--chat")
    assert chat["text"] != plain["text"]


def test_generate_loads_fewer_planes_when_asked(model: Path, result: Callable[..., Any]) -> None:
    assert result("generate", model, "It was", "--stored-bits", 4, "--max-new-tokens", 2)["stored_bits"] <= 4


def test_ppl_compares_settings_with_full_precision(
    model: Path, source: Path, text: Path, tmp_path: Path, result: Callable[..., Any]
) -> None:
    options = ["--text", text, "--window", 64, "--windows", 2, "--reference", source]
    found = result("ppl", model, "--bits", "6,2", *options, "--reference-cache", tmp_path / "cache")
    high, low = found["scores"]
    assert (high["target"], low["target"]) == (6, 2)
    assert high["kl"] < low["kl"]
    assert high["read_bits"] > low["read_bits"]
    assert high["tokens"] == 2 * 63
    assert "2 windows of 64 tokens" in found["windows"]
    again = result("ppl", model, "--bits", "6,2", *options, "--reference-cache", tmp_path / "cache")
    assert again["scores"][0]["kl"] == pytest.approx(high["kl"], abs=1e-4)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_ppl_says_whether_tokens_were_graded(model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["ppl", str(model), "--text", str(text), "--window", "64", "--windows", "1"]
    assert main(arguments) == 0
    assert "every token graded" in capsys.readouterr().out
    assert main([*arguments, "--no-graded"]) == 0
    assert "read in full" in capsys.readouterr().out


def test_bench_times_a_layer_and_the_model(model: Path, result: Callable[..., Any], monkeypatch: Any) -> None:
    monkeypatch.setattr("grinqh.cli.bench.rotation_count", lambda *_: 2)
    found = result("bench", model, "--shape", "64x48", "--bits", "8,2", "--seconds", 0, "--tokens", 2)
    assert [row["method"] for row in found["layer"]] == ["torch float32", "grinqh 8", "grinqh 2"]
    assert all(row["us"] > 0 for row in found["layer"])
    assert [row["read_bits"] for row in found["decode"]] == [8, 2]
    assert all(row["tokens_per_s"] > 0 for row in found["decode"])
    assert {"cpu", "threads"} <= found["hardware"].keys()


@pytest.mark.parametrize("command", ["convert", "generate", "ppl", "info", "bench"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert f"usage: grinqh {command}" in capsys.readouterr().out


# ---- where it runs


def test_every_command_that_runs_a_model_says_where(
    model: Path, source: Path, text: Path, tmp_path: Path, result: Callable[..., Any], monkeypatch: Any
) -> None:
    monkeypatch.setattr("grinqh.cli.bench.rotation_count", lambda *_: 2)
    for device in ("auto", "cpu"):
        out, option = tmp_path / device, ["--device", device]
        assert result("convert", source, out, "--calibration", text, *option)["device"] == "cpu"
        assert result("generate", model, "It was", "--max-new-tokens", 2, *option)["device"] == "cpu"
        assert result("ppl", model, "--text", text, "--window", 64, "--windows", 1, *option)["device"] == "cpu"
        few = ["--shape", "64x48", "--bits", "8", "--seconds", 0, "--tokens", 1]
        assert result("bench", model, *few, *option)["device"] == "cpu"
        assert result("bench", *few, *option)["device"] == "cpu"
    first, second = (load_file(tmp_path / device / "model.safetensors") for device in ("auto", "cpu"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("two_gpus")
def test_auto_is_the_first_gpu_and_others_are_found_by_number() -> None:
    for name, wanted in (("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1"), ("cpu", "cpu")):
        assert find_device(name) == torch.device(wanted)
    assert find_device(torch.device("cuda")) == torch.device("cuda:0")
    assert describe_device(find_device("cuda:1")) == "cuda:1 (GPU number 1)"
    assert describe_device(find_device("cpu")) == f"cpu ({cpu_isa()} kernels)"
    for name in ("cuda:2", "cuda:-1", "cuda:", "gpu", "1", "mps", "meta", ""):
        with pytest.raises(grinqh.InputError, match=rf"device is '{name}', .*available here: cpu, cuda:0, cuda:1$"):
            find_device(name)


@pytest.mark.usefixtures("two_gpus")
def test_gpus_that_the_ops_were_not_built_for_are_named_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grinqh.device.has_cuda_kernels", lambda: False)
    assert find_device("auto") == torch.device("cpu")
    assert describe_device(find_device("auto")).endswith("; this build of grinqh has no CUDA kernels)")
    with pytest.raises(grinqh.InputError, match=r"available here: cpu \(this build of grinqh has no CUDA kernels\)"):
        find_device("cuda:0")


@pytest.mark.usefixtures("two_gpus")
def test_a_model_is_loaded_where_it_shall_run(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from grinqh.cli.common import load_converted

    placements = []
    monkeypatch.setattr(grinqh, "from_pretrained", lambda *_, **options: placements.append(options.get("device_map")))
    for device in ("cpu", "auto", "cuda:1"):
        load_converted(model, find_device(device))
    assert placements == [None, "cuda:0", "cuda:1"]


def test_a_device_that_is_not_there_is_refused_in_one_line(
    model: Path, source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for device in ("cuda", "cuda:7", "gpu"):
        words = f"device is '{device}', must be auto, cpu, cuda or cuda:N; available here: cpu ("
        for command in (
            ["convert", source, tmp_path / "out"],
            ["generate", model, "It was"],
            ["ppl", model, "--text", text],
            ["bench", model],
            ["bench"],
        ):
            assert_refused([*command, "--device", device], words, capsys)
    with pytest.raises(grinqh.InputError, match="device is 'cuda:7'"):
        convert(source, tmp_path / "out", device="cuda:7")
    with pytest.raises(grinqh.InputError, match="device is ''"):
        Source(source).load_quantized(grinqh.GrinqhConfig(), device="")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("two_gpus")
def test_a_layer_alone_is_not_timed_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(["bench", "--device", "cuda:1"], "device is 'cuda:1', must be cpu", capsys)


# ---- bad input: exit code 2 and one line


def damaged(model: Path, folder: Path) -> Path:
    """A copy of a converted model whose weights are cut short."""
    copy = copied(model, folder)
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return copy


def without_a_plane(model: Path, folder: Path) -> Path:
    copy = copied(model, folder)
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.plane_1"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def from_the_future(model: Path, folder: Path) -> Path:
    copy = copied(model, folder)
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"]["format_version"] = 99
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return copy


def copied(model: Path, folder: Path) -> Path:
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def assert_refused(arguments: list[object], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith(f"grinqh {arguments[0]}: ")
    assert words in printed.err


@pytest.mark.parametrize("command", ["info", "generate"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [(damaged, "model.safetensors"), (without_a_plane, "up_proj.plane_1"), (from_the_future, "format_version")],
)
def test_a_bad_model_is_refused_in_one_line(
    command: str, damage: Any, words: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = ["hello"] if command == "generate" else []
    assert_refused([command, damage(model, tmp_path), *prompt], words, capsys)


def test_a_path_that_is_no_converted_model_is_refused_in_one_line(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(["info", tmp_path / "nowhere"], "config.json", capsys)
    assert_refused(["info", source], "grinqh convert", capsys)
    assert_refused(["generate", source, "hello"], "no converted model", capsys)
    assert_refused(["ppl", tmp_path], "config.json", capsys)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    assert_refused(["info", tmp_path], "not JSON", capsys)


def test_bad_values_are_refused_in_one_line(
    model: Path, source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(["generate", model, ""], "PROMPT is empty", capsys)
    for bits in ("9", "-1", "nan"):
        assert_refused(["generate", model, "hello", "--bits", bits], "read_bits", capsys)
    assert_refused(["generate", model, "hello", "--stored-bits", "0.5"], "stored_bits", capsys)
    assert_refused(["ppl", model, "--text", tmp_path / "nowhere"], "nowhere", capsys)
    assert_refused(["ppl", model, "--text", text, "--window", "1"], "window is 1", capsys)
    assert_refused(["ppl", model, "--text", text, "--reference", tmp_path / "nowhere"], "nowhere", capsys)
    assert_refused(["convert", source, tmp_path / "out", "--block", "48"], "block", capsys)
    assert_refused(["convert", source, tmp_path / "out", "--plane-widths", "2,3"], "plane_widths", capsys)
    assert_refused(["convert", source, tmp_path], "exists", capsys)
    assert_refused(["bench", "--bits", "0"], "read_bits", capsys)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonesuch"],
        ["ppl", "model", "--bits", "4,x"],
        ["convert", "a", "b", "--plane-widths", "two"],
        ["generate", "model", "hello", "--max-new-tokens", "0"],
        ["bench", "--shape", "4096"],
    ],
)
def test_a_command_line_that_cannot_be_parsed_exits_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "grinqh" in capsys.readouterr().err


def test_the_module_runs_as_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "grinqh", "info", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"grinqh info: {tmp_path} is no converted model: it holds no config.json\n"
