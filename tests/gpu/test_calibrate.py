"""Calibration of a model on the GPU."""

import copy

import pytest
import torch
from test_compensation import correlated, output_error, packed, with_tensors
from tiny_models import logits, tiny_model, token_ids

import grinqh
from grinqh import GrinqhConfig, packing
from grinqh.compensation import Task, compensated


@pytest.mark.parametrize("block", [32, 64, 128])
def test_rounding_anew_gains_on_the_gpu_what_it_gains_on_the_cpu(block: int) -> None:
    layer, stored = packed(130, 96, block=block), [96, 96, 20, 5]
    exact, seen, unseen = layer.dense(), correlated(400, 96)[:300], correlated(400, 96)[300:]
    moment = seen.T @ seen / len(seen)
    on_cpu = with_tensors(layer, *compensated([Task(layer, moment, stored)]))
    cut = with_tensors(layer, packing.keep_channels(layer.tensors, stored))
    (tensors,) = compensated([Task(layer.to("cuda"), moment.cuda(), stored)])
    on_gpu = with_tensors(on_cpu, {name: tensor.cpu() for name, tensor in tensors.items()})
    assert on_gpu.stored_channels == stored
    assert output_error(on_gpu, exact, unseen) < 0.7 * output_error(cut, exact, unseen)
    assert output_error(on_gpu, exact, unseen) == pytest.approx(output_error(on_cpu, exact, unseen), rel=0.05)


def test_heads_rotated_on_the_gpu_leave_the_function_as_it_was() -> None:
    on_cpu, ids = tiny_model(initializer_range=0.15), token_ids(2, 9)
    on_gpu, exact = copy.deepcopy(on_cpu).to("cuda"), logits(on_cpu, ids)
    rotated = grinqh.rotate_heads(on_gpu, token_ids())
    assert rotated == grinqh.rotate_heads(on_cpu, token_ids())
    assert len(rotated) == 2
    assert float((logits(on_gpu, ids.cuda()).cpu() - exact).norm() / exact.norm()) < 1e-4


def test_a_model_calibrated_on_the_gpu_measures_the_sensitivities_that_the_cpu_does() -> None:
    reports = []
    for device in ("cpu", "cuda"):
        model = grinqh.quantize_model(tiny_model().to(device), GrinqhConfig(stored_bits=4.0))
        reports.append(grinqh.calibrate(model, token_ids(8, 64)))
        assert grinqh.stored_bits(model) <= 4
    # The labels are drawn by generators of different devices, so these are two samples of the same numbers.
    for name, sensitivity in reports[0].sensitivity.items():
        assert reports[1].sensitivity[name] == pytest.approx(sensitivity, rel=0.3), name
    assert torch.isfinite(torch.tensor(list(reports[1].sensitivity.values()))).all()
