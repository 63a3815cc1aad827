"""Where the GPU's time goes: kernels of a traced call, by what they are for.

A replayed graph shows its kernels' names and times, but not what launched them; and the same library makes the products
of linear layers and of attention. So a call is traced once without a graph, which tells the category of each kernel
from the op that launched it, and the kernels of the graph, which are the same in the same order, take theirs from it.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

LINEARS, HEAD, ATTENTION, REST = CATEGORIES = ("linears", "head", "attention", "rest")
REPLAYS = 5  # in one trace
TOP = 15  # kernels listed

# Parts of names, in lower case. Ops are asked first.
ATTENTION_OPS = ("bmm", "softmax")
LINEAR_OPS = ("aten::linear", "aten::mm", "aten::addmm", "grinqh::", "int4pack_mm")
ATTENTION_KERNELS = ("attention", "fmha", "flash", "sdpa", "flex", "softmax", "bmm")
LINEAR_KERNELS = ("grinqh", "tinygemm", "gemm", "gemv", "cutlass", "nvjet", "splitk", "cublas")


@dataclass(frozen=True)
class Kernel:
    """One launch."""

    name: str
    us: float  # in which no kernel that began before it ran
    ops: tuple[str, ...] = ()  # that it was launched by, outermost first; none in a graph


def kernels_of(trace: Iterable[dict[str, Any]]) -> list[Kernel]:
    """The kernels of a trace, copies and fills among them, in the order of their begin.

    A kernel that begins before the one before has ended counts from there: their times add up to that of both.

    Args:
        trace: the events of torch.profiler's trace file.
    """
    events = [event for event in trace if event.get("ph") == "X"]
    ops = [event for event in events if event.get("cat") == "cpu_op"]
    by_id = {event["args"]["External id"]: event for event in ops if "External id" in event.get("args", {})}
    found = []
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            launcher = by_id.get(event.get("args", {}).get("External id"))
            chain = () if launcher is None else _around(launcher, ops)
            found.append((event["ts"], event["ts"] + event["dur"], event["name"], chain))
    kernels, free = [], 0.0  # since when none ran
    for begin, end, name, chain in sorted(found, key=lambda item: item[:2]):
        kernels.append(Kernel(name, max(0.0, end - max(begin, free)), chain))
        free = max(free, end)
    return kernels


def _around(op: dict[str, Any], ops: list[dict[str, Any]]) -> tuple[str, ...]:
    """Names of the ops that an op was called in, and its own."""
    begin, end = op["ts"], op["ts"] + op["dur"]
    chain = [o for o in ops if o["tid"] == op["tid"] and o["ts"] <= begin and end <= o["ts"] + o["dur"]]
    return tuple(o["name"] for o in sorted(chain, key=lambda o: -o["dur"]))


def own_category(kernel: Kernel) -> str:
    """Linear layer, attention or the rest, by the ops that launched the kernel, or where they do not tell by its name.

    The compiler's own kernels are named after the ops that they take the place of.
    """
    ops, name = " ".join(kernel.ops).lower(), kernel.name.lower()
    if "attention" in ops:
        return ATTENTION
    if any(part in ops for part in LINEAR_OPS):
        return LINEARS
    if any(part in ops for part in ATTENTION_OPS):
        return ATTENTION
    if any(part in name for part in ATTENTION_KERNELS):
        return ATTENTION
    if name.startswith("triton"):
        return LINEARS if name.startswith("triton_tem") else REST
    return LINEARS if any(part in name for part in LINEAR_KERNELS) else REST


def categories(kernels: Sequence[Kernel]) -> list[str]:
    """Category of each kernel of one call of a model.

    Attention is also what runs between its first and its last kernel in a layer (masks, copies), but nothing that runs
    before the model's first linear layer (rotary embeddings use a product too). The head is the last linear layer.
    """
    found = [own_category(kernel) for kernel in kernels]
    linear = [i for i, category in enumerate(found) if category == LINEARS]
    for begin, end in zip([-1, *linear], [*linear, len(found)], strict=True):
        attention = [i for i in range(begin + 1, end) if found[i] == ATTENTION]
        for i in range(attention[0], attention[-1] + 1) if attention else ():
            found[i] = REST if begin < 0 else ATTENTION
    return _with_head(found)


def _with_head(found: Sequence[str]) -> list[str]:
    """The same, with the last of the linear layers, which a norm keeps apart from the one before, as the head."""
    end = max((i for i, category in enumerate(found) if category == LINEARS), default=-1) + 1
    begin = end
    while begin > 0 and found[begin - 1] == LINEARS:
        begin -= 1
    return [*found[:begin], *[HEAD] * (end - begin), *found[end:]]


def itemise(kernels: Sequence[Kernel], calls: int, launched: Sequence[Kernel]) -> dict[str, float]:
    """Milliseconds of each category in one call, and the number of its kernels.

    Args:
        kernels: of so many calls, one after the other, with or without the ops that launched them.
        calls: how often the model was called.
        launched: the kernels of one call, with ops.

    Raises:
        ValueError: the calls did not run the same number of kernels.
    """
    each, left = divmod(len(kernels), calls)
    if left or not each:
        raise ValueError(f"{calls} calls ran {len(kernels)} kernels, not the same number each")
    known = categories(launched)
    if [kernel.name for kernel in kernels[:each]] != [kernel.name for kernel in launched]:
        known = _by_name(kernels[:each], launched, known)
    us = dict.fromkeys(CATEGORIES, 0.0)
    for i, kernel in enumerate(kernels):
        us[known[i % each]] += kernel.us
    return {f"{category}_ms": us[category] / calls / 1e3 for category in CATEGORIES} | {"kernels": each}


def _by_name(kernels: Sequence[Kernel], launched: Sequence[Kernel], known: Sequence[str]) -> list[str]:
    """Categories for kernels that are not quite those launched: those most often seen for their names."""
    seen: dict[str, Counter[str]] = {}
    for kernel, category in zip(launched, known, strict=True):
        seen.setdefault(kernel.name, Counter())[LINEARS if category == HEAD else category] += 1
    found = [
        seen[kernel.name].most_common(1)[0][0] if kernel.name in seen else own_category(kernel) for kernel in kernels
    ]
    return _with_head(found)


def top(kernels: Sequence[Kernel], calls: int) -> list[dict[str, Any]]:
    """The kernels that took the most time, with launches and microseconds in one call."""
    us: defaultdict[str, float] = defaultdict(float)
    for kernel in kernels:
        us[kernel.name] += kernel.us
    count = Counter(kernel.name for kernel in kernels)
    slowest = sorted(us, key=us.__getitem__, reverse=True)[:TOP]
    return [{"name": name[:200], "calls": count[name] / calls, "us": us[name] / calls} for name in slowest]


def traced(call: Callable[[], object], calls: int = 1) -> list[Kernel]:
    """The kernels of some calls, on a machine with a GPU."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return kernels_of(json.loads(path.read_text(encoding="utf-8"))["traceEvents"])
