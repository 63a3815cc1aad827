"""grinqh generate: continues a prompt."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from grinqh.cli.common import (
    add_device_option,
    load_converted,
    load_tokenizer,
    positive,
    print_json,
    say_device,
)
from grinqh.device import find_device
from grinqh.errors import InputError


def add_parser(commands: Any) -> None:
    """Declares the command."""
    parser = commands.add_parser("generate", help="continue a prompt", description="Continues a prompt, greedily.")
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of a converted model")
    parser.add_argument("prompt", metavar="PROMPT", help="text to continue")
    parser.add_argument("--bits", type=float, help="bits read per weight on average (default: as the model was saved)")
    parser.add_argument(
        "--stored-bits", type=float, help="leave low planes on the disk: at most this many bits per weight"
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, default=64, help="length of the answer (default: %(default)s)"
    )
    parser.add_argument(
        "--chat", action="store_true", help="put the prompt as a question, by the model's chat template"
    )
    add_device_option(parser)
    parser.add_argument(
        "--stats", action="store_true", help="show the bits that tokens read (mean, least, most) and the time"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Prints the continuation, as it comes or as JSON."""
    if not options.prompt:
        raise InputError("PROMPT is empty: at least one character is needed")
    device = find_device(options.device)
    model = load_converted(options.model, device, options.stored_bits)
    tokenizer = load_tokenizer(options.model)
    from transformers import TextStreamer

    import grinqh
    from grinqh.model import model_config

    if options.bits is not None:
        grinqh.set_bits(model, options.bits, exact_budget=model_config(model).exact_budget)
    if options.chat:
        if not tokenizer.chat_template:
            raise InputError(f"{options.model} has no chat template: leave out --chat")
        messages = [{"role": "user", "content": options.prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(options.prompt, return_tensors="pt")
    streamer = None if options.json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

    say_device(device)
    # The answer's rows, and those of a prompt short enough to be graded.
    rows = options.max_new_tokens + model_config(model).max_graded_rows
    grinqh.count_reads(model, keep_tokens=rows if options.json or options.stats else 0)
    start = time.perf_counter()
    output = model.generate(
        **inputs.to(device), max_new_tokens=options.max_new_tokens, do_sample=False, streamer=streamer
    )
    seconds = time.perf_counter() - start
    answer = output[0, inputs["input_ids"].shape[1] :]
    # A prompt longer than the graded rows is read in full, and is not counted.
    counted = (options.json or options.stats) and len(answer) > 1
    bits = grinqh.token_reads(model).read_bits if counted else None
    statistics = {
        "read_bits": None if bits is None else float(bits.mean()),
        "read_bits_min": None if bits is None else float(bits.min()),
        "read_bits_max": None if bits is None else float(bits.max()),
        "stored_bits": grinqh.stored_bits(model),
        "new_tokens": len(answer),
        "device": str(device),
        "seconds": seconds,
        "tokens_per_s": len(answer) / seconds,
    }
    if options.json:
        text = tokenizer.decode(answer, skip_special_tokens=True)
        print_json({"prompt": options.prompt, "text": text, "bits": options.bits, **statistics})
    elif options.stats:
        print("\n" + "\n".join(f"{name}: {value}" for name, value in statistics.items()))
