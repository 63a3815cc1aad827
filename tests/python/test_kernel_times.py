"""Kernels of a traced call, put into categories: what needs no GPU of benchmarks/kernel_times.py."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
GEMM = "nvjet_hsh_64x8_64x16_4x1_v_bz_TNT"

# A model of one layer: names, ops and category of the kernels of a step.
STEP: list[tuple[str, tuple[str, ...], str]] = [
    ("gemmSN_NN", ("aten::matmul", "aten::bmm"), "rest"),  # of rotary embeddings
    ("reduce_kernel", ("aten::mean",), "rest"),
    (GEMM, ("aten::linear", "aten::mm"), "linears"),
    ("index_copy_kernel", ("aten::index_copy_",), "rest"),
    (GEMM, ("aten::baddbmm",), "attention"),
    ("elementwise_kernel", ("aten::where",), "attention"),
    ("softmax_warp_forward", ("aten::softmax", "aten::_softmax"), "attention"),
    (GEMM, ("aten::bmm",), "attention"),
    ("void grinqh::cuda::gemv_kernel<1>", ("grinqh::linear",), "linears"),
    ("triton_per_fused_add_mean_mul_4", (), "rest"),
    (GEMM, ("aten::linear", "aten::mm"), "head"),
    ("splitKreduce_kernel", ("aten::linear", "aten::mm"), "head"),
    ("Memcpy DtoD (Device -> Device)", ("aten::copy_",), "rest"),
]


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("kernel_times")


def step(times: Any, ops: bool = True) -> list[Any]:
    return [times.Kernel(name, 2.0**i, chain if ops else ()) for i, (name, chain, _) in enumerate(STEP)]


def test_the_ops_tell_products_of_attention_from_linear_layers(times: Any) -> None:
    assert times.categories(step(times)) == [category for *_, category in STEP]


def test_kernels_that_overlap_count_from_the_end_of_those_before(times: Any) -> None:
    spans = [("a", 0, 10), ("b", 4, 12), ("c", 5, 8), ("d", 20, 3)]
    trace = [{"ph": "X", "cat": "kernel", "name": name, "ts": ts, "dur": dur} for name, ts, dur in reversed(spans)]
    assert [(kernel.name, kernel.us) for kernel in times.kernels_of(trace)] == [("a", 10), ("b", 6), ("c", 0), ("d", 3)]


@pytest.mark.parametrize(
    ("name", "ops", "category"),
    [
        ("reduce_kernel", ("aten::linear", "aten::addmm"), "linears"),
        ("flash_named_gemm", ("grinqh::linear",), "linears"),
        (GEMM, ("aten::matmul", "aten::bmm"), "attention"),
        ("void grinqh::cuda::attention_kernel<__half, 128>", ("grinqh::decode_attention",), "attention"),
        ("void grinqh::cuda::gemv_kernel<true, 1>", ("grinqh::fused_linear",), "linears"),
    ],
)
def test_ops_are_asked_before_names(times: Any, name: str, ops: tuple[str, ...], category: str) -> None:
    assert times.own_category(times.Kernel(name, 1.0, ops)) == category


@pytest.mark.parametrize(
    ("name", "category"),
    [
        ("void tinygemm_m16n8k16_chunk_kernel<...>", "linears"),
        ("cublasLt::splitKreduce_kernel<32, 16>", "linears"),
        ("void cutlass::Kernel2<cutlass_80_tensorop>", "linears"),
        ("fmha_cutlassF_f16_aligned_64x64_rf_sm80", "attention"),
        ("void flash_fwd_splitkv_kernel<...>", "attention"),
        ("void grinqh::cuda::attention_kernel<__half, 128>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
        ("triton_per_fused__softmax_add_where_7", "attention"),
        ("triton_tem_fused_mm_3", "linears"),
        ("triton_red_fused_embedding_grinqh_0", "rest"),
        ("void at::native::index_copy_kernel", "rest"),
    ],
)
def test_names_tell_where_ops_do_not(times: Any, name: str, category: str) -> None:
    assert times.own_category(times.Kernel(name, 1.0)) == category


def test_kernels_of_a_graph_take_the_categories_of_those_launched(times: Any) -> None:
    parts = times.itemise(step(times, ops=False) * 3, 3, step(times))
    wanted = {
        f"{category}_ms": sum(2.0**i for i, row in enumerate(STEP) if row[2] == category) / 1e3
        for category in times.CATEGORIES
    }
    assert parts == pytest.approx(wanted | {"kernels": len(STEP)})


def test_other_kernels_are_told_by_name(times: Any) -> None:
    graph = [*step(times, ops=False)[1:], times.Kernel("void cutlass_gemm", 5e3)]
    parts = times.itemise(graph, 1, step(times))
    assert parts["kernels"] == len(STEP)
    assert parts["head_ms"] == pytest.approx(5.0)
    assert sum(parts[f"{category}_ms"] for category in times.CATEGORIES) == pytest.approx(5.0 + (2**13 - 2) / 1e3)


@pytest.mark.parametrize("kernels", [0, 5])
def test_calls_that_are_not_alike_are_refused(times: Any, kernels: int) -> None:
    with pytest.raises(ValueError, match=f"2 calls ran {kernels} kernels"):
        times.itemise(step(times)[:kernels], 2, step(times))


def test_the_kernels_that_take_longest_come_first(times: Any) -> None:
    kernels = [times.Kernel("a", 1.0), times.Kernel("b", 3.0), times.Kernel("a", 1.0)] * 2
    assert times.top(kernels, 2) == [{"name": "b", "calls": 1, "us": 3.0}, {"name": "a", "calls": 2, "us": 2.0}]


def test_a_trace_gives_kernels_in_order_with_the_ops_around_them(times: Any) -> None:
    def event(cat: str, name: str, ts: float, dur: float, id: int | None = None, tid: int = 1) -> dict[str, Any]:
        args = {} if id is None else {"External id": id}
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}

    trace = [
        {"ph": "M", "name": "process_name"},
        event("cpu_op", "aten::linear", 0, 10, 1),
        event("cpu_op", "aten::mm", 1, 8, 2),
        event("cpu_op", "aten::add", 20, 5, 3),
        event("cpu_op", "elsewhere", 0, 50, 4, tid=2),
        event("cuda_runtime", "cudaLaunchKernel", 2, 1, 2),
        event("kernel", "add_kernel", 40, 2.0, 3, tid=7),
        event("kernel", GEMM, 30, 4.0, 2, tid=7),
        event("gpu_memset", "Memset (Device)", 50, 1.0, None, tid=7),
    ]
    assert times.kernels_of(trace) == [
        times.Kernel(GEMM, 4.0, ("aten::linear", "aten::mm")),
        times.Kernel("add_kernel", 2.0, ("aten::add",)),
        times.Kernel("Memset (Device)", 1.0),
    ]
