"""grinqh bench: time against read bits on this machine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from tqdm import tqdm

from grinqh.benchmark import (
    RandomLayer,
    decode_tokens_per_second,
    gaussian_thresholds,
    hardware,
    median_microseconds,
    random_layers,
    rotation_count,
    versions,
)
from grinqh.cli.common import add_device_option, load_converted, numbers, positive, print_json, print_table, say_device
from grinqh.device import find_device
from grinqh.errors import InputError

PROMPT_TOKENS = 16


def add_parser(commands: Any) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "bench",
        help="time against read bits on this machine",
        description="Times one layer of random weights, kept in copies beyond the caches, on the CPU against torch's "
        "float32; and with MODEL the decoding of the whole model, on a device.",
    )
    parser.add_argument("model", type=Path, nargs="?", metavar="MODEL", help="folder of a converted model")
    parser.add_argument(
        "--shape", type=_shape, default=(4096, 4096), metavar="NxK", help="of the layer (default: 4096x4096)"
    )
    parser.add_argument("--rows", type=positive, default=1, help="tokens at a time (default: %(default)s)")
    parser.add_argument("--bits", type=numbers, default=[8.0, 4.0, 3.0, 2.0], metavar="B,B,..", help="default: 8,4,3,2")
    parser.add_argument("--seconds", type=float, default=1.0, help="spent on each figure (default: %(default)s)")
    parser.add_argument("--tokens", type=positive, default=32, help="decoded at each setting (default: %(default)s)")
    add_device_option(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Times the layer, then the model."""
    thresholds = [gaussian_thresholds(bits) for bits in options.bits]
    device = find_device("cpu" if options.model is None and options.device == "auto" else options.device)
    if options.model is None and device.type != "cpu":
        raise InputError(
            f"device is {options.device!r}, must be cpu: without a MODEL only a layer is timed, on the CPU"
        )
    model = load_converted(options.model, device) if options.model else None
    say_device(device)
    steps = tqdm(total=len(options.bits) * (1 if model is None else 2) + 1, desc="bench", disable=None, file=sys.stderr)
    with torch.no_grad(), steps:
        layer = _time_layer(options, thresholds, steps)
        decode = None if model is None else _time_decoding(model, options, steps)
    n, k = options.shape
    if options.json:
        print_json(
            {
                "hardware": hardware(),
                "versions": versions(),
                "n": n,
                "k": k,
                "rows": options.rows,
                "layer_device": "cpu",
                "device": str(device),
                "layer": layer,
                "decode": decode,
            }
        )
        return
    print(f"{n} x {k} layer on the CPU, {options.rows} row(s), {torch.get_num_threads()} threads")
    base = layer[0]["us"]
    print_table(
        ("method", "us", "against float32"), [(r["method"], f"{r['us']:,.1f}", f"{base / r['us']:.2f}x") for r in layer]
    )
    if decode is not None:
        print(f"\ndecoding with {options.model} on {device}")
        print_table(("read bits", "tokens/s"), [(f"{r['read_bits']:g}", f"{r['tokens_per_s']:.1f}") for r in decode])


def _time_layer(options: argparse.Namespace, thresholds: list[torch.Tensor], steps: Any) -> list[dict[str, Any]]:
    n, k = options.shape
    inputs = [torch.randn(options.rows, k) for _ in range(16)]
    dense = [torch.randn(n, k) for _ in range(rotation_count(4 * n * k, 4 * n * k))]
    us = median_microseconds(functional.linear, inputs, dense, options.seconds)
    rows: list[dict[str, Any]] = [{"method": "torch float32", "us": us}]
    steps.update()
    del dense
    layers = random_layers(n, k, rotation_count(n * k, n * k * min(options.bits) / 8))
    for bits, graded_by in zip(options.bits, thresholds, strict=True):

        def gemv(x: torch.Tensor, layer: RandomLayer, thresholds: torch.Tensor = graded_by) -> object:
            return torch.ops.grinqh.gemv(*layer.arguments(x, thresholds))

        rows.append({"method": f"grinqh {bits:g}", "us": median_microseconds(gemv, inputs, layers, options.seconds)})
        steps.update()
    return rows


def _time_decoding(model: Any, options: argparse.Namespace, steps: Any) -> list[dict[str, float]]:
    import grinqh
    from grinqh.model import model_config

    exact = model_config(model).exact_budget
    prompt = torch.arange(PROMPT_TOKENS)[None] + 100
    rows = []
    for bits in options.bits:
        grinqh.set_bits(model, bits, exact_budget=exact)
        rows.append({"read_bits": bits, "tokens_per_s": decode_tokens_per_second(model, prompt, options.tokens)})
        steps.update()
    return rows


def _shape(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} must be two sizes, as 4096x4096: out_features x in_features")
    return int(parts[0]), int(parts[1])
