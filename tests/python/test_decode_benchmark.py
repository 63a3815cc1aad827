"""What decode.py measures and how it is shown, as far as that needs no GPU."""

from __future__ import annotations

import dataclasses
import importlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FUSED = ("grinqh, fused", "grinqh, fused, head too", "grinqh, fused layers, head too")
TINY = ["--tiny", "--models", "qwen3-8b", "--batches", "1", "2", "--prefill", "32"]


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    names = ("decode", "decode_methods", "decode_models", "decode_report", "int4_linear", "replay")
    return {name: importlib.import_module(name) for name in names}


@pytest.mark.parametrize("name", ["llama3-8b", "qwen3-8b"])
def test_models_are_finite_and_the_same_every_time(modules: dict[str, Any], name: str) -> None:
    models = modules["decode_models"]
    config = models.model_config(name, tiny=True)
    ids = torch.arange(16)[None]
    with torch.no_grad():
        first, again = (models.random_model(config, torch.float32, torch.device("cpu"))(ids).logits for _ in range(2))
    assert torch.isfinite(first).all()
    assert torch.equal(first, again)


def test_full_sized_models_have_eight_billion_parameters(modules: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    for name in modules["decode_models"].CONFIGS:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(modules["decode_models"].model_config(name))
        assert 8.0e9 < sum(parameter.numel() for parameter in model.parameters()) < 8.3e9


def test_a_step_with_the_static_cache_is_that_of_the_whole_sequence(modules: dict[str, Any]) -> None:
    decode, models = modules["decode"], modules["decode_models"]
    model = models.build_model("llama3-8b", torch.float32, torch.device("cpu"), tiny=True)
    with torch.no_grad():
        step = decode.DecodeStep(model, 2)
        outputs = []
        for _ in range(2):
            step.prepare(3)
            outputs.append(step())
        generator = torch.Generator().manual_seed(2)
        vocabulary = model.config.vocab_size
        torch.randint(vocabulary, (decode.TOKENS, 2, 1), generator=generator)
        prompt = torch.randint(vocabulary, (2, decode.POSITION), generator=generator)
        whole = model(torch.cat([prompt, step.ids], dim=1), logits_to_keep=1).logits
    assert torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[0], whole, rtol=1e-4, atol=1e-5)


def test_every_method_decodes_with_the_attention_asked_for(modules: dict[str, Any]) -> None:
    decode = modules["decode"]
    parse, names = decode.parse_arguments, set()
    for attention in decode.ATTENTIONS:
        options = parse(["--tiny", "--batches", "1", "--prefill", "--attention", attention])
        built: list[Any] = []
        method = dataclasses.replace(modules["decode_methods"].METHODS[0], convert=built.append)
        next(decode.measure("qwen3-8b", method, torch.device("cpu"), options))
        names.add(built[0].config._attn_implementation)
    assert names == {"sdpa", "grinqh_grouped"}
    assert parse([]).attention == "grouped"


def test_int4_codes_are_within_half_a_step(modules: dict[str, Any]) -> None:
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    codes, scales_and_zeros = modules["int4_linear"].quantize_int4(weight)
    scale, zero = scales_and_zeros.float().permute(2, 1, 0).repeat_interleave(128, dim=2)
    restored = (codes.float() - 8) * scale + zero
    assert codes.max() == 15
    assert ((restored - weight).abs() <= 0.55 * scale + 0.02).all()  # scales and zeros are rounded to bfloat16


def test_compiled_int4_products_are_one_opaque_op(modules: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    int4 = modules["int4_linear"]
    monkeypatch.setattr(int4, "int4_product", lambda rows, weight, scales: rows.sum(1, keepdim=True) * scales[0, :, 0])
    layer = int4.Int4Linear.__new__(int4.Int4Linear)  # torch packs int4 weights on a GPU only
    torch.nn.Module.__init__(layer)
    layer.in_features, layer.out_features = 128, 4
    layer.weight, layer.scales_and_zeros = torch.zeros(1), torch.rand(1, 4, 2)
    targets: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    x = torch.randn(2, 3, 128)
    torch.testing.assert_close(torch.compile(layer, backend=backend, fullgraph=True)(x), layer(x))
    assert any("int4_linear.product" in target for target in targets)


def test_a_whole_run_on_a_tiny_model(
    modules: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = [
        *TINY,
        "--methods",
        "float16",
        "tinygemm int4",
        "grinqh",
        *FUSED,
        "--json",
        str(tmp_path / "results.json"),
    ]
    results = modules["decode"].run(modules["decode"].parse_arguments(options))
    assert (tmp_path / "results.json").exists()
    if not torch.cuda.is_available():
        assert "tinygemm int4" in capsys.readouterr().err
        assert {row["method"] for row in results["decode"]} == {"float16", "grinqh", *FUSED}
    own = [row for row in results["decode"] if row["method"] == "grinqh" and row["batch"] == 1]
    assert [row["bits"] for row in own] == list(modules["decode_methods"].DIAL)
    assert all(abs(row["read_bits"] / row["bits"] - 1) < 0.2 for row in own)
    assert [row["mode"] for row in results["prefill"] if row["method"] == "grinqh"] == ["eager", "graph"]
    assert modules["decode_report"].tables(results).count("### qwen3-8b") == 1


def decode_row(method: str, bits: float, batch: int, tokens_per_s: float, mode: str = "eager") -> dict[str, Any]:
    return {
        "model": "llama3-8b",
        "method": method,
        "mode": mode,
        "bits": bits,
        "read_bits": bits + 0.01,
        "batch": batch,
        "ms": batch / tokens_per_s * 1e3,
        "tokens_per_s": tokens_per_s,
        "captures": 1,
    }


def handmade() -> dict[str, Any]:
    return {
        "gpu": "a GPU",
        "versions": {"torch": "2.0", "transformers": "5.0", "python": "3.12"},
        "commit": "abc",
        "date": "2026-01-01",
        "cache_length": 1024,
        "position": 512,
        "tiny": False,
        "layers": None,
        "attention": "grouped",
        "decode": [
            decode_row("float16", 16, 1, 100),
            decode_row("float16", 16, 2, 190),
            decode_row("float16", 16, 1, 120, "compiled"),
            decode_row("tinygemm int4", 4, 1, 210),
            decode_row("grinqh", 3, 1, 250),
            decode_row("grinqh", 3, 2, 380),
            decode_row("grinqh", 3, 1, 300, "compiled"),
        ],
        "parts": [
            {
                "model": "llama3-8b", "method": "grinqh", "mode": "eager", "bits": 3.0, "kernels": 900, "ms": 4.0,
                "linears_ms": 2.0, "head_ms": 0.5, "attention_ms": 0.4, "rest_ms": 0.9,
            }
        ],
        "kernels": [],
        "prefill": [
            {
                "model": "llama3-8b", "method": "float16", "mode": mode, "tokens": 512, "ms": ms, "tokens_per_s": 17e3,
            }
            for mode, ms in (("eager", 30.04), ("graph", 28.96))
        ],
        "memory": [{"model": "llama3-8b", "method": "float16", "weights_gb": 16.06, "peak_gb": 17.2}],
    }  # fmt: skip


def test_tables_show_ratios_to_float16_in_the_same_mode(modules: dict[str, Any]) -> None:
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in modules["decode_report"].tables(handmade()).splitlines()
    ]
    assert ["grinqh, 3 bits", "3.01", "250 (2.50x)", "380 (2.00x)"] in lines
    assert ["grinqh, 3 bits, compiled", "3.01", "300 (2.50x)", ""] in lines
    assert ["tinygemm int4", "4.01", "210 (2.10x)", ""] in lines
    assert ["grinqh, 3 bits", "900", "4.000", "2.000", "0.500", "0.400", "0.900", "0.200"] in lines
    assert ["float16", "30.0", "29.0", "16.1", "17.2"] in lines
    assert "512 of them filled; grouped attention." in modules["decode_report"].tables(handmade())


def test_runs_of_one_commit_are_shown_together(modules: dict[str, Any]) -> None:
    together = modules["decode_report"].together
    other = handmade() | {"decode": [decode_row("float16", 16, 1, 90) | {"model": "qwen3-8b"}]}
    both = together([handmade(), other])
    assert len(both["decode"]) == 8
    assert modules["decode_report"].tables(both).count("\n### ") == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [("gpu", "another"), ("commit", "def"), ("cache_length", 512), ("layers", 2), ("attention", "sdpa")],
)
def test_runs_that_differ_are_not_shown_together(modules: dict[str, Any], key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"the runs differ in {key}: .* and {value}"):
        modules["decode_report"].together([handmade(), handmade() | {key: value}])


def test_the_picture_shows_compiled_steps_where_there_are_any(modules: dict[str, Any]) -> None:
    of_one_sequence, rows = modules["decode_report"].of_one_sequence, handmade()["decode"]
    mode, shown = of_one_sequence(rows)
    assert (mode, [row["tokens_per_s"] for row in shown]) == ("compiled", [120, 300])
    mode, shown = of_one_sequence([row for row in rows if row["mode"] == "eager"])
    assert (mode, [row["tokens_per_s"] for row in shown]) == ("eager", [100, 210, 250])


@pytest.mark.usefixtures("modules")  # finds the benchmarks
def test_a_replay_s_time_is_its_part_of_a_run_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    replay = importlib.import_module("replay")
    log: list[Any] = []

    def take(call: Any, prepare: Any, runs: int) -> float:
        for i in range(runs):
            prepare(i)
            call()
        return 40.0  # of one run

    monkeypatch.setattr(replay, "median_milliseconds", take)
    timed = replay.Replay(lambda: log.append("replay"))
    log.clear()  # a GPU captures first
    timed.run = lambda: log.append("replay")
    assert timed.milliseconds(lambda i: log.append(i), runs=2) == 40.0 / replay.TOGETHER
    assert log == [0, *["replay"] * replay.TOGETHER, 1, *["replay"] * replay.TOGETHER]


def test_the_report_fills_the_page_and_draws_the_picture(modules: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for page in ("docs/decode.md", "README.md"):
        shutil.copy(BENCHMARKS.parent / page, tmp_path / page)
    elsewhere = handmade() | {"gpu": "another", "decode": [decode_row("float16", 16, 1, 77)]}
    modules["decode_report"].write_report([handmade(), elsewhere], tmp_path)
    page = (tmp_path / "docs/decode.md").read_text(encoding="utf-8")
    assert "250 (2.50x)" in page
    assert page.index("### llama3-8b, a GPU") < page.index("### llama3-8b, another") < page.index("77 (1.00x)")
    summary = (tmp_path / "README.md").read_text(encoding="utf-8")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in summary.splitlines()]
    assert ["llama3-8b, grinqh, 3 bits, compiled", "3.01", "300", "2.50x"] in [line[:4] for line in cells]
    assert (tmp_path / "docs/decode.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="full size"):
        modules["decode_report"].write_report([handmade(), handmade() | {"layers": 2}], tmp_path)
