"""Attention by groups of query heads on the GPU: its products, and a captured and compiled step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import llama3, token_ids
from torch import nn
from transformers import StaticCache

import grinqh
from grinqh.attention import grouped_attention


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 4])
def test_one_position_is_that_of_sdpa(dtype: torch.dtype, batch: int) -> None:
    torch.manual_seed(0)
    query = torch.randn(batch, 32, 1, 128, device="cuda", dtype=dtype)
    key, value = (torch.randn(batch, 8, 1024, 128, device="cuda", dtype=dtype) for _ in range(2))
    mask = (torch.arange(1024, device="cuda") <= 512).expand(batch, 1, 1, 1024)
    got = grouped_attention(query, key, value, mask, 128**-0.5)
    repeated = [t.repeat_interleave(4, dim=1).double() for t in (key, value)]
    wanted = nn.functional.scaled_dot_product_attention(query.double(), *repeated, attn_mask=mask).transpose(1, 2)
    assert float((got.double() - wanted).norm() / wanted.norm()) < (2e-3 if dtype == torch.float16 else 1e-2)


@pytest.mark.filterwarnings("ignore")  # of torch, in its own compiler
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_captured_step_is_that_of_the_whole_sequence(compiled: bool) -> None:
    model: Any = llama3(initializer_range=0.15).to("cuda")
    grinqh.use_grouped_attention(model)
    forward = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
    ids, cache = token_ids(2, 9).cuda(), StaticCache(config=model.config, max_cache_len=32)
    mask = (torch.arange(32, device="cuda") <= 8).expand(2, 1, 1, 32)
    positions, stream = torch.full((2, 1), 8, device="cuda"), torch.cuda.Stream()
    last = ids[:, 8:].clone()

    def step() -> torch.Tensor:
        for layer in cache.layers:
            layer.cumulative_length.fill_(8)
        return forward(
            input_ids=last, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True
        ).logits

    with torch.no_grad():
        model(ids[:, :8], past_key_values=cache, use_cache=True)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                captured = step()
        graph.replay()
        torch.cuda.synchronize()
        wanted = model(ids, use_cache=False).logits[:, -1:]
    assert float((captured - wanted).norm() / wanted.norm()) < 1e-2
    torch.compiler.reset()
