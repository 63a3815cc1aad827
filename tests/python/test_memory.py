"""Memory of a conversion: what is in use at its peak, and that nothing is dropped that somebody needs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_source import make_source, make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from grinqh.memory import release_file_pages, trim_heap

MEGABYTE = 2**20
LARGEST = 4096 * 1024 * 4  # bytes of the largest weight in float32
# Activations and gradients of the short calibration text, and what loading itself takes.
SMALL_CHANGE = 32 * MEGABYTE

# Converts a tiny model first, so that everything is imported; then the peak begins anew.
CHILD = """
import sys
from pathlib import Path
from grinqh.cli import main

def kilobytes(entry):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry))

tiny, source, out, text = sys.argv[1:]
assert main(["convert", tiny, out + "-tiny", "--calibration", text]) == 0
Path("/proc/self/clear_refs").write_text("5")
before = kilobytes("VmRSS:")
assert main(["convert", source, out, "--calibration", text, "--json"]) == 0
print("growth", 1024 * (kilobytes("VmHWM:") - before))
"""


def make_large_source(folder: Path, dtype: torch.dtype) -> Path:
    """80 million weights in layers of up to 4 million, in shards."""
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=5,
        num_attention_heads=8,
        vocab_size=len(make_tokenizer()),
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size="50MB")
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_conversion_holds_the_packed_model_and_little_else(dtype: torch.dtype, tmp_path: Path) -> None:
    source = make_large_source(tmp_path / "large", dtype)
    shards = [file.stat().st_size for file in source.glob("*.safetensors")]
    assert len(shards) > 2
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times.", encoding="utf-8")
    arguments = [make_source(tmp_path / "tiny"), source, tmp_path / "out", text]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, arguments)], check=True, stdout=subprocess.PIPE, text=True
    )
    printed, _, growth = done.stdout.rpartition("growth")
    made = json.loads(printed[printed.index("{") :])
    # total_bytes: the packed layers and what is not converted.
    allowed = made["total_bytes"] + 2 * LARGEST + max(shards) + SMALL_CHANGE
    assert int(growth) < allowed
    assert allowed < made["total_bytes"] + sum(shards)  # else the test would prove nothing


def test_what_is_released_is_read_again_from_its_file(tmp_path: Path) -> None:
    expected = torch.randn(300, 1000)
    save_file({"weight": expected}, tmp_path / "file.safetensors")
    with safe_open(tmp_path / "file.safetensors", framework="pt", backend="mmap") as file:
        weight = file.get_slice("weight")[...]
        release_file_pages(weight)
        assert torch.equal(weight, expected)


@pytest.mark.parametrize("make", [lambda w: w, lambda w: w.T, lambda w: w[3:40], lambda w: w[:0], lambda w: w.half()])
def test_memory_that_is_no_file_is_never_released(make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensor = make(torch.randn(1000, 3000))
    expected = tensor.clone()
    release_file_pages(tensor)
    trim_heap()
    assert torch.equal(tensor, expected)
