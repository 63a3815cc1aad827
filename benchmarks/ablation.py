"""What each choice of the default recipe is worth: KL divergence with one thing changed at a time.

    python benchmarks/ablation.py --json benchmarks/results/ablation.json
    python benchmarks/ablation.py --report benchmarks/results/ablation.json    # the table of docs/quality.md

The model, its noise and the texts are those of quality.py; every token is graded on its own. All variants see the same
windows, so differences are steadier than the values themselves.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as functional
from common import markdown_table, stamp, write_json
from quality_models import LabModel, reference, texts
from quality_report import run_or_report, section_options, write_section
from torch import Tensor, nn
from tqdm import tqdm

import grinqh
from grinqh import calibration
from grinqh.evaluate import Reference, Windows, evaluate, token_windows

READ_BITS = (4.0, 3.0, 2.5, 2.0)
LENGTH = 512  # tokens of a window, and of a calibration sequence


@dataclass(frozen=True)
class Variant:
    """The default recipe with something changed."""

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)  # of GrinqhConfig
    calibration: str = "help"  # the text
    tokens: int = 4096  # of it
    sensitivity: bool = True
    compensate: bool = True
    rotate_heads: bool = True
    loss: Callable[..., Tensor] | None = None  # whose gradients are the sensitivities, in place of the default's
    exact: bool = False  # whether every token keeps to the budget
    in_full: int = 0  # tokens at the beginning of a window that read everything, as those of a prompt do
    change: Callable[[grinqh.GrinqhLinear], None] | None = None  # made to every packed layer before calibration


def plain_importance(layer: grinqh.GrinqhLinear) -> None:
    """Importance is |x|."""
    layer.channel_weight.fill_(1.0)


def norm_importance(layer: grinqh.GrinqhLinear) -> None:
    """Importance is |x| times the norm of the channel's column, over the norms' root mean square."""
    norm = layer.dense().float().norm(dim=1)
    layer.channel_weight.copy_((norm / norm.square().mean().sqrt())[layer.channel_order.long()])


def no_gain(layer: grinqh.GrinqhLinear) -> None:
    """Weights that are read in part keep the size that their leading bits give."""
    layer.gain.fill_(1.0)


def text_loss(output: Any, ids: Tensor, _: torch.Generator) -> Tensor:
    """Cross entropy of the text's own next tokens, summed."""
    return functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def read_in_full(layer: grinqh.GrinqhLinear, tokens: int) -> None:
    """Gives the first tokens of an input [1, T, K] the layer's whole weights; counts do not see it."""

    def replace(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        first = functional.linear(inputs[0][:, :tokens], layer.dense().T, layer.bias)
        return torch.cat([first, output[:, tokens:]], dim=1)

    layer.register_forward_hook(replace)


VARIANTS = (
    Variant("default"),
    Variant("importance: size of x alone", change=plain_importance),
    Variant("importance: norm of the column", change=norm_importance),
    Variant("no gain for weights read in part", change=no_gain),
    Variant("the same thresholds' rule in all layers", sensitivity=False),
    Variant("sensitivity by the text's own next tokens", loss=text_loss),
    Variant("heads not rotated", rotate_heads=False),
    Variant("planes 2,1,1,2,2", {"plane_widths": (2, 1, 1, 2, 2)}),
    Variant("planes 1,1,1,1,1,1,1,1", {"plane_widths": (1,) * 8}),
    Variant("planes 4,4", {"plane_widths": (4, 4)}),
    Variant("blocks of 32", {"block": 32}),
    Variant("blocks of 128", {"block": 128}),
    Variant("q, k, v as one layer, gate and up as one", {"fuse": True}),
    # As `grinqh convert` does it, which rotates no heads where fewer bits are stored.
    Variant("4 stored bits", {"stored_bits": 4.0}, rotate_heads=False),
    Variant("4 stored bits, low planes cut off", {"stored_bits": 4.0}, compensate=False, rotate_heads=False),
    Variant("4 stored bits, heads rotated", {"stored_bits": 4.0}),
    Variant("exact budget for every token", exact=True),
    Variant("first token of a window in full", in_full=1),
    Variant("first 4 tokens of a window in full", in_full=4),
    Variant("a prompt of 128 tokens in full", in_full=128),
    Variant("calibration: 512 tokens", tokens=512),
    Variant("calibration: 8192 tokens", tokens=8192),
    Variant("calibration: code", calibration="code"),
)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The rows of the wanted variants, also written to `options.json` after each."""
    lab = LabModel.load(options.model, device=options.device)
    help_topics, evaluation = texts()
    sequences = {"help": [help_topics], "code": evaluation["code"]}
    windows = token_windows(lab.tokenizer, evaluation["speeches"], LENGTH, options.windows)
    full = reference(options.model, lab.model)
    result: dict[str, Any] = stamp(options.device) | {
        "model": options.model, "text": "speeches", "window": LENGTH, "windows": options.windows, "rows": []
    }  # fmt: skip
    wanted = [variant for variant in VARIANTS if variant.name in options.variants]
    for variant in tqdm(wanted, desc="ablation", unit="variant", file=sys.stderr, disable=None):
        ids = token_windows(lab.tokenizer, sequences[variant.calibration], LENGTH, max(1, variant.tokens // LENGTH)).ids
        for row in measure(lab.model, variant, list(ids), windows, full):
            result["rows"].append(row)
            print(" ".join(f"{k}={v:.4f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
        if options.json:
            write_json(options.json, result)
    return result


def measure(
    dense: nn.Module, variant: Variant, ids: list[Tensor], windows: Windows, full: Reference
) -> list[dict[str, Any]]:
    """Rows of one variant, by setting of the dial."""
    model: Any = copy.deepcopy(dense)
    tokens = sum(map(len, ids))
    if variant.rotate_heads:
        grinqh.rotate_heads(model, ids, max_tokens=tokens, progress=False)
    grinqh.quantize_model(model, grinqh.GrinqhConfig(**variant.config), progress=False)
    if variant.change is not None:
        for layer in grinqh.packed_layers(model).values():
            variant.change(layer)
    with patch.object(calibration, "_loss", variant.loss) if variant.loss else nullcontext():
        grinqh.calibrate(
            model, ids, max_tokens=tokens, sensitivity=variant.sensitivity, compensate=variant.compensate,
            progress=False,
        )  # fmt: skip
    for layer in grinqh.packed_layers(model).values() if variant.in_full else ():
        read_in_full(layer, variant.in_full)
    rows = []
    for bits in READ_BITS:
        grinqh.set_bits(model, bits, exact_budget=variant.exact)
        (score,) = evaluate(model, windows, reference=full, progress=False)
        read = {"variant": variant.name, "bits": bits, "read_bits": score.read_bits}
        rows.append(read | {"kl": score.kl, "log_ratio": score.log_ratio})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """KL divergence by variant and setting of the dial, with the bits that were really read."""
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        cells = {row["bits"]: row for row in rows if row["variant"] == variant}
        lines.append([variant, *(f"{cells[b]['kl']:.4f} ({cells[b]['read_bits']:.2f})" for b in READ_BITS)])
    return markdown_table(["KL divergence (bits read)", *(f"{b:g} read bits" for b in READ_BITS)], lines)


def write_report(result: dict[str, Any], root: Path) -> None:
    """Replaces the generated table of docs/quality.md."""
    sample = f"{result['windows']} windows of {result['window']} tokens of the {result['text']}"
    write_section(root, "ablation-table", result, sample, table(result["rows"]))


def main() -> None:
    parser = section_options(__doc__)
    parser.add_argument("--windows", type=int, default=4, help="of the text (default: %(default)s)")
    names = [variant.name for variant in VARIANTS]
    parser.add_argument("--variants", nargs="*", default=names, choices=names)
    run_or_report(parser.parse_args(), run, write_report)


if __name__ == "__main__":
    main()
