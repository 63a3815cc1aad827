"""Fused layers on the GPU: outputs, and one captured graph for every setting of the dial."""

from __future__ import annotations

import pytest
import torch
from tiny_models import qwen3
from torch import nn

import grinqh

TEXT = torch.arange(400).reshape(1, -1) * 37 % 190


@pytest.fixture(scope="module")
def model() -> nn.Module:
    model = qwen3().to("cuda", torch.float16)
    grinqh.quantize_model(model, grinqh.GrinqhConfig(fuse=True), progress=False)
    grinqh.calibrate(model, TEXT, progress=False)
    return model


def test_fused_layers_are_quantized_in_place_on_the_gpu(model: nn.Module) -> None:
    layers = grinqh.packed_layers(model)
    assert len(layers) == 2 * 4
    assert all(layer.tiled for layer in layers.values())


def test_fused_outputs_on_the_gpu_are_those_of_the_dense_weights(model: nn.Module) -> None:
    grinqh.set_bits(model, 8)
    ids = TEXT[:, :64].cuda()
    with torch.no_grad():
        dense = model(ids).logits  # many rows: multiplied with the dense weights
        with grinqh.graded(model):
            graded = model(ids).logits
    assert float((graded - dense).float().norm() / dense.float().norm()) < 1e-2


def test_one_captured_graph_serves_every_setting_of_the_dial(model: nn.Module) -> None:
    ids = TEXT[:, :4].cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        model(ids, use_cache=False)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = model(ids, use_cache=False).logits
    outputs = []
    for bits in (8.0, 3.0, 2.0):
        grinqh.set_bits(model, bits)
        graph.replay()
        with torch.no_grad():
            wanted = model(ids, use_cache=False).logits
        assert float((captured - wanted).float().norm() / wanted.float().norm()) < 1e-2
        outputs.append(captured.clone())
    assert not torch.equal(outputs[0], outputs[2])
