"""Timing on this machine: single layers with weights beyond the caches, and whole-model decoding."""

from __future__ import annotations

import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from grinqh.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
ROTATION_BYTES = 1_500_000_000  # weights kept for one method, at least
WARM_UP_CALLS = 2
LEAST_CALLS = 5


def hardware() -> dict[str, str | int | float]:
    """The processor, its last cache, threads and memory."""
    return {
        "cpu": _cpu_name(),
        "vector_isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "last_cache_mb": round(last_cache_bytes() / 2**20),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    found = {"python": platform.python_version()}
    for package in ("grinqh", "torch", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def last_cache_bytes() -> int:
    """Size of the largest cache that the system reports; 0 where it reports none."""
    sizes = [0]
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    for path in CPU_CACHES.glob("index*/size"):
        text = path.read_text(encoding="utf-8").strip()
        sizes.append(int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text))
    return max(sizes)


@dataclass(frozen=True)
class RandomLayer:
    """A packed layer of random bytes: the right sizes to time, and no meaning."""

    planes: list[torch.Tensor]
    block_scale: torch.Tensor
    row_scale: torch.Tensor
    gain: torch.Tensor
    channel_order: torch.Tensor
    channel_weight: torch.Tensor
    widths: tuple[int, ...]
    block: int

    def arguments(self, x: torch.Tensor, thresholds: torch.Tensor) -> tuple[object, ...]:
        """Arguments of the ops `gemv` and `linear`."""
        return (
            x,
            self.planes,
            self.block_scale,
            self.row_scale,
            self.gain,
            self.channel_order,
            self.channel_weight,
            thresholds,
            list(self.widths),
            self.block,
        )


def random_layers(
    n: int, k: int, count: int, widths: Sequence[int] = (2, 2, 2, 2), block: int = 64
) -> list[RandomLayer]:
    """Packed layers in memory of their own each, filled with random bytes."""
    noise = torch.randint(0, 256, (1 << 22,), dtype=torch.uint8)
    layers = []
    for _ in range(count):
        planes = [_filled((k, (n * width + 7) // 8), noise) for width in widths]
        layers.append(
            RandomLayer(
                planes=planes,
                block_scale=torch.rand(k, -(-n // block)).half(),
                row_scale=torch.rand(n),
                gain=torch.ones(len(widths)),
                channel_order=torch.arange(k, dtype=torch.int32),
                channel_weight=torch.ones(k),
                widths=tuple(widths),
                block=block,
            )
        )
    return layers


def _filled(shape: tuple[int, int], noise: torch.Tensor) -> torch.Tensor:
    size = shape[0] * shape[1]
    flat = torch.empty(size, dtype=torch.uint8)
    for start in range(0, size, noise.numel()):
        piece = flat[start : start + noise.numel()]
        piece.copy_(noise[: piece.numel()])
    return flat.view(shape)


def gaussian_thresholds(read_bits: float, widths: Sequence[int] = (2, 2, 2, 2)) -> torch.Tensor:
    """Thresholds at which standard normal activations read so many bits on average.

    They have the form that calibration gives: an error that falls by 4 with every bit, and one lambda.
    """
    bits = torch.tensor([0, *itertools.accumulate(widths)], dtype=torch.float64)
    if not 0 < read_bits <= bits[-1]:
        raise InputError(f"read_bits is {read_bits}: it must be above 0 and at most {bits[-1]:g}")
    if read_bits == bits[-1]:
        return torch.zeros(len(widths))
    error = 4.0**-bits
    shape = ((bits[1:] - bits[:-1]) / (error[:-1] - error[1:])).sqrt()
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))

    def expected_bits(scale: float) -> float:
        reads = 2 * (1 - normal.cdf(shape * scale))
        return float((reads * (bits[1:] - bits[:-1])).sum())

    low, high = 0.0, 16.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_bits(middle) > read_bits else (low, middle)
    return (shape * high).float()


def rotation_count(stored_bytes: float, read_bytes: float) -> int:
    """Copies of a layer so that neither what is kept nor what is read in one round fits a cache."""
    beyond_cache = max(1.25 * last_cache_bytes(), 64e6)
    return max(2, round(ROTATION_BYTES / stored_bytes), round(beyond_cache / read_bytes))


def median_microseconds(
    call: Callable[[torch.Tensor, Any], object], inputs: Sequence[torch.Tensor], weights: Sequence[Any], seconds: float
) -> float:
    """Median time of call(input, weight) over so many seconds, each call with the next input and the next weight."""
    turns = zip(itertools.cycle(inputs), itertools.cycle(weights), strict=False)
    for _ in range(WARM_UP_CALLS):
        call(*next(turns))
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < LEAST_CALLS or time.perf_counter() < end:
        x, weight = next(turns)
        start = time.perf_counter()
        call(x, weight)
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


@torch.no_grad()
def decode_tokens_per_second(model: PreTrainedModel, prompt: torch.Tensor, tokens: int = 32) -> float:
    """Greedy decoding of one sequence after a prompt [1, length]: the reciprocal of the median step."""
    step = model(input_ids=prompt.to(model.device), use_cache=True)
    times = []
    for _ in range(tokens):
        token = step.logits[:, -1:].argmax(-1)
        _finish(model.device)
        start = time.perf_counter()
        step = model(input_ids=token, past_key_values=step.past_key_values, use_cache=True)
        _finish(model.device)
        times.append(time.perf_counter() - start)
    return 1 / statistics.median(times)


def _finish(device: torch.device) -> None:
    """Waits for what was given to a GPU, which is still at work when a call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
