"""The op decode_attention against float64: every size, mask and stride, what it must not read, and equal bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

attend = torch.ops.grinqh.decode_attention
SCALE = 0.11
DTYPES = [torch.float16, torch.bfloat16]
LENGTHS = [1, 33, 129, 1024, 5000]


def heads(batch: int, number: int, length: int, dim: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(batch, number, length, dim, device="cuda", generator=generator).to(dtype)


def inputs(
    batch: int, kv_heads: int, group: int, length: int, dim: int, dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor, Tensor]:
    query = heads(batch, kv_heads * group, 1, dim, dtype, 1)
    return query, heads(batch, kv_heads, length, dim, dtype, 2), heads(batch, kv_heads, length, dim, dtype, 3)


def reference(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    group = query.shape[1] // key.shape[1]
    keys, values = (t.double().repeat_interleave(group, dim=1) for t in (key, value))
    mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    mask = mask if mask is None else mask[..., : key.shape[2]]
    return nn.functional.scaled_dot_product_attention(
        query.double(), keys, values, attn_mask=mask, scale=SCALE
    ).transpose(1, 2)


def assert_close(got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape
    assert got.is_contiguous()
    error = float((got.double() - wanted).norm() / wanted.norm())
    assert error < (4e-4 if got.dtype == torch.float16 else 3e-3), error  # rounding of the result alone


def random_mask(batch: int, length: int, kind: str, dtype: torch.dtype) -> Tensor | None:
    allowed = torch.rand(batch, 1, 1, length, device="cuda", generator=torch.Generator("cuda").manual_seed(4)) < 0.5
    allowed[..., length // 2] = True
    added = torch.randn(allowed.shape, device="cuda").to(dtype)
    return {"none": None, "bool": allowed, "added": torch.where(allowed, added, -torch.inf)}[kind]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", ["none", "bool", "added"])
def test_values_are_those_of_float64(dtype: torch.dtype, dim: int, length: int, kind: str) -> None:
    given = inputs(2, 3, 4, length, dim, dtype)
    mask = random_mask(2, length, kind, dtype)
    assert_close(attend(*given, mask, SCALE), reference(*given, mask))


@pytest.mark.parametrize("group", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("kv_heads", [1, 8])
def test_any_number_of_query_heads_shares_a_key_head(group: int, kv_heads: int) -> None:
    given = inputs(3, kv_heads, group, 200, 128)
    assert_close(attend(*given, None, SCALE), reference(*given, None))


def test_a_mask_may_serve_all_rows_be_longer_than_the_cache_and_have_strides() -> None:
    given = inputs(3, 2, 4, 300, 64)
    mask = random_mask(1, 700, "bool", torch.float16)
    assert mask is not None
    for part in (mask, mask[..., ::2], mask[..., :300], mask.expand(3, -1, -1, -1)):
        assert_close(attend(*given, part, SCALE), reference(*given, part))


def test_caches_and_queries_may_have_strides() -> None:
    query, key, value = inputs(2, 4, 2, 150, 128)
    cache = torch.full((2, 150, 3, 4, 128), torch.nan, device="cuda", dtype=torch.float16)
    cache[:, :, 0], cache[:, :, 2] = key.transpose(1, 2), value.transpose(1, 2)
    strided = [cache[:, :, i].transpose(1, 2) for i in (0, 2)]
    wide = torch.stack([query, torch.full_like(query, torch.nan)], dim=-1)[..., 0]
    assert torch.equal(attend(wide, *strided, None, SCALE), attend(query, key, value, None, SCALE))


def test_positions_that_are_masked_are_not_read() -> None:
    query, key, value = inputs(2, 2, 4, 1024, 128)
    allowed = (torch.arange(1024, device="cuda") % 7 < 3) & (torch.arange(1024, device="cuda") < 600)
    mask = allowed.expand(2, 1, 1, 1024)
    clean = attend(query, key, value, mask, SCALE)
    for cache in (key, value):
        cache[:, :, ~allowed] = torch.nan
    assert torch.equal(attend(query, key, value, mask, SCALE), clean)
    assert clean.isfinite().all()


@pytest.mark.parametrize("length", [64, 1024])
def test_a_row_that_may_attend_to_nothing_gives_zeros(length: int) -> None:
    given = inputs(2, 2, 4, length, 128)
    mask = torch.ones(2, 1, 1, length, dtype=torch.bool, device="cuda")
    mask[1] = False
    got = attend(*given, mask, SCALE)
    assert (got[1] == 0).all()
    assert torch.equal(got[0], attend(*given, None, SCALE)[0])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row(bad: float) -> None:
    query, key, value = inputs(3, 2, 4, 700, 128)
    clean = attend(query, key, value, None, SCALE)
    key[1, 0, 350, 5] = bad
    got = attend(query, key, value, None, SCALE)
    assert torch.equal(got[[0, 2]], clean[[0, 2]])
    assert torch.equal(got[1, 0, 4:], clean[1, 0, 4:])
    assert torch.equal(got[1, 0, :4].isfinite(), reference(query, key, value, None)[1, 0, :4].isfinite())


def test_large_scores_do_not_overflow() -> None:
    query, key, value = inputs(1, 2, 4, 900, 128)
    query, key = query * 60, key * 60
    assert_close(attend(query, key, value, None, SCALE), reference(query, key, value, None))


@pytest.mark.parametrize("length", LENGTHS)
def test_a_row_has_the_same_bits_in_every_batch_and_run(length: int) -> None:
    given = inputs(7, 2, 4, length, 128)
    mask = random_mask(7, length, "bool", torch.float16)
    assert mask is not None
    whole = attend(*given, mask, SCALE)
    for _ in range(20):
        assert torch.equal(attend(*given, mask, SCALE), whole)
    for row in range(7):
        alone = [tensor[row : row + 1] for tensor in (*given, mask)]
        assert torch.equal(attend(*alone, SCALE), whole[row : row + 1])


def test_empty_inputs_give_empty_or_zero_results() -> None:
    assert attend(*inputs(0, 2, 4, 30, 64), None, SCALE).shape == (0, 1, 8, 64)
    assert (attend(*inputs(2, 2, 4, 0, 64), None, SCALE) == 0).all()


def test_streams_do_not_share_workspaces() -> None:
    given = inputs(4, 8, 4, 4096, 128)
    wanted = attend(*given, None, SCALE)
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(attend(*given, None, SCALE))
    torch.cuda.synchronize()
    assert all(torch.equal(result, wanted) for result in results)


def test_a_graph_follows_its_mask() -> None:
    given = inputs(2, 2, 4, 1024, 128)
    mask = torch.zeros(1, 1, 1, 1024, dtype=torch.bool, device="cuda")
    attend(*given, mask, SCALE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = attend(*given, mask, SCALE)
    for filled in (1, 500, 1024):
        mask[..., :filled] = True
        graph.replay()
        assert_close(got, reference(*given, mask))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": lambda t: t.float()}, "query is float32"),
        ({"query": lambda t: t[:, :7]}, "a divisor of 7"),
        ({"query": lambda t: t.expand(-1, -1, 2, -1)}, "query has 2 positions"),
        ({"key": lambda t: t.bfloat16()}, "key is bfloat16: it must be float16"),
        ({"key": lambda t: t[..., :32], "query": lambda t: t[..., :32]}, "dim is 32: allowed are 64, 128 and 256"),
        ({"value": lambda t: t[:, :, :5]}, "value has shape"),
        ({"value": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)}, "value has strides"),
        ({"key": lambda t: t.cpu()}, "key is on cpu"),
        ({"mask": lambda t: t[..., :20]}, "mask has shape"),
        ({"mask": lambda t: t.float()}, "mask is float32: it must be bool or float16"),
        ({"mask": lambda t: t.cpu()}, "mask is on cpu"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    query, key, value = inputs(2, 2, 4, 40, 64)
    given = {"query": query, "key": key, "value": value, "mask": random_mask(2, 40, "bool", torch.float16)}
    for name, make in change.items():
        given[name] = make(given[name])
    with pytest.raises(RuntimeError, match=message):
        attend(given["query"], given["key"], given["value"], given["mask"], SCALE)


def test_the_op_passes_opcheck() -> None:
    given = inputs(2, 2, 4, 100, 64)
    mask = random_mask(2, 100, "bool", torch.float16)
    torch.library.opcheck(attend, (*given, mask, SCALE), test_utils=("test_schema", "test_faketensor"))
