"""A tiny full-precision language model with a tokenizer, as a Hugging Face folder, for tests of what reads one."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"
# One token for each byte, and one merged from two.
TOKENS = [BOS, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
MERGES = [("t", "h")]
CHAT_TEMPLATE = "{% for message in messages %}Q: {{ message['content'] }}\nA:{% endfor %}"


def make_tokenizer(*, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes."""
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(TOKENS)}, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS, chat_template=CHAT_TEMPLATE
    )


def make_model(*, tied: bool = True, seed: int = 0) -> LlamaForCausalLM:
    """Two layers, with columns of very different size as in trained models."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(TOKENS),
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("proj.weight"):
                weight.mul_(torch.logspace(-1, 1, weight.shape[1])[torch.randperm(weight.shape[1])])
    return model


def make_source(folder: Path, *, tied: bool = True, shards: bool = False, adds_bos: bool = False) -> Path:
    """Writes model and tokenizer; with shards, the weights in several files."""
    make_model(tied=tied).save_pretrained(folder, max_shard_size="100KB" if shards else "1GB")
    make_tokenizer(adds_bos=adds_bos).save_pretrained(folder)
    return folder
