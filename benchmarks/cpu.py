"""Times the CPU kernels against torch: single layers beyond the caches, prefill, and a whole model's decoding.

Everything is measured in one run. Layers are packed random bytes, in enough copies that neither what is
kept nor what is read in one round of them fits the last-level cache; x is float32 and standard normal,
a different row for every call, and its channels are graded by thresholds as calibration would set them.
"""

from __future__ import annotations

import argparse
import gc
import sys
from typing import Any

import torch
import torch.nn.functional as functional
from common import RESULTS, describe_machine, stamp, write_json
from demo import converted_model, full_precision_model
from tables import cpu_decode_table, cpu_layer_table, cpu_prefill_table
from tqdm import tqdm

import grinqh
from grinqh.benchmark import (
    decode_tokens_per_second,
    gaussian_thresholds,
    median_microseconds,
    random_layers,
    rotation_count,
)
from grinqh.cli.common import calm_libraries

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (576, 1536))  # N x K
READ_BITS = (8.0, 4.0, 3.0, 2.0, 1.0)
DECODE_ROWS = (1, 4, 16)
PREFILL_ROWS = (32, 128, 512)
MODEL_READ_BITS = (8.0, 4.0, 3.0, 2.0)
INPUTS = 64  # different inputs that calls go round


def time_layers(n: int, k: int, seconds: float, progress: tqdm[Any]) -> list[dict[str, Any]]:
    """Every method at every number of rows, for one shape."""
    measured: list[dict[str, Any]] = []

    def record(method: str, m: int, us: float, read_bits: float) -> None:
        gb_per_s = n * k * read_bits / 8 / us / 1e3
        measured.append(
            {"n": n, "k": k, "m": m, "method": method, "read_bits": read_bits, "us": us, "gb_per_s": gb_per_s}
        )
        progress.update()

    for dtype, name, bits in ((torch.float32, "torch float32", 32), (torch.bfloat16, "torch bfloat16", 16)):
        size = n * k * bits / 8
        weights = [torch.randn(n, k).to(dtype) for _ in range(2)]
        weights += [weights[i % 2].clone() for i in range(rotation_count(size, size) - 2)]
        for m in (*DECODE_ROWS, *PREFILL_ROWS):
            inputs = [torch.randn(m, k).to(dtype) for _ in range(INPUTS)]
            record(name, m, median_microseconds(functional.linear, inputs, weights, seconds), bits)
        del weights
        gc.collect()

    layers = random_layers(n, k, rotation_count(n * k * 8.25 / 8, n * k * min(READ_BITS) / 8))
    for m in DECODE_ROWS:
        inputs = [torch.randn(m, k) for _ in range(INPUTS)]
        for target in READ_BITS:
            thresholds = gaussian_thresholds(target)
            realised = torch.ops.grinqh.gemv_read_bits(*layers[0].arguments(torch.cat(inputs), thresholds))[1]

            def gemv(x: torch.Tensor, layer: Any, thresholds: torch.Tensor = thresholds) -> object:
                return torch.ops.grinqh.gemv(*layer.arguments(x, thresholds))

            us = median_microseconds(gemv, inputs, layers, seconds)
            record(f"grinqh {target:g}", m, us, float(realised.mean()))
    for m in PREFILL_ROWS:
        inputs = [torch.randn(m, k) for _ in range(INPUTS)]
        thresholds = gaussian_thresholds(3.0)

        def linear(x: torch.Tensor, layer: Any, thresholds: torch.Tensor = thresholds) -> object:
            return torch.ops.grinqh.linear(*layer.arguments(x, thresholds))

        record("grinqh prefill", m, median_microseconds(linear, inputs, layers, seconds), 8.0)
    return measured


def time_model(tokens: int) -> list[dict[str, Any]]:
    """Decoding one sequence with the demo's model: full precision, then every setting of the dial."""
    model, tokenizer = converted_model()
    prompt = tokenizer("The history of the city begins", return_tensors="pt").input_ids
    full = full_precision_model()
    rows = [{"method": "torch float32", "tokens_per_s": decode_tokens_per_second(full, prompt, tokens)}]
    del full
    for target in MODEL_READ_BITS:
        grinqh.set_bits(model, target)
        rows.append({"method": f"grinqh {target:g}", "tokens_per_s": decode_tokens_per_second(model, prompt, tokens)})
    return rows


def plot(result: dict[str, Any], n: int = 4096, k: int = 4096) -> None:
    """Time of one layer against read bits, beside torch's."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in result["layers"] if (row["n"], row["k"], row["m"]) == (n, k, 1)]
    ours = sorted((row["read_bits"], row["us"]) for row in rows if row["method"].startswith("grinqh"))
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    axes.plot(*zip(*ours, strict=True), "o-", color="tab:blue", label="grinqh")
    for method, style in (("torch float32", "--"), ("torch bfloat16", ":")):
        us = next(row["us"] for row in rows if row["method"] == method)
        axes.axhline(us, color="tab:gray", linestyle=style, label=method)
    axes.set(xlabel="read bits per weight", ylabel="time of one call (us)", xlim=(0, 8.5), ylim=(0, None))
    axes.set_title(f"{n} x {k} layer, one token, {result['hardware']['threads']} threads", fontsize=10)
    axes.legend()
    figure.savefig(RESULTS / "cpu.png", dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.5, help="time spent on each figure (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens decoded at each setting (default: %(default)s)")
    arguments = parser.parse_args()
    calm_libraries()

    figures = len(SHAPES) * (len(DECODE_ROWS) * (2 + len(READ_BITS)) + len(PREFILL_ROWS) * 3)
    result = stamp()
    result["layers"] = []
    with torch.no_grad(), tqdm(total=figures, desc="layers", disable=None, file=sys.stderr) as progress:
        for n, k in SHAPES:
            result["layers"] += time_layers(n, k, arguments.seconds, progress)
    result["model"] = {"name": "SmolLM2-135M-Instruct", "decode": time_model(arguments.tokens)}
    write_json(RESULTS / "cpu.json", result)
    plot(result)
    for table in (
        *(cpu_layer_table(result, m) for m in DECODE_ROWS),
        cpu_prefill_table(result),
        cpu_decode_table(result),
    ):
        print(table, end="\n\n")
    print(describe_machine(result))


if __name__ == "__main__":
    main()
