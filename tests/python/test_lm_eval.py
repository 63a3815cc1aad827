"""The harness's model type: settings arrive, log-likelihoods are those of graded tokens, errors are clear."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_source import make_model, make_tokenizer

import grinqh

pytest.importorskip("lm_eval")
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.slow]  # warnings of other packages

QUESTIONS = [
    {"question": "It was the best of", "choices": [" times", " worms"], "answer": 0},
    {"question": "It was the worst", "choices": [" ofs", " of times"], "answer": 1},
    {"question": "The answer to every one of these questions is", "choices": [" yes", " no"], "answer": 1},
]
TEXT = "It was the best of times, it was the worst of times. " * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lm_eval") / "converted"
    model = grinqh.quantize_model(make_model(), progress=False)
    grinqh.calibrate(model, TEXT, make_tokenizer(), sequence_length=128, progress=False)
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks on local data: choices, scored by log-likelihood, and answers, generated."""
    path = tmp_path_factory.mktemp("tasks")
    lines = "\n".join(json.dumps(question) for question in QUESTIONS)
    (path / "questions.jsonl").write_text(lines, encoding="utf-8")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(path / "questions.jsonl")},
            "cache_dir": str(path / "cache"),
        },
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    choices = common | {
        "task": "local_choices",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    answers = common | {
        "task": "local_answers",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    for task in (choices, answers):
        (path / f"{task['task']}.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML
    return path


def evaluated(tasks: Path, task: str, folder: Path, settings: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    """The harness's samples, in the order of the questions."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import grinqh.lm_eval  # noqa: F401

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    result = simple_evaluate(
        model="grinqh",
        model_args={"pretrained": str(folder), "device": "cpu", **settings},
        tasks=[task],
        task_manager=manager,
        bootstrap_iters=0,
        **options,
    )
    return sorted(result["samples"][task], key=lambda sample: sample["doc_id"])


def log_likelihood(model: Any, context: str, continuation: str) -> float:
    """Written out: every token graded."""
    tokenizer = make_tokenizer()
    ids = tokenizer(context + continuation, return_tensors="pt").input_ids
    start = len(tokenizer(context).input_ids)
    with torch.no_grad(), grinqh.graded(model):
        scores = model(ids).logits[0].float().log_softmax(-1)
    return float(sum(scores[i - 1, ids[0, i]] for i in range(start, ids.shape[1])))


@pytest.mark.parametrize("settings", [{}, {"read_bits": 2}, {"read_bits": 2.5, "exact_budget": True}])
def test_log_likelihoods_are_those_of_graded_tokens(folder: Path, tasks: Path, settings: dict[str, Any]) -> None:
    samples = evaluated(tasks, "local_choices", folder, settings, batch_size=2)
    model = grinqh.from_pretrained(folder, **settings)
    for question, sample in zip(QUESTIONS, samples, strict=True):
        found = [float(response[0][0]) for response in sample["resps"]]
        expected = [log_likelihood(model, str(question["question"]), choice) for choice in question["choices"]]  # type: ignore[attr-defined]
        assert found == pytest.approx(expected, abs=1e-3)


def test_fewer_read_bits_and_fewer_stored_bits_change_the_scores(folder: Path, tasks: Path) -> None:
    def scores(**settings: Any) -> list[float]:
        samples = evaluated(tasks, "local_choices", folder, settings)
        return [float(response[0][0]) for sample in samples for response in sample["resps"]]

    full = scores(read_bits=8)
    assert scores(read_bits=1) != pytest.approx(full, abs=1e-3)
    assert scores(read_bits=8, stored_bits=4) != pytest.approx(full, abs=1e-3)


def test_answers_are_those_of_generate(folder: Path, tasks: Path) -> None:
    samples = evaluated(tasks, "local_answers", folder, {"read_bits": 3})
    model, tokenizer = grinqh.from_pretrained(folder, read_bits=3), make_tokenizer()
    for question, sample in zip(QUESTIONS, samples, strict=True):
        inputs = tokenizer(question["question"], return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs.input_ids.shape[1] :]
        assert sample["resps"][0][0] == tokenizer.decode(output, skip_special_tokens=True).split("\n")[0]


def test_a_batch_that_would_be_read_in_full_is_refused(folder: Path) -> None:
    from grinqh.lm_eval import GrinqhLM

    model = GrinqhLM(str(folder), device="cpu")
    with pytest.raises(grinqh.InputError, match="batch_size is 17, must be at most 16"):
        model._model_generate(torch.zeros(17, 4, dtype=torch.long), max_length=8, stop=[])


def test_a_loaded_model_keeps_its_dial(folder: Path) -> None:
    from grinqh.lm_eval import GrinqhLM

    model, ids = grinqh.from_pretrained(folder, read_bits=2), torch.arange(2, 42)[None]
    with torch.no_grad(), grinqh.graded(model):
        expected = model(ids).logits
    assert torch.equal(GrinqhLM(model)._model_call(ids), expected)
    with pytest.raises(grinqh.InputError, match="read_bits, exact_budget: cannot be set for a loaded model"):
        GrinqhLM(model, read_bits=3, exact_budget=True)


def test_a_model_that_is_not_converted_is_refused(tmp_path: Path) -> None:
    from grinqh.lm_eval import GrinqhLM

    make_model().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(grinqh.InputError, match="has quant_method None"):
        GrinqhLM(str(tmp_path), device="cpu")


def run_module(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "grinqh.lm_eval", *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_the_command_line_is_the_harness_s_with_our_model(folder: Path, tasks: Path, tmp_path: Path) -> None:
    options = ["--include_path", tasks, "--tasks", "local_choices", "--device", "cpu", "--output_path", tmp_path]
    done = run_module("--model_args", f"pretrained={folder},read_bits=3", *options)
    assert done.returncode == 0, done.stderr
    assert "|local_choices|" in done.stdout
    (results,) = tmp_path.rglob("results_*.json")
    assert json.loads(results.read_text(encoding="utf-8"))["config"]["model"] == "grinqh"
    bad = run_module("run", "--model_args", f"pretrained={folder},read_bits=9", *options)
    assert bad.returncode == 2
    assert bad.stderr.splitlines()[-1].startswith("grinqh.lm_eval: read_bits is 9, must be")
