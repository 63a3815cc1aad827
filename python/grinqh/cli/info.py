"""grinqh info: what a converted model holds, from its files' headers and dial tables."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from grinqh.checkpoint import read_specs
from grinqh.cli.common import converted_config, print_json, print_table, shown
from grinqh.config import GrinqhConfig, LayerFormat
from grinqh.dial import dial_taus
from grinqh.errors import InputError
from grinqh.packing import TensorSpec, check_specs, plane_name
from grinqh.source import weight_files

TARGETS = (8.0, 6.0, 5.0, 4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 1.0)


def add_parser(commands: Any) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "info",
        help="stored bits, size, planes and dial",
        description="Stored bits, size on disk, plane table and dial table of a converted model, without loading it.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of a converted model")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class _Layer:
    """A packed layer as its file's header shows it, with its dial."""

    format: LayerFormat
    in_features: int
    out_features: int
    stored: list[int]  # channels in each plane
    dial: torch.Tensor  # float32 [G, T], part of each plane read at each setting
    file_bytes: int

    @property
    def weights(self) -> int:
        return self.in_features * self.out_features

    @property
    def read_bits(self) -> torch.Tensor:
        """Mean bits read at each setting, float64 [T]."""
        return torch.tensor(self.format.plane_widths, dtype=torch.float64) @ self.dial.double()


def run(options: argparse.Namespace) -> None:
    """Prints the tables."""
    config = GrinqhConfig(**converted_config(options.model)["quantization_config"])
    files = weight_files(options.model)
    layers = _packed_layers(files, config)
    if not layers:
        raise InputError(f"{options.model} holds no packed layers")
    weights = sum(layer.weights for layer in layers.values())
    facts = {
        "model": str(options.model),
        "format_version": config.format_version,
        "layers": len(layers),
        "weights": weights,
        "stored_bits": sum(row["stored_bits"] for row in _plane_table(layers)),
        "packed_bytes": sum(layer.file_bytes for layer in layers.values()),
        "total_bytes": sum(file.stat().st_size for file in files),
        "block": config.block,
        "read_bits": config.read_bits,
        "exact_budget": config.exact_budget,
    }
    planes, dial = _plane_table(layers), _dial_table(layers, dial_taus(config))
    if options.json:
        print_json({**facts, "planes": planes, "dial": dial})
        return
    facts["stored_bits"] = shown(facts["stored_bits"])
    facts["bits_with_scales"] = shown(8 * facts["packed_bytes"] / weights)
    for name, value in facts.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        print(f"{name.replace('_', ' ') + ':':18}{format(value, ',') if whole else value}")
    print("\nplanes")
    print_table(
        ("plane", "width", "channels stored", "stored bits"),
        [(str(r["plane"]), str(r["width"]), f"{r['channels_stored']:.1%}", shown(r["stored_bits"])) for r in planes],
    )
    print("\ndial: how layers share a number of read bits")
    print_table(
        ("read bits", "tau", "least layer", "most layer"),
        [(f"{r['read_bits']:g}", f"{r['tau']:.4g}", shown(r["least"], 2), shown(r["most"], 2)) for r in dial],
    )


def _packed_layers(files: Sequence[Path], config: GrinqhConfig) -> dict[str, _Layer]:
    """The packed layers in the files; a layer's tensors may lie in several."""
    found: dict[str, dict[str, TensorSpec]] = {}
    dials: dict[str, torch.Tensor] = {}
    for path in files:
        specs = read_specs(path)  # refuses a damaged file
        with safe_open(path, "pt") as file:
            for key, spec in specs.items():
                name, _, tensor = key.rpartition(".")
                found.setdefault(name, {})[tensor] = spec
                if tensor == "dial":
                    dials[name] = file.get_tensor(key)
    layers: dict[str, _Layer] = {}
    for name in dials:
        tensors, format = found[name], config.format(name)
        in_features, out_features = (_length(tensors, tensor) for tensor in ("channel_order", "row_scale"))
        points = int(config.dial_grid[2])
        thresholds = tensors.get("unit_thresholds")
        sections = thresholds.shape[0] if thresholds is not None and len(thresholds.shape) == 2 else 1
        check_specs(name, format, in_features, out_features, "bias" in tensors, points, tensors, sections)
        layers[name] = _Layer(
            format=format,
            in_features=in_features,
            out_features=out_features,
            stored=[_length(tensors, plane_name(p)) for p in range(format.planes)],
            dial=dials[name],
            file_bytes=sum(prod(spec.shape) * spec.dtype.itemsize for spec in tensors.values()),
        )
    return layers


def _length(tensors: dict[str, TensorSpec], tensor: str) -> int:
    """Length of a tensor's first dimension; 0 where it is missing, which `check_specs` then says."""
    return tensors[tensor].shape[0] if tensor in tensors else 0


def _plane_table(layers: dict[str, _Layer]) -> list[dict[str, Any]]:
    weights = sum(layer.weights for layer in layers.values())
    rows = []
    for plane in range(max(layer.format.planes for layer in layers.values())):
        having = [layer for layer in layers.values() if plane < layer.format.planes]
        stored = sum(layer.stored[plane] * layer.out_features for layer in having)
        bits = sum(layer.stored[plane] * layer.out_features * layer.format.plane_widths[plane] for layer in having)
        widths = sorted({layer.format.plane_widths[plane] for layer in having})
        rows.append(
            {
                "plane": plane,
                "width": widths[0] if len(widths) == 1 else widths,
                "channels_stored": stored / weights,
                "stored_bits": bits / weights,
            }
        )
    return rows


def _dial_table(layers: dict[str, _Layer], taus: torch.Tensor) -> list[dict[str, float]]:
    """For round numbers of read bits: the setting, and the layers that read least and most at it."""
    weights = sum(layer.weights for layer in layers.values())
    bits = {name: layer.read_bits for name, layer in layers.items()}
    mean = sum(bits[name] * layer.weights for name, layer in layers.items()) / weights
    assert isinstance(mean, torch.Tensor)
    rows = []
    for target in TARGETS:
        if not mean[-1] <= target <= mean[0]:
            continue
        log_tau = float(np.interp(target, mean.flip(0), taus.log2().flip(0)))
        shares = [float(np.interp(log_tau, taus.log2(), layer_bits)) for layer_bits in bits.values()]
        rows.append({"read_bits": target, "tau": 2.0**log_tau, "least": min(shares), "most": max(shares)})
    return rows
