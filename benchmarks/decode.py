"""Times whole-model decoding and prefill on one GPU against float16 and torch's int4, and writes JSON.

    python benchmarks/decode.py --json benchmarks/results/decode_h100.json
    python benchmarks/decode.py --report benchmarks/results/decode_h100.json   # the tables of the documents
    python benchmarks/decode.py --tiny                                         # a try in seconds, without a GPU too

Models have the shapes of real ones and random weights. A decode step is one call of transformers' model with a static
cache, captured into one CUDA graph and replayed, for every method alike; the graph of a converted model is captured
once and serves all settings of the dial. A method that cannot be run is left out, with a note on stderr.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import kernel_times
import torch
from common import ROOT, stamp, write_json
from decode_methods import METHODS, Method
from decode_models import CONFIGS, MODELS, build_model
from decode_report import LISTS, write_report
from replay import Replay, median_milliseconds
from torch import Tensor, nn
from tqdm import tqdm
from transformers import StaticCache

import grinqh

BATCHES = (1, 2, 4, 8)
PREFILL_TOKENS = (512, 2048)
PREFILL_REPEATS = 5
CACHE_LENGTH = 1024
POSITION = 512  # tokens in the cache before the timed step
ATTENTIONS = ("sdpa", "grouped")
# Small kernels that do not depend on each other become one; no product is padded, which the compiler would decide by a
# timing, now so and now so.
COMPILE: dict[str, Any] = {"combo_kernels": True, "shape_padding": False}
TOKENS = 8  # different tokens that the timed step is given in turn

Row = tuple[str, dict[str, Any]]  # with the name of the list that it belongs to


class DecodeStep:
    """The call that makes one token's logits for each sequence of a batch, at the position after those before.

    Args:
        model: a causal language model of transformers.
        batch: sequences.
        forward: what to call in the model's place, as a compiled form of it.
    """

    def __init__(self, model: Any, batch: int, forward: Callable[..., Any] | None = None) -> None:
        device, vocabulary = next(model.parameters()).device, model.config.vocab_size
        generator = torch.Generator(device).manual_seed(batch)
        self.forward = model if forward is None else forward
        self.tokens = torch.randint(vocabulary, (TOKENS, batch, 1), device=device, generator=generator)
        self.ids = self.tokens[0].clone()
        self.positions = torch.full((batch, 1), POSITION, device=device)
        self.mask = (torch.arange(CACHE_LENGTH, device=device) <= POSITION).expand(batch, 1, 1, CACHE_LENGTH)
        self.cache = StaticCache(config=model.config, max_cache_len=CACHE_LENGTH)
        prompt = torch.randint(vocabulary, (batch, POSITION), device=device, generator=generator)
        model(prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def prepare(self, i: int) -> None:
        """Sets the cache back to the position, and another token in place."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(POSITION)
        self.ids.copy_(self.tokens[i % TOKENS])

    def __call__(self) -> Tensor:
        """The logits."""
        logits: Tensor = self.forward(
            input_ids=self.ids,
            position_ids=self.positions,
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        return logits


def read_bits(model: nn.Module, step: DecodeStep) -> float:
    """Mean bits per weight of the converted layers that the step's tokens read."""
    grinqh.count_reads(model)
    grinqh.reset_read_stats(model)
    for i in range(TOKENS):
        step.prepare(i)
        step()
    read = grinqh.read_stats(model).read_bits
    grinqh.count_reads(model, enabled=False)
    return read


@torch.no_grad()
def decode_rows(
    model: Any, method: Method, batches: Sequence[int], forward: Callable[..., Any] | None = None
) -> Iterator[Row]:
    """Milliseconds of a decode step by batch and setting of the dial; `forward` is the compiled model, if any."""
    for batch in batches:
        step = DecodeStep(model, batch, forward)
        counted = step if forward is None else DecodeStep(model, batch)  # compiled code does not count
        before = Replay.captures
        replay = Replay(step)
        for bits in method.bits:
            method.set(model, bits)
            ms = replay.milliseconds(step.prepare)
            yield (
                "decode",
                {
                    "method": method.name,
                    "mode": mode_name(forward),
                    "bits": bits,
                    "read_bits": read_bits(model, counted) if method.dial else bits,
                    "batch": batch,
                    "ms": ms,
                    "tokens_per_s": batch / ms * 1e3,
                    "captures": Replay.captures - before,
                },
            )


@torch.no_grad()
def part_rows(model: Any, method: Method, forward: Callable[..., Any] | None = None) -> Iterator[Row]:
    """Where the time of a step for one sequence goes, kernel by kernel; nothing without a GPU.

    The graph is a second one, not that of the timings: a graph's kernels are only seen by a profiler that has run
    before the capture.
    """
    if not torch.cuda.is_available():
        return
    step = DecodeStep(model, 1, forward)
    step()
    step.prepare(0)
    launched = kernel_times.traced(step)
    replay = Replay(step)
    for bits in method.bits:
        method.set(model, bits)
        ms = replay.milliseconds(step.prepare)
        step.prepare(0)
        kernels = kernel_times.traced(replay.run, kernel_times.REPLAYS)
        of = {"method": method.name, "mode": mode_name(forward), "bits": bits}
        parts = kernel_times.itemise(kernels, kernel_times.REPLAYS, launched)
        yield "parts", of | {"ms": ms} | parts
        for kernel in kernel_times.top(kernels, kernel_times.REPLAYS):
            yield "kernels", of | {"call": "step"} | kernel


@torch.no_grad()
def prefill_kernel_rows(model: Any, method: Method, lengths: Sequence[int]) -> Iterator[Row]:
    """The kernels that take most of a prompt's time; nothing without a GPU."""
    for tokens in lengths if torch.cuda.is_available() else ():
        call = prefill_call(model, tokens)
        call()
        for kernel in kernel_times.top(kernel_times.traced(call), 1):
            yield "kernels", {"method": method.name, "mode": "eager", "call": f"prompt of {tokens}"} | kernel


def mode_name(forward: Callable[..., Any] | None) -> str:
    return "eager" if forward is None else "compiled"


def prefill_call(model: Any, tokens: int) -> Callable[[], object]:
    """Processes a prompt of one sequence."""
    ids = torch.randint(model.config.vocab_size, (1, tokens), device=next(model.parameters()).device)
    return partial(model, ids, logits_to_keep=1)


@torch.no_grad()
def prefill_rows(model: Any, method: Method, lengths: Sequence[int], mode: str) -> Iterator[Row]:
    """Milliseconds to process a prompt of one sequence, launched one by one or as a captured graph."""
    for tokens in lengths:
        call = prefill_call(model, tokens)
        run = Replay(call).run if mode == "graph" else call
        ms = median_milliseconds(run, repeats=PREFILL_REPEATS)
        speed = tokens / ms * 1e3
        yield "prefill", {"method": method.name, "mode": mode, "tokens": tokens, "ms": ms, "tokens_per_s": speed}


def measure(name: str, method: Method, device: torch.device, options: argparse.Namespace) -> Iterator[Iterator[Row]]:
    """All figures of one method for one model, in stages: one that fails does not take the others along."""
    begin = time.perf_counter()
    model = build_model(name, method.dtype, device, options.layers, options.tiny)
    if options.attention == "grouped":
        grinqh.use_grouped_attention(model)
    built = time.perf_counter()
    method.convert(model)
    free_memory()
    memory = {
        "method": method.name,
        "build_s": built - begin,
        "convert_s": time.perf_counter() - built,
        "weights_gb": allocated_gb(),
    }
    reset_peak()
    yield decode_rows(model, method, options.batches)
    yield prefill_rows(model, method, options.prefill, "eager")
    yield iter([("memory", memory | {"peak_gb": peak_gb()})])
    yield prefill_rows(model, method, options.prefill, "graph")
    forward = torch.compile(model, dynamic=False, options=COMPILE) if options.compile else None
    if forward is not None:
        yield decode_rows(model, method, [1], forward)
    # Last: a profiler that has run may slow down what follows.
    yield part_rows(model, method)
    if forward is not None:
        yield part_rows(model, method, forward)
        torch.compiler.reset()
    yield prefill_kernel_rows(model, method, options.prefill)


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def allocated_gb() -> float | None:
    return torch.cuda.memory_allocated() / 1e9 if torch.cuda.is_available() else None


def peak_gb() -> float | None:
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The results, also written to `options.json` whenever a stage of a method is done."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **stamp(),
        "cache_length": CACHE_LENGTH,
        "position": POSITION,
        "tiny": options.tiny,
        "layers": options.layers,
        "attention": options.attention,
        **{kind: [] for kind in LISTS},
    }
    methods = [method for method in METHODS if method.name in options.methods]
    wanted = [(name, method) for name in options.models for method in methods]
    for name, method in tqdm(wanted, desc="decode", unit="method", file=sys.stderr, disable=None):
        with noted(name, method):
            for stage in measure(name, method, device, options):
                with noted(name, method):
                    for kind, row in stage:
                        results[kind].append({"model": name, **row})
                        if kind != "kernels":
                            print(kind, name, *(f"{key}={show(value)}" for key, value in row.items()), flush=True)
                if options.json:
                    write_json(options.json, results)
        free_memory()
    return results


@contextmanager
def noted(name: str, method: Method) -> Iterator[None]:
    """What is missing or fails is told and must not end the run."""
    try:
        yield
    except Exception as problem:
        print(f"{name}, {method.name}: {type(problem).__name__}: {str(problem)[:300]}", file=sys.stderr)


def show(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    names = [method.name for method in METHODS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--report", type=Path, nargs="+", help="write docs/decode.md from these results, time nothing")
    parser.add_argument("--models", nargs="*", default=list(CONFIGS), choices=MODELS)
    parser.add_argument("--methods", nargs="*", default=names, choices=names)
    parser.add_argument("--batches", type=int, nargs="*", default=list(BATCHES))
    parser.add_argument("--prefill", type=int, nargs="*", default=list(PREFILL_TOKENS), help="lengths of prompts")
    parser.add_argument("--layers", type=int, help="layers of the models, in place of their own number")
    parser.add_argument("--tiny", action="store_true", help="tiny models of the same architectures")
    parser.add_argument(
        "--attention",
        choices=ATTENTIONS,
        default="grouped",
        help="of a decode step, for every method: transformers' sdpa, or grinqh.use_grouped_attention",
    )
    parser.add_argument("--compile", action="store_true", help="time torch.compile too, at batch 1")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_arguments()
    if options.report:
        runs = [json.loads(path.read_text(encoding="utf-8")) for path in options.report]
        write_report(runs, ROOT)
    else:
        run(options)


if __name__ == "__main__":
    main()
