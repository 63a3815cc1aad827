"""Attention by groups of query heads against transformers' own: prompts, steps, masks, windows, compiled code."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import calibrated, llama3, mistral, qwen2, qwen3, smollm, token_ids
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import grinqh
from grinqh.attention import NAME, grouped_attention, grouped_attention_forward, has_kernel

pytest.importorskip("transformers")
from transformers import StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

CLOSE: Any = {"rtol": 1e-4, "atol": 1e-5}
Family = Callable[..., Any]
each_family = pytest.mark.parametrize("make", [llama3, qwen3, qwen2, mistral, smollm], ids=lambda make: make.__name__)


def both(make: Family) -> tuple[Any, Any]:
    """The same model with grouped attention, and with transformers' own."""
    model = make(initializer_range=0.15)
    grouped = copy.deepcopy(model)
    grinqh.use_grouped_attention(grouped)
    assert grouped.config._attn_implementation == NAME
    assert model.config._attn_implementation == "sdpa"
    return grouped, model


def decoded(model: Any, ids: Tensor, prompt: int, cache: Any, mask: Tensor | None = None) -> Tensor:
    """Logits of a prompt and of single tokens after it."""
    seen, outputs = 0, []
    with torch.no_grad():
        for length in [prompt] + [1] * (ids.shape[1] - prompt):
            part = None if mask is None else mask[:, : seen + length]
            step = model(ids[:, seen : seen + length], attention_mask=part, past_key_values=cache, use_cache=True)
            outputs.append(step.logits)
            cache = step.past_key_values
            seen += length
    return torch.cat(outputs, dim=1)


@each_family
@pytest.mark.parametrize("static", [False, True], ids=["growing cache", "static cache"])
def test_prompts_and_steps_are_those_of_sdpa(make: Family, static: bool) -> None:
    grouped, model = both(make)
    ids = token_ids(2, 20)

    def cache() -> Any:
        return StaticCache(config=model.config, max_cache_len=32) if static else None

    torch.testing.assert_close(decoded(grouped, ids, 12, cache()), decoded(model, ids, 12, cache()), **CLOSE)


def test_padding_is_masked() -> None:
    grouped, model = both(qwen3)
    ids, mask = token_ids(2, 16), torch.ones(2, 16, dtype=torch.long)
    mask[0, :5] = 0
    got, wanted = decoded(grouped, ids, 10, None, mask), decoded(model, ids, 10, None, mask)
    torch.testing.assert_close(got[:, 5:], wanted[:, 5:], **CLOSE)


def test_generated_tokens_are_the_same() -> None:
    grouped, model = both(llama3)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    assert torch.equal(grouped.generate(token_ids(2, 9), **options), model.generate(token_ids(2, 9), **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (4, 1)])
@pytest.mark.parametrize("mask", ["none", "bool", "added", "of each row"])
def test_one_position_is_that_of_sdpa(dtype: torch.dtype, heads: tuple[int, int], mask: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, heads[0], 1, 16, generator=generator).to(dtype)
    key, value = (torch.randn(3, heads[1], 40, 16, generator=generator).to(dtype) for _ in range(2))
    allowed = torch.rand(3 if mask == "of each row" else 1, 1, 1, 40, generator=generator) < 0.5
    given = {"none": None, "added": torch.where(allowed, 0.0, torch.finfo(dtype).min).to(dtype)}.get(mask, allowed)
    got = grouped_attention(query, key, value, given, 0.3)
    keys, values = (t.repeat_interleave(heads[0] // heads[1], dim=1) for t in (key, value))
    wanted = nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=given, scale=0.3)
    assert got.shape == (3, 1, heads[0], 16)
    assert got.is_contiguous()
    tolerance = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(got, wanted.transpose(1, 2), rtol=tolerance, atol=tolerance)


def test_the_cache_is_not_copied() -> None:
    query, cache = torch.randn(2, 8, 1, 16), torch.randn(2, 2, 4096, 16)
    with torch.profiler.profile(profile_memory=True) as profiler:
        grouped_attention(query, cache, cache, torch.ones(1, 1, 1, 4096, dtype=torch.bool), 0.25)
    largest = max(event.self_cpu_memory_usage for event in profiler.events())
    assert largest <= 2 * 8 * 4096 * 4  # the scores


def test_the_kernel_is_for_gpus_alone_and_its_shapes_are_known_without_one() -> None:
    query, key = torch.randn(2, 8, 1, 64, dtype=torch.float16), torch.randn(2, 2, 40, 64, dtype=torch.float16)
    assert not has_kernel(query, key, key, None)
    with pytest.raises(NotImplementedError, match="decode_attention"):
        torch.ops.grinqh.decode_attention(query, key, key, None, 0.1)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in (query, key, key)]
        result = torch.ops.grinqh.decode_attention(*fakes, None, 0.1)
    assert (result.shape, result.dtype) == ((2, 1, 8, 64), torch.float16)


@pytest.mark.parametrize(
    ("query", "cache", "mask", "takes"),
    [
        ({}, {}, None, True),
        ({}, {}, torch.float16, True),
        ({}, {}, torch.bool, True),
        ({}, {}, torch.float32, False),
        ({"dtype": torch.float32}, {"dtype": torch.float32}, None, False),
        ({"dtype": torch.bfloat16}, {}, None, False),
        ({"dim": 32}, {"dim": 32}, None, False),
        ({}, {"stride": (5120, 2560, 1, 40)}, None, False),
        ({}, {"stride": (5124, 2560, 64, 1)}, None, False),
        ({"requires_grad": True}, {}, None, False),
    ],
)
def test_the_kernel_is_given_only_what_it_takes(
    query: dict[str, Any],
    cache: dict[str, Any],
    mask: torch.dtype | None,
    takes: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def on_gpu(heads: int, length: int, dim: int = 64, stride: Any = None, **options: Any) -> Tensor:
        stride = stride or (heads * length * dim, length * dim, dim, 1)
        options = {"dtype": torch.float16} | options
        return torch.empty_strided((2, heads, length, dim), stride, device="cuda", **options)

    monkeypatch.setattr("grinqh.attention._COMPILED", True)
    with FakeTensorMode():
        keys = on_gpu(2, 40, **cache)
        allowed = None if mask is None else torch.empty(1, 1, 1, 40, dtype=mask, device="cuda")
        assert has_kernel(on_gpu(8, 1, **query), keys, keys, allowed) == takes


def test_a_row_without_anything_to_attend_to_is_finite() -> None:
    query, key = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 8, 16)
    assert grouped_attention(query, key, key, torch.zeros(1, 1, 1, 8, dtype=torch.bool), 0.25).isfinite().all()


def test_what_is_out_of_the_ordinary_goes_to_sdpa() -> None:
    layer = qwen3().model.layers[0].self_attn
    query, key = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 8, 16)
    for mask in (torch.rand(1, 4, 1, 8) < 0.5, torch.zeros(1, 4, 1, 8)):  # a mask for each head
        got, _ = grouped_attention_forward(layer, query, key, key, mask, scaling=0.25)
        wanted, _ = sdpa_attention_forward(layer, query, key, key, mask, scaling=0.25)
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", ["softcap", "s_aux"])
@pytest.mark.parametrize("positions", [1, 3])
def test_what_neither_can_do_is_refused(name: str, positions: int) -> None:
    layer = qwen3().model.layers[0].self_attn
    query, key = torch.randn(1, 4, positions, 16), torch.randn(1, 2, 8, 16)
    with pytest.raises(grinqh.InputError, match=f"no {name}, which Qwen3Attention needs"):
        grouped_attention_forward(layer, query, key, key, None, scaling=0.25, **{name: 20.0})


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.filterwarnings("ignore")  # of torch, in its own compiler
def test_a_step_compiles_into_one_graph(packed: bool) -> None:
    model: Any = qwen3(initializer_range=0.15)
    if packed:
        model = calibrated(model, grinqh.GrinqhConfig(fuse=True))
    grinqh.use_grouped_attention(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    cache = StaticCache(config=model.config, max_cache_len=16)
    ids, mask = token_ids(2, 9), (torch.arange(16) <= 8).expand(2, 1, 1, 16)
    with torch.no_grad():
        model(ids[:, :8], past_key_values=cache, use_cache=True)
        outputs = []
        for forward in (model, compiled):
            for layer in cache.layers:
                layer.cumulative_length.fill_(8)
            positions = torch.full((2, 1), 8)
            step = forward(
                ids[:, 8:], position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True
            )
            outputs.append(step.logits.clone())
    torch.testing.assert_close(outputs[1], outputs[0], **CLOSE)


def test_a_model_whose_attention_cannot_be_exchanged_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = qwen3()
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", lambda *_: False)
    with pytest.raises(grinqh.InputError, match="Qwen3ForCausalLM does not let"):
        grinqh.use_grouped_attention(model)
