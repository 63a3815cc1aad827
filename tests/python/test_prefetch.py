"""Layers that fetch the beginning of the next one: a hint, without a trace in results, copies or files."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor, nn

import grinqh

IDS = torch.arange(12).reshape(2, 6) * 37 % 190


@pytest.fixture
def model() -> nn.Module:
    return grinqh.quantize_model(tiny_model(), progress=False)


def logits(model: nn.Module) -> Tensor:
    return model(IDS, use_cache=False).logits


def test_results_are_bit_equal_with_and_without_links(model: nn.Module) -> None:
    wanted = logits(model)
    grinqh.prefetch_next(model)
    assert torch.equal(logits(model), wanted)
    grinqh.prefetch_next(model, enabled=False)
    assert torch.equal(logits(model), wanted)


def test_every_layer_names_the_one_after_it_and_the_last_the_first(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    grinqh.prefetch_next(model)
    layers = list(grinqh.packed_layers(model).values())
    named = []
    real = torch.ops.grinqh.linear_prefetch

    def record(*arguments: object) -> Tensor:
        named.append(arguments[-1])
        return real(*arguments)

    monkeypatch.setattr(torch.ops.grinqh, "linear_prefetch", record)
    logits(model)
    assert [first[0] for first in named] == [layer.plane_0 for layer in layers[1:] + layers[:1]]
    assert all([t.dim() for t in first] == [2, 2, 1, 1] for first in named)


def test_links_add_no_submodules_nor_state(model: nn.Module) -> None:
    names, modules = set(model.state_dict()), len(list(model.modules()))
    grinqh.prefetch_next(model)
    assert set(model.state_dict()) == names and len(list(model.modules())) == modules


def test_a_copy_of_a_layer_is_linked_to_nothing(model: nn.Module) -> None:
    grinqh.prefetch_next(model)
    layer = next(iter(grinqh.packed_layers(model).values()))
    assert layer._next is not None
    assert copy.deepcopy(layer)._next is None


def test_a_linked_model_compiles_to_one_graph(model: nn.Module) -> None:
    grinqh.prefetch_next(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(IDS, use_cache=False).logits, logits(model))


def test_gradients_flow_through_linked_layers(model: nn.Module) -> None:
    embedded = model.get_input_embeddings()(IDS).detach()
    gradients = []
    for enabled in (False, True):
        grinqh.prefetch_next(model, enabled)
        x = embedded.clone().requires_grad_()
        model(inputs_embeds=x, use_cache=False).logits.square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_a_model_without_packed_layers_is_an_error() -> None:
    with pytest.raises(grinqh.InputError, match="no packed layers"):
        grinqh.prefetch_next(nn.Linear(2, 2))
