"""Fused decoder layers on the GPU: close to transformers' own forward, in eager mode, in a graph and compiled."""

from __future__ import annotations

import pytest
import torch
from tiny_models import llama3, qwen3
from torch import Tensor, nn

import grinqh

TEXT = torch.arange(400).reshape(1, -1) * 37 % 190 + 1


@pytest.fixture(scope="module", params=[llama3, qwen3], ids=["llama", "qwen3"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    model = request.param().to("cuda", torch.float16)
    grinqh.quantize_model(model, grinqh.GrinqhConfig(fuse=True), progress=False)
    grinqh.calibrate(model, TEXT, progress=False)
    return model


def close(got: Tensor, wanted: Tensor) -> bool:
    return float((got - wanted).float().norm() / wanted.float().norm()) < 1e-2


@pytest.mark.parametrize("tokens", [1, 5, 64])
@pytest.mark.parametrize("bits", [8.0, 3.0])
@torch.no_grad()
def test_logits_are_those_of_the_unfused_model(model: nn.Module, tokens: int, bits: float) -> None:
    grinqh.set_bits(model, bits)
    ids = TEXT[:, :tokens].cuda()
    grinqh.fuse_decoder(model, enabled=False)
    wanted = model(ids, use_cache=False).logits
    grinqh.fuse_decoder(model)
    assert close(model(ids, use_cache=False).logits, wanted)


@torch.no_grad()
def test_one_captured_graph_serves_every_setting_of_the_dial(model: nn.Module) -> None:
    grinqh.fuse_decoder(model)
    ids = TEXT[:, :1].cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        model(ids, use_cache=False)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = model(ids, use_cache=False).logits
    outputs = []
    for bits in (8.0, 2.0):
        grinqh.set_bits(model, bits)
        graph.replay()
        assert close(captured, model(ids, use_cache=False).logits)
        outputs.append(captured.clone())
    assert not torch.equal(*outputs)


@pytest.mark.filterwarnings("ignore")  # of torch, in its own compiler
@torch.no_grad()
def test_fused_layers_compile_to_one_graph(model: nn.Module) -> None:
    grinqh.fuse_decoder(model)
    ids = TEXT[:, :1].cuda()
    compiled = torch.compile(model, fullgraph=True)
    assert close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
