"""Times quantizing and packing an 8B-shaped model's weights on one GPU, and writes JSON.

    python benchmarks/pack.py --json benchmarks/results/pack_h100.json

Weights are Gaussian float16, made on the GPU one matrix at a time; a layer is packed as `grinqh.quantize_model` does
it, and brought into tile order. Times are those of the GPU's own clock, making the weights not counted.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from common import stamp
from tqdm import tqdm

from grinqh import packing
from grinqh.config import GrinqhConfig
from grinqh.linear import GrinqhLinear

HIDDEN, INTERMEDIATE, KEYS, BLOCKS = 4096, 14336, 1024, 32  # of Llama-3-8B
SHAPES = [
    (HIDDEN, HIDDEN), (KEYS, HIDDEN), (KEYS, HIDDEN), (HIDDEN, HIDDEN),
    (INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE),
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    format = GrinqhConfig().format("")
    GrinqhLinear(packing.pack_weight(torch.randn(64, 64, device="cuda"), format), format)  # loads the kernels
    layers: list[GrinqhLinear] = []
    seconds, peak = 0.0, 0
    for n, k in tqdm(SHAPES * BLOCKS, desc="pack", unit="layer", file=sys.stderr, disable=None):
        weight = torch.randn(n, k, device="cuda", dtype=torch.float16)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        layers.append(GrinqhLinear(packing.pack_weight(weight, format), format))
        end.record()
        end.synchronize()
        seconds += begin.elapsed_time(end) / 1e3
        peak = max(peak, torch.cuda.max_memory_allocated() - before)
    results = {
        "gpu": torch.cuda.get_device_name(),
        **stamp(),
        "plane_widths": list(format.plane_widths),
        "weights": sum(layer.weights for layer in layers),
        "seconds": seconds,
        "peak_bytes": peak,  # beyond the float16 weight and what is packed already
        "packed_bytes": sum(t.numel() * t.element_size() for layer in layers for t in layer.parameters()),
    }
    print(json.dumps(results, indent=1))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
