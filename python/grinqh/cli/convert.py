"""grinqh convert: quantizes, calibrates and saves a model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from grinqh.cli.common import add_device_option, need_transformers, positive, print_json, say_device
from grinqh.memory import map_large_blocks


def add_parser(commands: Any) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "convert",
        help="quantize and calibrate a model",
        description="Quantizes the linear layers of a causal language model, calibrates the dial and writes a folder "
        "that from_pretrained loads. OUT appears when it is complete.",
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="Hugging Face folder (safetensors) or GGUF file")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument(
        "--plane-widths",
        type=_widths,
        metavar="W,W,..",
        help="bits of each plane, most significant first (default: 2,2,2,2)",
    )
    parser.add_argument("--block", type=int, help="outputs that share a scale: 32, 64 or 128 (default: 64)")
    parser.add_argument("--stored-bits", type=float, help="mean bits per weight to keep (default: all)")
    parser.add_argument("--read-bits", type=float, help="the dial's setting after loading (default: 3)")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="UTF-8 text (default: Python's help topics)")
    parser.add_argument("--calibration-tokens", type=positive, help="how much of it to use (default: 8192)")
    parser.add_argument(
        "--keep-heads", action="store_true", help="do not rotate attention heads; nor are they with --stored-bits"
    )
    parser.add_argument(
        "--evaluate",
        type=Path,
        metavar="FILE",
        help="UTF-8 text on which the model card gives the perplexity; this loads the full-precision model, too",
    )
    parser.add_argument("--convert-lm-head", action="store_true", help="convert the output head, too")
    parser.add_argument(
        "--fuse", action="store_true", help="make one layer of the q, k and v projections, and one of gate and up"
    )
    parser.add_argument(
        "--exclude",
        nargs="+",
        action="extend",
        metavar="PATTERN",
        help="leave these layers alone: down_proj, 'model.layers.0.*'; experts",
    )
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of what is not converted"
    )
    add_device_option(parser)
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", help="of a weight file, as 5GB (default: transformers' own)"
    )
    parser.add_argument("--force", action="store_true", help="replace a model folder at OUT")
    parser.add_argument(
        "--no-resume",
        action="store_true",
        help="pack everything, and keep nothing in OUT.packing in case of interruption",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Converts, and says what was made."""
    need_transformers()
    from grinqh import GrinqhConfig
    from grinqh.convert import convert
    from grinqh.device import find_device

    map_large_blocks()
    given = {
        "plane_widths": options.plane_widths,
        "block": options.block,
        "stored_bits": options.stored_bits,
        "read_bits": options.read_bits,
        "modules_to_not_convert": options.exclude,
        "convert_lm_head": options.convert_lm_head,
        "fuse": options.fuse,
    }
    config = GrinqhConfig(**{name: value for name, value in given.items() if value is not None})
    device = find_device(options.device)
    amount = {} if options.calibration_tokens is None else {"calibration_tokens": options.calibration_tokens}
    made = convert(
        options.source,
        options.out,
        config,
        calibration=options.calibration,
        rotate_heads=False if options.keep_heads else None,
        evaluation=options.evaluate,
        dtype=options.dtype,
        device=device,
        max_shard_size=options.max_shard_size,
        force=options.force,
        resume=not options.no_resume,
        command=options.command_line,
        on_start=lambda: say_device(device),
        **amount,
    )
    if options.json:
        print_json(made.as_dict())
        return
    print(f"{made.out}: {made.layers} layers, {made.weights:,} weights at {made.stored_bits:.3f} stored bits,")
    print(f"{made.total_bytes / 1e6:,.1f} MB in all, {made.packed_bytes / 1e6:,.1f} MB of them converted layers")
    print(f"at full precision: {'; '.join(made.full_precision)}")


def _widths(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be whole numbers with commas between them, as 2,2,2,2"
        ) from error
