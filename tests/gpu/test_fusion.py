"""Fused layers on the GPU: outputs, and one captured graph for every setting of the dial."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import grinqh

transformers = pytest.importorskip("transformers")

TEXT = torch.arange(400).reshape(1, -1) * 37 % 190


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=200,
        hidden_size=96,
        intermediate_size=200,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).to("cuda", torch.float16).eval()
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
