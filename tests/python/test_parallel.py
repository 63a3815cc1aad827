"""Layers shared out among processes: the parts give what the whole gives."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

import grinqh
from grinqh import GrinqhLinear, InputError, LayerFormat, packing, parallel
from grinqh.parallel import shard_inputs, shard_outputs
from grinqh.sharding import cut, take_inputs, take_outputs

LAYOUTS = [(2, 2, 2, 2), (2, 1, 1, 2, 2), (1,) * 8, (4, 4), (8,), (4, 2, 1)]
KERNEL_ERROR = 1e-4  # of the sum of the terms' magnitudes (docs/method.md)
THRESHOLDS = [0.0, 0.2, 0.4, 0.8, 1.2, 1.5, 1.8, 2.0]


def make_tensors(
    format: LayerFormat, out_features: int, in_features: int, stored: list[int] | None = None
) -> packing.PackedTensors:
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0))
    tensors = packing.pack_weight(weight, format)
    order = torch.randperm(in_features, generator=torch.Generator().manual_seed(3))
    tensors = packing.sort_channels(tensors, order)
    if stored is not None:
        tensors = packing.keep_channels(tensors, stored)
    return tensors | {"bias": torch.linspace(-1, 1, out_features)}


def graded_layer(tensors: packing.PackedTensors, format: LayerFormat) -> GrinqhLinear:
    layer = GrinqhLinear(tensors, format)
    layer.set_thresholds(THRESHOLDS[: format.planes])
    layer.count_reads = True
    return layer


def rows(count: int, in_features: int) -> Tensor:
    return torch.randn(count, in_features, generator=torch.Generator().manual_seed(2))


def check_specs(tensors: packing.PackedTensors, format: LayerFormat) -> None:
    """A part is a layer that could be on the disk."""
    in_features, out_features = len(tensors["channel_order"]), len(tensors["row_scale"])
    found = {name: packing.TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    packing.check_specs("part", format, in_features, out_features, "bias" in tensors, 64, found)
    packing.check_values("part", tensors)
    assert all(tensor.is_contiguous() for tensor in tensors.values())


# ---- along the outputs


@pytest.mark.parametrize("widths", LAYOUTS)
@pytest.mark.parametrize(("outputs", "block", "world"), [(256, 64, 2), (131, 32, 3), (129, 128, 2), (70, 64, 1)])
def test_outputs_of_the_parts_are_the_layers_bit_for_bit(
    widths: tuple[int, ...], outputs: int, block: int, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    format, x = LayerFormat(widths, block), rows(3, 37)
    tensors = make_tensors(format, outputs, 37, [37, 33, 20, 10, 5, 3, 1, 0][: len(widths)])
    whole = graded_layer(tensors, format)
    parts = []
    for rank in range(world):
        part = shard_outputs(tensors, format, rank, world)
        check_specs(part, format)
        parts.append(graded_layer(part, format))
    assert torch.equal(torch.cat([part.dense() for part in parts], dim=-1), whole.dense())
    # The vector kernels round x to a scale of all outputs together; the scalar one is the specification.
    error = (torch.cat([part(x) for part in parts], dim=-1) - whole(x)).abs()
    assert (error <= 2 * KERNEL_ERROR * (x.abs() @ whole.dense().abs())).all()
    assert all(torch.equal(part.read_total, whole.read_total) for part in parts)
    monkeypatch.setenv("GRINQH_CPU_ISA", "scalar")
    assert torch.equal(torch.cat([part(x) for part in parts], dim=-1), whole(x))


def test_outputs_of_several_ranges_are_put_together() -> None:
    format = LayerFormat((2, 1, 1, 2, 2), 32)
    tensors = make_tensors(format, 200, 20)
    part = take_outputs(tensors, format, [(32, 64), (128, 192), (192, 200)])
    check_specs(part, format)
    layer, whole = GrinqhLinear(part, format), GrinqhLinear(tensors, format)
    assert layer.bias is not None
    assert whole.bias is not None
    columns = [*range(32, 64), *range(128, 200)]
    assert torch.equal(layer.dense(), whole.dense()[:, columns])
    assert torch.equal(layer.bias, whole.bias[columns])


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([(0, 0)], r"outputs 0\.\.0 are no range of the layer's 200"),
        ([(64, 201)], r"outputs 64\.\.201"),
        ([(8, 64)], "begin at 8, must begin at a multiple of the block, 32"),
        ([(0, 72)], "end at 72, must end at a multiple of the block, 32"),
        ([(192, 200), (0, 32)], "end at 200, must end at a multiple of the block, 32"),
    ],
)
def test_ranges_that_divide_a_block_are_refused(ranges: list[tuple[int, int]], message: str) -> None:
    format = LayerFormat((2, 2, 2, 2), 32)
    with pytest.raises(InputError, match=message):
        take_outputs(make_tensors(format, 200, 3), format, ranges)


# ---- along the inputs


@pytest.mark.parametrize("widths", LAYOUTS)
@pytest.mark.parametrize(("inputs", "block", "world"), [(256, 64, 2), (131, 32, 3), (129, 128, 2), (40, 64, 1)])
def test_the_parts_of_the_inputs_add_up_to_the_layer(
    widths: tuple[int, ...], inputs: int, block: int, world: int
) -> None:
    format, x = LayerFormat(widths, block), rows(3, inputs)
    stored = [inputs, inputs, inputs // 2, inputs // 3, 9, 2, 1, 0][: len(widths)]
    tensors = make_tensors(format, 35, inputs, stored)
    whole = graded_layer(tensors, format)
    y, bits, first = torch.zeros(3, 35), 0.0, 0
    kept = [0] * len(widths)
    for rank in range(world):
        part = shard_inputs(tensors, format, rank, world)
        check_specs(part, format)
        assert ("bias" in part) == (rank == 0)
        layer = graded_layer(part, format)
        end = first + layer.in_features
        y += layer(x[:, first:end])
        bits += float(layer.read_total[0]) * layer.in_features
        kept = [a + b for a, b in zip(kept, layer.stored_channels, strict=True)]
        # Each channel's weights are those of the whole layer.
        assert torch.equal(layer.dense(), whole.dense()[first:end])
        first = end
    assert first == inputs
    assert kept == stored
    assert ((y - whole(x)).abs() <= 2 * KERNEL_ERROR * (x.abs() @ whole.dense().abs())).all()
    assert bits / inputs == pytest.approx(float(whole.read_total[0]), rel=1e-6)


def test_channels_of_a_part_keep_their_order_and_their_grades() -> None:
    format, x = LayerFormat((2, 1, 1, 2, 2), 32), rows(4, 50)
    tensors = make_tensors(format, 10, 50, [50, 40, 30, 20, 10])

    def grades(tensors: packing.PackedTensors, x: Tensor) -> Tensor:
        planes = [tensors[packing.plane_name(p)] for p in range(5)]
        thresholds = torch.tensor(THRESHOLDS[:5])
        order, weight = tensors["channel_order"], tensors["channel_weight"]
        return torch.ops.grinqh.grade(x, planes, order, weight, thresholds, list(format.plane_widths))

    part = take_inputs(tensors, format, (13, 37), bias=True)
    mine = (tensors["channel_order"] >= 13) & (tensors["channel_order"] < 37)
    assert torch.equal(part["channel_order"] + 13, tensors["channel_order"][mine])
    assert torch.equal(grades(part, x[:, 13:37].contiguous()), grades(tensors, x)[:, mine])


def test_a_range_of_no_inputs_is_refused() -> None:
    format = LayerFormat((2, 2, 2, 2), 32)
    for inputs in ((3, 3), (-1, 2), (0, 6)):
        with pytest.raises(InputError, match="are no range of the layer's 5"):
            take_inputs(make_tensors(format, 3, 5), format, inputs, bias=True)


# ---- where to cut


@pytest.mark.parametrize(("size", "step"), [(1, 1), (7, 1), (96, 64), (129, 64), (4096, 128), (11008, 64)])
def test_ranges_follow_each_other_and_none_is_empty(size: int, step: int) -> None:
    for world in range(1, min(-(-size // step), 9) + 1):
        ranges = [cut("outputs", size, step, rank, world) for rank in range(world)]
        assert (ranges[0][0], ranges[-1][1]) == (0, size)
        assert all(before[1] == after[0] for before, after in pairwise(ranges))
        assert all(first < end and first % step == 0 for first, end in ranges)


@pytest.mark.parametrize("shard", [shard_outputs, shard_inputs])
def test_more_processes_than_blocks_are_refused(shard: Any) -> None:
    format = LayerFormat((2, 2, 2, 2), 64)
    tensors = make_tensors(format, 129, 129)
    what = "outputs" if shard is shard_outputs else "inputs"
    with pytest.raises(InputError, match=f"world is 4, must be at most 3: 129 {what} are cut at multiples of 64 only"):
        shard(tensors, format, 0, 4)
    for rank, world in ((3, 3), (-1, 2), (0, 0)):
        with pytest.raises(InputError, match=f"rank is {rank} and world is {world}, must be"):
            shard(tensors, format, rank, world)


# ---- models on two processes


@pytest.fixture(scope="module")
def on_two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes computed."""
    folder = tmp_path_factory.mktemp("processes")
    spawn(processes.run, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module", params=list(processes.MODELS))
def model_outputs(
    request: pytest.FixtureRequest, on_two_processes: list[dict[str, Any]]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Of a model on one process, and on each of two."""
    one = processes.outputs(processes.MODELS[request.param]())
    return one, *(found[request.param] for found in on_two_processes)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 3])
def test_two_processes_give_what_one_gives(model_outputs: Any, bits: int) -> None:
    one, first, second = model_outputs
    assert all(torch.equal(first[name], second[name]) for name in one if name != "bytes")
    assert torch.equal(first[f"thresholds at {bits}"], one[f"thresholds at {bits}"])
    assert torch.equal(first[f"tokens at {bits}"], one[f"tokens at {bits}"])
    torch.testing.assert_close(first[f"prompt at {bits}"], one[f"prompt at {bits}"], rtol=1e-4, atol=1e-5)
    # Float32 sums in another order; a channel at a threshold may change its grade.
    assert relative_error(first[f"scalar logits at {bits}"], one[f"scalar logits at {bits}"]) < 1e-3
    # The kernel's own error besides, which moves channels over thresholds.
    assert relative_error(first[f"logits at {bits}"], one[f"logits at {bits}"]) < (1e-3 if bits == 8 else 3e-2)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 3])
def test_read_bits_are_those_of_whole_layers(model_outputs: Any, bits: int) -> None:
    one, first, _ = model_outputs
    exact = {"rtol": 0, "atol": 0} if bits == 8 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(first[f"read bits at {bits}"], one[f"read bits at {bits}"], **exact)
    torch.testing.assert_close(first[f"layers at {bits}"], one[f"layers at {bits}"], **exact)
    assert torch.equal(first["stored"], one["stored"])


@pytest.mark.slow
def test_a_process_holds_a_part_of_the_planes(model_outputs: Any) -> None:
    one, first, second = model_outputs
    assert max(first["bytes"], second["bytes"]) < 0.8 * one["bytes"]
    assert first["bytes"] + second["bytes"] >= one["bytes"]


@pytest.mark.slow
def test_gradients_static_caches_and_compiled_code_give_the_same(on_two_processes: list[dict[str, Any]]) -> None:
    one = processes.other_ways(processes.llama())
    for found in on_two_processes:
        two = found["other ways"]
        assert torch.equal(two["static"], one["static"])
        assert torch.equal(two["compiled"], two["eager"])
        assert relative_error(two["eager"], one["eager"]) < 3e-2
        assert relative_error(two["gradient"], one["gradient"]) < 3e-2


REFUSALS = {
    "tp_plan": "of 2 processes is asked of the loader, must not be for a GRINQH model: .*grinqh.tensor_parallel",
    "exact before": "exact_budget is True, must be False for tensor parallelism",
    "no plan": "LlamaForCausalLM has no tensor parallel plan",
    "useless plan": "the tensor parallel plan names no packed layers that can be cut",
    "one head": "world is 2, must be at most 1: 1 heads of keys in model.* are cut at multiples of 1",
    "wide block": "world is 2, must be at most 1: 2 heads of keys in model.* are cut at multiples of 2",
    "odd fused": r"mlp.gate_up_proj is fused of \[144, 144\] outputs, which must be multiples of its block, 32",
    "twice": "the model is shared out already",
    "exact after": "exact_budget is True, must be False for a model that is shared out among processes",
    "save": "the model is shared out among processes: save it before",
    "calibrate": "the model is shared out among processes: calibrate it before",
}


@pytest.mark.slow
@pytest.mark.parametrize("what", list(REFUSALS))
def test_what_cannot_be_shared_out_is_refused(on_two_processes: list[dict[str, Any]], what: str) -> None:
    for found in on_two_processes:
        assert re.search(REFUSALS[what], found["refusals"][what])


def test_without_a_process_group_nothing_is_shared_out() -> None:
    with pytest.raises(InputError, match=r"torch\.distributed is not initialised"):
        grinqh.tensor_parallel(processes.llama())


def test_one_process_keeps_the_whole_model(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = processes.llama()
        assert grinqh.tensor_parallel(model) is model
        assert not any(layer.sharded for layer in processes.layers(model))
    finally:
        dist.destroy_process_group()


def test_attention_without_a_size_of_its_heads_is_refused() -> None:
    model = processes.llama()
    attention = model.model.layers[1].self_attn
    attention.head_dim = 48
    teams = list(parallel._teams(model, model._tp_plan))
    with pytest.raises(InputError, match=r"layers\.1\.self_attn cannot be cut between heads of 48"):
        [team.part(0, 2) for team in teams]
    del attention.head_dim
    with pytest.raises(InputError, match=r"layers\.1\.self_attn \(LlamaAttention\) has no head_dim"):
        list(parallel._teams(model, model._tp_plan))
