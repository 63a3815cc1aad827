"""Tiny language models with random weights, and token ids for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

import grinqh

VOCABULARY = 256


def tiny_model(
    config: type[PretrainedConfig] = LlamaConfig,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Any:
    """14 layers to convert: q, k, v, o, gate, up and down of two blocks, without biases."""
    torch.manual_seed(0)
    settings = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "eos_token_id": None,
        "pad_token_id": 0,
    } | settings
    return AutoModelForCausalLM.from_config(config(**settings), dtype=dtype).eval()


def qwen3(**settings: Any) -> Any:
    return tiny_model(Qwen3Config, **settings)


def llama3(**settings: Any) -> Any:
    """Rotations of three kinds: kept, mixed and slowed down."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    return tiny_model(LlamaConfig, rope_parameters=rope, **settings)


def qwen2(**settings: Any) -> Any:
    """Biases of q, k and v that are not 0, as in trained models."""
    model = tiny_model(Qwen2Config, **settings)
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            nn.init.normal_(getattr(layer.self_attn, name).bias, std=0.1)
    return model


def mistral(**settings: Any) -> Any:
    return tiny_model(MistralConfig, **{"sliding_window": 8} | settings)


def smollm(**settings: Any) -> Any:
    return tiny_model(LlamaConfig, **{"tied": True} | settings)


# By the names that the README gives them.
FAMILIES = {
    "Llama 3": llama3,
    "Qwen3": qwen3,
    "Qwen2.5": qwen2,
    "Mistral": mistral,
    "SmolLM": smollm,
}


def qwen3_moe(**settings: Any) -> Any:
    """4 experts in each of two blocks."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return tiny_model(Qwen3MoeConfig, **experts | settings)


def mixtral(**settings: Any) -> Any:
    """4 experts in each of two blocks."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}
    return tiny_model(MixtralConfig, **experts | settings)


# Refused unless their experts are named.
MIXTURES = {"Qwen3-MoE": qwen3_moe, "Mixtral": mixtral}


def token_ids(rows: int = 4, length: int = 64, seed: int = 1) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def calibrated(model: Any | None = None, config: grinqh.GrinqhConfig | None = None, **arguments: Any) -> Any:
    """A converted and calibrated model; five planes unless the config says otherwise."""
    config = grinqh.GrinqhConfig(plane_widths=(2, 1, 1, 2, 2)) if config is None else config
    model = grinqh.quantize_model(tiny_model() if model is None else model, config, progress=False)
    grinqh.calibrate(model, token_ids(), progress=False, **arguments)
    return model


def logits(model: Any, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(token_ids(2, 9) if ids is None else ids).logits


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)
