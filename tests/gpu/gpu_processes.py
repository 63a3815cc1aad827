"""What each of two processes computes on a GPU of its own; the processes import this module by its name."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import processes
import torch
import torch.distributed as dist
from tiny_models import token_ids
from torch import Tensor

import grinqh

NAMES = ("Llama", "fused layers", "biased")


def outputs(model: Any) -> dict[str, Tensor]:
    """Logits by grades and for a prompt, tokens and read bits, at two settings of the dial."""
    found = {}
    ids = (token_ids(2, 9) % 200).cuda()
    for bits in (8, 3):
        grinqh.set_bits(model, bits)
        with torch.no_grad():
            found[f"prompt at {bits}"] = model(ids).logits.cpu()
            with grinqh.graded(model):
                found[f"logits at {bits}"] = model(ids).logits.cpu()
        grinqh.count_reads(model, keep_tokens=20)
        found[f"tokens at {bits}"] = model.generate(ids, max_new_tokens=12, do_sample=False).cpu()
        found[f"read bits at {bits}"] = grinqh.token_reads(model).read_bits.cpu()
        grinqh.count_reads(model, False)
    return found


def work() -> dict[str, dict[str, Tensor]]:
    """Of every model, shared out if there are several processes."""
    made = {name: processes.MODELS[name]().to("cuda") for name in NAMES}
    if dist.is_initialized():
        made = {name: grinqh.tensor_parallel(model) for name, model in made.items()}
    return {name: outputs(model) for name, model in made.items()}


def run(rank: int, folder: Path) -> None:
    """What a process does."""
    torch.set_num_threads(1)
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
        device_id=torch.device("cuda", rank),
    )
    try:
        torch.save(work(), folder / f"{rank}.pt")
        dist.barrier()  # none leaves while another still needs it
    finally:
        dist.destroy_process_group()
