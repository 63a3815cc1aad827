"""Sections: outputs of one layer that have thresholds of their own, as those of layers that were put together."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from layers import EQUAL, INF, OPS, Layer, make_layer
from tiny_models import calibrated, logits, tiny_model, token_ids
from torch import Tensor

import grinqh
from grinqh import GrinqhConfig, GrinqhLinear, InputError, LayerFormat, calibration, packing

SECTIONS = [[300], [150, 150], [200, 1, 99], [1, 1, 1, 297]]
ROWS, N, K = 3, 300, 130
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def sectioned(sections: list[int]) -> tuple[Layer, list[Layer], Tensor]:
    """A layer with other thresholds for each section, the layers that are graded as one section each, and rows of x."""
    layer = make_layer(N, K, EQUAL, stored=(K, 100, 100, 20))
    thresholds = torch.stack([layer.thresholds * 2.0**s for s in range(len(sections))])
    generator = torch.Generator().manual_seed(5)
    return (
        layer.replace(thresholds=thresholds),
        [layer.replace(thresholds=row) for row in thresholds],
        torch.randn(ROWS, K, generator=generator),
    )


def joined(parts: list[Tensor], sections: list[int]) -> Tensor:
    """Of each section the outputs, from results for all outputs."""
    return torch.cat([part.split(sections, -1)[s] for s, part in enumerate(parts)], -1)


@pytest.mark.parametrize("sections", SECTIONS, ids=str)
def test_a_section_has_the_outputs_of_a_layer_with_its_thresholds(sections: list[int]) -> None:
    layer, alone, x = sectioned(sections)
    y, read_bits = OPS.gemv_read_bits(x, *layer.arguments, sections)
    references = [each.reference(x) for each in alone]
    wanted, magnitude = (joined([r[i] for r in references], sections) for i in (0, 1))
    assert bool(((y - wanted).abs() <= 1e-4 * magnitude + 1e-30).all())
    bits = torch.stack([OPS.gemv_read_bits(x, *each.arguments)[1] for each in alone])
    torch.testing.assert_close(read_bits, (bits * torch.tensor(sections)[:, None]).sum(0) / N)
    for result in (OPS.gemv(x, *layer.arguments, sections), OPS.linear(x, *layer.arguments, ROWS, sections)):
        assert torch.equal(result, y)
    out = torch.full((ROWS, N), torch.nan)
    OPS.gemv.out(x, *layer.arguments, sections, out=out)
    assert torch.equal(out, y)


@pytest.mark.parametrize("sections", SECTIONS, ids=str)
def test_grades_come_for_each_section(sections: list[int]) -> None:
    layer, _, x = sectioned(sections)

    def grades(thresholds: Tensor, *rest: Any) -> Tensor:
        found: Tensor = OPS.grade(
            x, layer.planes, layer.channel_order, layer.channel_weight, thresholds, layer.widths, *rest
        )
        return found

    assert torch.equal(grades(layer.thresholds, None, sections), torch.stack([grades(row) for row in layer.thresholds]))
    within = grades(layer.thresholds, torch.tensor([2.0]), sections)
    bits = torch.tensor([0, 2, 4, 6, 8])[within.long()].double().mean(-1).T @ torch.tensor(sections).double() / N
    assert bool((bits <= 2).all())
    assert bool((bits > 2 - 2 / K).all())


def test_more_rows_than_are_graded_know_no_sections() -> None:
    layer, (whole, _), x = sectioned([150, 150])
    y = OPS.linear(x, *layer.arguments, ROWS - 1, [150, 150])
    assert torch.equal(y, OPS.linear(x, *whole.arguments, ROWS - 1))


@pytest.mark.parametrize("op", ["gemv", "linear", "gemv_read_bits"])
def test_backward_is_that_of_the_weights_that_each_section_read(op: str) -> None:
    sections = [200, 1, 99]
    layer, alone, x = sectioned(sections)
    layer = layer.replace(bias=torch.randn(N, requires_grad=True))
    assert layer.bias is not None
    x.requires_grad_()
    result = getattr(OPS, op)(x, *layer.arguments, *((ROWS,) if op == "linear" else ()), sections)
    upstream = torch.randn(ROWS, N)
    (result[0] if op == "gemv_read_bits" else result).backward(upstream)
    wanted: Any = 0
    for s, each in enumerate(alone):
        grades, part = each.grades(x.detach()), upstream.split(sections, -1)[s]
        for grade in range(1, 5):
            dense = each.dense(grade).split(sections, -1)[s]
            wanted = wanted + torch.where(grades == grade, part @ dense.T, 0)
    torch.testing.assert_close(x.grad, wanted)
    torch.testing.assert_close(layer.bias.grad, upstream.sum(0))


@pytest.mark.parametrize("op", ["gemv", "gemv_read_bits", "linear", "grade"])
def test_opcheck(op: str) -> None:
    sections = [200, 100]
    layer, _, x = sectioned(sections)
    rest: tuple[Any, ...] = (*layer.arguments, *((2,) if op == "linear" else ()), sections)
    if op == "grade":
        rest = (layer.planes, layer.channel_order, layer.channel_weight, layer.thresholds, layer.widths, None, sections)
    torch.library.opcheck(getattr(OPS, op).default, (x, *rest), test_utils=OPCHECKS)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ([100, 100], r"sections add up to 200: they must to n, 300"),
        ([0], r"sections\[0\] is 0: allowed are 1 to 300"),
        ([300, 1], r"sections\[1\] is 1: allowed are 1 to 0, the outputs that are left of 300"),
        ([0, 300], r"sections\[0\] is 0: allowed are 1 to 300"),
        ([-1, 301], r"sections\[0\] is -1: allowed are 1 to 300"),
        ([1, 1, 1, 1, 296], r"sections has 5 entries: allowed are at most 4"),
        ([100, 100, 100], r"thresholds has shape \[2, 4\]: it must be \[3, 4\]"),
        ([], r"thresholds has shape \[2, 4\]: it must be \[4\]"),
    ],
    ids=str,
)
def test_sections_that_do_not_fit_are_named(sections: list[int], message: str) -> None:
    layer, _, x = sectioned([150, 150])
    for op, extra in ((OPS.gemv, ()), (OPS.linear, (0,))):
        with pytest.raises(RuntimeError, match=message):
            op(x, *layer.arguments, *extra, sections)


def test_thresholds_of_any_section_are_checked() -> None:
    layer, _, x = sectioned([150, 150])
    layer.thresholds[1] = layer.thresholds[1].flip(0)
    with pytest.raises(RuntimeError, match=r"thresholds\[5\] is .* thresholds never fall"):
        OPS.gemv(x, *layer.arguments, [150, 150])


def test_the_core_without_torch_has_sections_too() -> None:
    sections = [200, 1, 99]
    layer, _, x = sectioned(sections)
    core = pytest.importorskip("grinqh._core")
    packed: list[Any] = [[plane.numpy() for plane in layer.planes]]
    packed += [t.numpy() for t in (layer.block_scale, layer.row_scale, layer.gain, layer.channel_order)]
    grading = [layer.channel_weight.numpy(), layer.thresholds.numpy()]
    y, bits = core.gemv_read_bits(x.numpy(), *packed, *grading, layer.widths, layer.block, sections=sections)
    wanted, wanted_bits = OPS.gemv_read_bits(x, *layer.arguments, sections)
    np.testing.assert_array_equal(np.asarray(y), wanted.numpy())
    np.testing.assert_array_equal(np.asarray(bits), wanted_bits.numpy())
    grades = core.grade(x.numpy(), packed[0], packed[4], *grading, layer.widths, sections=sections)
    assert np.asarray(grades).shape == (3, ROWS, K)
    for wrong, message in (
        ([200, 1, 98], "add up to 299: they must to n, 300"),
        ([0], r"\[0\] is 0"),
        ([60] * 5, "has 5"),
    ):
        with pytest.raises(ValueError, match=rf"sections ?{message}"):
            core.gemv(x.numpy(), *packed, *grading, layer.widths, layer.block, sections=wrong)


# ---- layers and models


def make_linear(sections: list[int]) -> GrinqhLinear:
    format = LayerFormat(EQUAL, 64)
    return GrinqhLinear(packing.pack_weight(torch.randn(N, K), format), format, sections=sections)


def test_a_layer_takes_thresholds_for_each_section_or_the_same_for_all() -> None:
    layer = make_linear([100, 200])
    assert torch.equal(layer.thresholds, torch.zeros(2, 4))
    layer.set_thresholds(torch.tensor([[0.1, 0.2, 0.3, 0.4], [1, 2, 3, INF]]))
    assert layer.thresholds[1, 2] == 3
    layer.set_thresholds([1.0, 2.0, 3.0, 4.0])
    assert torch.equal(layer.thresholds, torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 2))
    with pytest.raises(InputError, match="must never fall"):
        layer.set_thresholds(torch.tensor([[0.1, 0.2, 0.3, 0.4], [1, 2, 3, 2]]))
    with pytest.raises(InputError, match=r"shape \[3, 4\], must have \[2, 4\]"):
        layer.set_thresholds(torch.ones(3, 4))


def test_a_fused_layer_grades_its_parts_as_the_layers_apart() -> None:
    model = tiny_model()
    with torch.no_grad():  # parts that matter unlike each other, and whose weights are of unlike size
        for block in model.model.layers:
            block.self_attn.v_proj.weight *= 3
            block.mlp.up_proj.weight *= 0.2
    apart, together = (calibrated(copy.deepcopy(model), GrinqhConfig(fuse=fuse)) for fuse in (False, True))
    layers = grinqh.packed_layers(apart)
    for name, layer in grinqh.packed_layers(together).items():
        parts = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}.get(
            name.rpartition(".")[2]
        )
        if parts is None:
            assert layer.sections == []
            continue
        siblings = [layers[f"{name.rpartition('.')[0]}.{part}"] for part in parts]
        assert layer.sections == [part.out_features for part in siblings]
        units = torch.stack([part.unit_thresholds for part in siblings])
        assert units.max() / units.min() > 1.5
        # As proportions: the model as a whole has its own scale of the dial.
        ratios = layer.unit_thresholds / units
        torch.testing.assert_close(ratios / ratios.mean(), torch.ones_like(ratios), rtol=0.1, atol=0)


def test_the_dial_of_sections_promises_what_they_read() -> None:
    model = calibrated(tiny_model(), GrinqhConfig(fuse=True))
    for bits in (2.0, 3.0, 5.0):
        grinqh.set_bits(model, bits)
        grinqh.count_reads(model)
        grinqh.reset_read_stats(model)
        with grinqh.graded(model):
            logits(model, token_ids())
        assert grinqh.dial_drift(model).drift == pytest.approx(0, abs=0.02)


def test_a_section_s_part_of_the_error_follows_from_its_scales() -> None:
    weight, format, sections = torch.randn(96, 64), LayerFormat(EQUAL, 64), [40, 56]  # the second begins within a block
    weight[40:] *= 3
    layer = GrinqhLinear(packing.pack_weight(weight, format), format, sections=sections)
    error = (layer.dense() - weight.T).square()
    measured = [float(part.mean() / error.mean()) for part in error.split(sections, 1)]
    assert measured[1] > 5 * measured[0]
    assert calibration._section_errors(layer) == pytest.approx(measured, rel=0.1)


def test_a_budget_holds_for_a_fused_model() -> None:
    model = calibrated(tiny_model(), GrinqhConfig(fuse=True))
    grinqh.set_bits(model, 2.5, exact_budget=True)
    with grinqh.graded(model):
        grinqh.count_reads(model, keep_tokens=8)
        logits(model, token_ids(1, 8))
        for layer in grinqh.packed_layers(model).values():
            assert layer.budget is not None
            assert layer.read_log is not None
            assert bool((layer.read_log <= layer.budget + 1e-6).all())


def test_a_section_of_zeros_does_no_harm() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.zero_()
    model = calibrated(model, GrinqhConfig(fuse=True))
    grinqh.set_bits(model, 3)
    assert torch.isfinite(logits(model, token_ids())).all()
