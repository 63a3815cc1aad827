"""Fused sibling layers: the same outputs as apart, no stale ones, and everything that a packed model can do."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import calibrated, logits, qwen3, tiny_model, token_ids
from torch import nn

import grinqh
from grinqh import GrinqhConfig
from grinqh.fusion import FusedPart

transformers = pytest.importorskip("transformers")

KINDS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
NAMES = {f"model.layers.{i}.{kind}" for i in (0, 1) for kind in KINDS}


def qwen2(**settings: Any) -> Any:
    """Biases in q, k and v alone; random ones, for those of a new model are 0."""
    model = tiny_model(transformers.Qwen2Config, **settings)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


GRADED: Any = {"rtol": 1e-3, "atol": 1e-4}  # of the kernel that reads by grades
MODELS = [tiny_model, qwen2, qwen3]


def fused(make: Any = tiny_model, **settings: Any) -> Any:
    return calibrated(make(), GrinqhConfig(fuse=True, **settings))


def dense_twin(model: Any, make: Any = tiny_model) -> Any:
    """The model as it was, with the weights that the packed layers hold."""
    twin, layers = make(), grinqh.packed_layers(model)
    for name, linear in twin.named_modules():
        if not isinstance(linear, nn.Linear) or name == "lm_head":
            continue
        parent = name.rpartition(".")[0]
        module = model.get_submodule(name)
        if isinstance(module, FusedPart):
            rows = module.outputs.sizes
            weight = layers[f"{parent}.{module.outputs.name}"].dense().T.split(rows)[module.index]
        else:
            weight = layers[name].dense().T
        linear.weight.data.copy_(weight)
    return twin


@pytest.fixture(scope="module")
def model() -> Any:
    return fused()


def test_siblings_become_one_layer_and_its_weights_count_once(model: Any) -> None:
    layers = grinqh.packed_layers(model)
    assert set(layers) == NAMES
    assert sum(layer.weights for layer in layers.values()) == 2 * (64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 96)
    assert isinstance(model.model.layers[0].self_attn.k_proj, FusedPart)
    assert not [name for name in model.state_dict() if ".k_proj" in name or ".up_proj" in name]


@pytest.mark.parametrize("make", MODELS)
def test_outputs_are_those_of_the_dense_weights(make: Any) -> None:
    model = fused(make)
    grinqh.set_bits(model, 8)
    twin = dense_twin(model, make)
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-4, atol=1e-5)
    with grinqh.graded(model):
        torch.testing.assert_close(logits(model), logits(twin), **GRADED)


@pytest.mark.parametrize("make", MODELS)
def test_decoding_with_a_cache_generates_the_tokens_of_the_dense_model(make: Any) -> None:
    model = fused(make)
    grinqh.set_bits(model, 8)
    options = {"max_new_tokens": 12, "do_sample": False}
    prompt = token_ids(2, 9)
    assert torch.equal(model.generate(prompt, **options), dense_twin(model, make).generate(prompt, **options))


def test_an_input_is_multiplied_once(model: Any) -> None:
    calls: list[str] = []
    handles = [
        layer.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, layer in grinqh.packed_layers(model).items()
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    assert sorted(calls) == sorted(NAMES)


def test_parts_that_are_called_alone_or_in_any_order_are_never_stale(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    parts = {name: getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj")}
    grinqh.set_bits(model, 8)
    twin = dense_twin(model).model.layers[0].self_attn
    one, other = torch.randn(2, 3, 64)
    with torch.no_grad():
        # Outside of the parent's forward, and as if in it.
        for running in (False, True):
            if running:
                attention.q_proj.outputs.begin()
            for name, x in [
                ("v_proj", one), ("q_proj", one), ("q_proj", one), ("k_proj", other), ("k_proj", one),
                ("v_proj", other), ("v_proj", one.clone()), ("q_proj", other), ("k_proj", other), ("v_proj", other),
            ]:  # fmt: skip
                torch.testing.assert_close(parts[name](x), getattr(twin, name)(x), **GRADED)
        assert attention.q_proj.outputs.kept is None  # all have taken theirs
        attention.q_proj.outputs.end()


def test_outside_of_the_parent_the_dial_and_changed_inputs_hold_at_once(model: Any) -> None:
    attention, x = model.model.layers[0].self_attn, torch.randn(1, 64)
    with torch.no_grad():
        grinqh.set_bits(model, 8)
        attention.q_proj(x)
        exact = attention.k_proj(x)
        attention.q_proj(x)
        grinqh.set_bits(model, 2)
        assert not torch.equal(attention.k_proj(x), exact)
        grinqh.set_bits(model, 8)
        attention.q_proj(x)
        x.mul_(2)
        torch.testing.assert_close(attention.k_proj(x), 2 * exact)


def test_nothing_is_kept_after_a_forward_that_ends_or_fails(model: Any) -> None:
    block = model.model.layers[0].mlp
    x = torch.randn(1, 64)
    kept = weakref.ref(x)
    with torch.no_grad():
        block(x)
        assert not block.up_proj.outputs.running
        handle = block.up_proj.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            block(x)
        handle.remove()
    assert block.up_proj.outputs.kept is None
    del x
    gc.collect()
    assert kept() is None


@pytest.mark.filterwarnings("ignore")  # of torch, in its own compiler
@pytest.mark.parametrize("make", [tiny_model, qwen3])
def test_one_full_graph_serves_every_setting_of_the_dial(make: Any) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    model = fused(make)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    ids = token_ids(1, 9)
    with torch.no_grad(), grinqh.graded(model):
        for bits in (8.0, 3.0, 2.0):
            grinqh.set_bits(model, bits)
            got = compiled(ids, use_cache=False).logits
            torch.testing.assert_close(got, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
    calls = [node for graph in counter.graphs for node in graph.graph.nodes if "grinqh" in str(node.target)]
    assert len(calls) == len(NAMES)
    assert model.model.layers[0].mlp.up_proj.outputs.kept is None


def test_a_copy_is_independent(model: Any) -> None:
    grinqh.set_bits(model, 8)
    exact = logits(model)
    other = copy.deepcopy(model)
    assert other.model.layers[0].mlp.up_proj.outputs.parent is other.model.layers[0].mlp
    for layer in grinqh.packed_layers(other).values():
        layer.row_scale.data.zero_()
    assert not torch.equal(logits(other), exact)
    assert torch.equal(logits(model), exact)


@pytest.mark.parametrize("make", MODELS)
def test_save_and_load_are_bit_equal(make: Any, tmp_path: Path) -> None:
    model = fused(make)
    grinqh.set_bits(model, 3)
    model.save_pretrained(tmp_path)
    loaded = grinqh.from_pretrained(tmp_path)
    assert set(grinqh.packed_layers(loaded)) == NAMES
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(logits(loaded), logits(model))
    with grinqh.graded(model), grinqh.graded(loaded):
        assert torch.equal(logits(loaded), logits(model))
    smaller = grinqh.from_pretrained(tmp_path, stored_bits=4)
    assert grinqh.stored_bits(smaller) == 4


@pytest.mark.parametrize("make", MODELS)
def test_a_model_is_fused_while_it_is_loaded(make: Any, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    config = GrinqhConfig(fuse=True, convert_lm_head=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    converted = grinqh.quantize_model(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path), copy.deepcopy(config), progress=False
    )
    assert set(grinqh.packed_layers(loaded)) == NAMES | {"lm_head"}
    assert loaded.state_dict().keys() == converted.state_dict().keys()
    assert torch.equal(logits(loaded), logits(converted))


def test_a_bad_weight_is_named_while_a_model_is_loaded(tmp_path: Path) -> None:
    model = tiny_model()
    model.model.layers[1].self_attn.v_proj.weight.data[3, 4] = torch.nan
    model.save_pretrained(tmp_path)
    config = GrinqhConfig(fuse=True)
    with pytest.raises(grinqh.InputError, match=r"layers\.1\.self_attn\.v_proj\.weight holds 1 value"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    with pytest.raises(grinqh.InputError, match=r"layers\.1\.self_attn\.v_proj\.weight holds 1 value"):
        grinqh.quantize_model(model, config, progress=False)
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)  # unchanged


def test_the_dial_reads_what_it_is_asked_for() -> None:
    model = fused()
    grinqh.set_bits(model, 3)
    grinqh.count_reads(model)
    with torch.no_grad(), grinqh.graded(model):
        model(token_ids())
    stats = grinqh.read_stats(model)
    assert set(stats.layers) == NAMES
    assert abs(stats.read_bits - 3) < 0.1


def test_gradients_flow_through_all_parts(model: Any) -> None:
    block, twin = model.model.layers[0].mlp, dense_twin(model).model.layers[0].mlp
    grinqh.set_bits(model, 8)
    x = torch.randn(2, 64, requires_grad=True)
    (got,) = torch.autograd.grad(block(x).square().sum(), x)
    (wanted,) = torch.autograd.grad(twin(x).square().sum(), x)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "apart"),
    [
        ({"modules_to_not_convert": ["layers.0.self_attn.k_proj"]}, "self_attn.q_proj"),
        ({"overrides": {"layers.0.mlp.up_proj": {"stored_bits": 4}}}, "mlp.gate_proj"),
    ],
)
def test_groups_of_which_a_layer_is_named_by_the_config_stay_apart(settings: Any, apart: str) -> None:
    names = set(grinqh.packed_layers(grinqh.quantize_model(tiny_model(), GrinqhConfig(fuse=True, **settings))))
    assert f"model.layers.0.{apart}" in names
    assert {"model.layers.1.self_attn.qkv_proj", "model.layers.1.mlp.gate_up_proj"} < names


class Mixed(nn.Module):
    """Siblings by name that cannot be one layer."""

    def __init__(self, bias: bool, in_features: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(8, 12)
        self.up_proj = nn.Linear(in_features, 12, bias=bias)


@pytest.mark.parametrize(("bias", "in_features"), [(False, 8), (True, 16)])
def test_unlike_siblings_stay_apart(bias: bool, in_features: int) -> None:
    model = grinqh.quantize_model(Mixed(bias, in_features), GrinqhConfig(fuse=True), progress=False)
    assert set(grinqh.packed_layers(model)) == {"gate_proj", "up_proj"}


def test_siblings_of_the_model_itself_and_of_a_shared_parent_are_fused() -> None:
    model = grinqh.quantize_model(Mixed(True, 8), GrinqhConfig(fuse=True), progress=False)
    assert set(grinqh.packed_layers(model)) == {"gate_up_proj"}
    block = Mixed(True, 8)
    shared = grinqh.quantize_model(nn.Sequential(block, block), GrinqhConfig(fuse=True), progress=False)
    assert set(grinqh.packed_layers(shared)) == {"0.gate_up_proj"}
    assert shared[1].gate_up_proj is shared[0].gate_up_proj
