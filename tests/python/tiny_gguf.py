"""The model of tiny_source as a GGUF file."""

from __future__ import annotations

from pathlib import Path

import torch
from gguf import GGUFWriter
from tiny_source import MERGES, TOKENS, make_model
from torch import Tensor

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def make_gguf(path: Path) -> Path:
    """Writes the tied model, in float32."""
    model = make_model()
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))  # control tokens, then normal ones
    writer.add_token_merges([" ".join(merge) for merge in MERGES])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in model.state_dict().items():
        stored = _gguf_name(name)
        if stored is not None:
            writer.add_tensor(
                stored, _gguf_layout(name, tensor, config.num_attention_heads, config.num_key_value_heads).numpy()
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_name(name: str) -> str | None:
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if not name.startswith("model.layers."):
        return whole.get(name)
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.weight"


def _gguf_layout(name: str, weight: Tensor, heads: int, kv_heads: int) -> Tensor:
    """GGUF keeps the rows of a head's queries and keys in pairs, transformers in halves."""
    for part, count in (("q_proj", heads), ("k_proj", kv_heads)):
        if part in name:
            rows, columns = weight.shape
            return (
                weight.reshape(count, 2, rows // count // 2, columns)
                .transpose(1, 2)
                .reshape(rows, columns)
                .contiguous()
            )
    return torch.clone(weight)
