"""Models on two processes: what each of them computes, to be compared with what one process does alone.

A module of its own, because the processes import it by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_models import calibrated, logits, qwen2, qwen3, tiny_model, token_ids
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import grinqh
from grinqh import GrinqhConfig, InputError
from grinqh.sharded import LayerShard

# Four query heads and two key heads of 32 outputs; intermediate features that have no halves of whole blocks.
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 160, "head_dim": 32}
SETTINGS: dict[str, Any] = {"plane_widths": (2, 1, 1, 2, 2), "block": 32}


def llama() -> Any:
    return calibrated(tiny_model(**SIZES), GrinqhConfig(**SETTINGS))


def qwen() -> Any:
    return calibrated(qwen3(**SIZES), GrinqhConfig(**SETTINGS))


def fused() -> Any:
    return calibrated(tiny_model(**SIZES), GrinqhConfig(fuse=True, **SETTINGS))


def fused_layers() -> Any:
    """Packed layers with what is around them: a part of each process, the residual once."""
    model = fused()
    grinqh.fuse_decoder(model)
    return model


def biased() -> Any:
    """Biases on both sides, a packed head, planes left out, and key heads that have no halves: 3."""
    sizes = {
        **SIZES,
        "hidden_size": 96,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "vocab_size": 200,
        "tied": True,
    }
    model = tiny_model(attention_bias=True, mlp_bias=True, **sizes)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    grinqh.quantize_model(model, GrinqhConfig(convert_lm_head=True, stored_bits=5, **SETTINGS), progress=False)
    grinqh.calibrate(model, token_ids() % 200, progress=False)
    return model


def partly_packed() -> Any:
    """Attention stays whole: one of its layers is not packed."""
    return calibrated(qwen2(**SIZES), GrinqhConfig(modules_to_not_convert=["o_proj"], **SETTINGS))


MODELS: dict[str, Callable[[], Any]] = {
    "Llama": llama,
    "Qwen3": qwen,
    "fused": fused,
    "fused layers": fused_layers,
    "biased": biased,
    "partly packed": partly_packed,
}


def greedy(model: Any, **options: Any) -> Tensor:
    ids: Tensor = model.generate(token_ids(2, 9) % 200, max_new_tokens=12, do_sample=False, **options)
    return ids


def outputs(model: Any) -> dict[str, Tensor]:
    """What a model gives at two settings of the dial, by grades and for prompts."""
    found = {"bytes": torch.tensor(grinqh.packed_bytes(model)), "stored": torch.tensor(grinqh.stored_bits(model))}
    prompt = token_ids(2, 9) % 200
    for bits in (8, 3):
        grinqh.set_bits(model, bits)
        found[f"thresholds at {bits}"] = torch.cat([layer.thresholds.flatten() for layer in layers(model)])
        found[f"prompt at {bits}"] = logits(model, prompt)
        with grinqh.graded(model):
            found[f"logits at {bits}"] = logits(model, prompt)
            with scalar_kernels():
                found[f"scalar logits at {bits}"] = logits(model, prompt)
        grinqh.count_reads(model, keep_tokens=20)
        found[f"tokens at {bits}"] = greedy(model)
        found[f"read bits at {bits}"] = grinqh.token_reads(model).read_bits
        found[f"layers at {bits}"] = torch.tensor(list(grinqh.read_stats(model).layers.values()))
        grinqh.count_reads(model, False)
    return found


@contextmanager
def scalar_kernels() -> Iterator[None]:
    """Within it no kernel rounds x, and only the order of float32 sums tells parts from the whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRINQH_CPU_ISA", "scalar")
        yield


def layers(model: Any) -> list[grinqh.GrinqhLinear]:
    return list(grinqh.packed_layers(model).values())


def gradient(model: Any) -> Tensor:
    """Of one number computed from the logits, by the embeddings of the tokens."""
    embeddings = model.get_input_embeddings()(token_ids(1, 5)).detach().requires_grad_()
    with grinqh.graded(model):
        model(inputs_embeds=embeddings).logits.square().sum().backward()
    grad: Tensor = embeddings.grad
    return grad


def other_ways(model: Any) -> dict[str, Tensor]:
    """Gradients, a static cache, compiled code."""
    grinqh.set_bits(model, 4)
    found = {"gradient": gradient(model), "static": greedy(model, cache_implementation="static")}
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        return found | {"compiled": compiled(token_ids(2, 3)).logits, "eager": model(token_ids(2, 3)).logits}


def message(call: Callable[[], Any]) -> str:
    """The text of the InputError that a call raises."""
    try:
        call()
    except InputError as error:
        return str(error)
    return "no error"


def refusals(folder: Path) -> dict[str, str]:
    """What is refused, and how, where there are two processes."""
    model, saved = llama(), folder / "model"
    model.save_pretrained(saved)  # writes on one process alone
    dist.barrier()
    loading = {"distributed_config": DistributedConfig(tp_size=2)}
    found = {"tp_plan": message(lambda: AutoModelForCausalLM.from_pretrained(saved, **loading))}
    grinqh.set_bits(model, 3, exact_budget=True)
    found["exact before"] = message(lambda: grinqh.tensor_parallel(model))
    grinqh.set_bits(model, 3)
    plan, model._tp_plan = model._tp_plan, {}
    found["no plan"] = message(lambda: grinqh.tensor_parallel(model))
    model._tp_plan = {"model.layers.*.self_attn.q_proj": "colwise"}
    found["useless plan"] = message(lambda: grinqh.tensor_parallel(model))
    model._tp_plan = plan
    one_head = calibrated(tiny_model(**SIZES, num_key_value_heads=1), GrinqhConfig(**SETTINGS))
    found["one head"] = message(lambda: grinqh.tensor_parallel(one_head))
    assert not any(isinstance(layer, LayerShard) for layer in [*layers(model), *layers(one_head)])
    wide = calibrated(tiny_model(**SIZES), GrinqhConfig(block=64))
    found["wide block"] = message(lambda: grinqh.tensor_parallel(wide))
    odd = calibrated(tiny_model(**SIZES | {"intermediate_size": 144}), GrinqhConfig(fuse=True, **SETTINGS))
    found["odd fused"] = message(lambda: grinqh.tensor_parallel(odd))

    grinqh.tensor_parallel(model)
    assert "part of 128 x 64" in repr(layers(model)[0])
    before = [layer.thresholds.clone() for layer in layers(model)]
    found["twice"] = message(lambda: grinqh.tensor_parallel(model))
    found["exact after"] = message(lambda: grinqh.set_bits(model, 2, exact_budget=True))
    assert all(torch.equal(layer.thresholds, old) for layer, old in zip(layers(model), before, strict=True))
    found["save"] = message(lambda: model.save_pretrained(saved))
    found["calibrate"] = message(lambda: grinqh.calibrate(model, token_ids()))
    return found


def work(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {name: outputs(grinqh.tensor_parallel(make())) for name, make in MODELS.items()}
    found["other ways"] = other_ways(grinqh.tensor_parallel(llama()))
    return found | {"refusals": refusals(folder)}


def run(rank: int, folder: Path) -> None:
    """What a process does."""
    torch.set_num_threads(1)
    store, limit = f"file://{folder}/store", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=limit)
    try:
        torch.save(work(folder), folder / f"{rank}.pt")
        dist.barrier()  # none leaves while another still needs it
    finally:
        dist.destroy_process_group()
