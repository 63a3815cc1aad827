"""Each model family is converted, saved, loaded with plain transformers, and generates as its dense weights do."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, MIXTURES, calibrated, logits, token_ids
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import grinqh
from grinqh import GrinqhConfig

Family = Callable[..., Any]

# (family, whether the head is converted): each as it is, and one whose tied head is converted.
CASES = [pytest.param(make, False, id=name) for name, make in FAMILIES.items()]
CASES.append(pytest.param(FAMILIES["SmolLM"], True, id="SmolLM with its head"))
each_family = pytest.mark.parametrize(("make", "head"), CASES)


def converted(make: Family, head: bool) -> Any:
    """Calibrated; its weights are large enough for varied tokens, which stand 10 times clear of the kernels' error."""
    return calibrated(make(initializer_range=0.15), GrinqhConfig(convert_lm_head=head))


def generate(model: Any, ids: Tensor) -> Tensor:
    tokens: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    return tokens[:, ids.shape[1] :]


def with_dense_weights(model: Any) -> Any:
    """The model with ordinary linear layers, of the weights that the packed ones stand for."""
    dense = copy.deepcopy(model)
    for name, layer in grinqh.packed_layers(model).items():
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        linear.weight = nn.Parameter(layer.dense().T.contiguous())
        linear.register_parameter("bias", layer._parameters["bias"])
        dense.set_submodule(name, linear)
    return dense


def assert_same_state(ours: Any, theirs: Any) -> None:
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0, equal_nan=True)


@each_family
def test_a_model_is_loaded_bit_for_bit_by_plain_transformers_and_generates(
    make: Family, head: bool, tmp_path: Path
) -> None:
    model = converted(make, head)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same_state(loaded, model)
    assert torch.equal(generate(loaded, token_ids(2, 12)), generate(model, token_ids(2, 12)))


@each_family
def test_at_full_bits_the_tokens_are_those_of_the_dequantized_weights(make: Family, head: bool) -> None:
    model = converted(make, head)
    grinqh.set_bits(model, 8)
    dense, ids = with_dense_weights(model), token_ids(2, 12)
    assert torch.equal(generate(model, ids), generate(dense, ids))
    with grinqh.graded(model):  # the prompt by the kernels of decoding, whose error is up to 1e-4 in each layer
        error = logits(model, ids) - logits(dense, ids)
    assert error.abs().max() < 2e-3 * logits(dense, ids).std()


@each_family
def test_a_model_converted_while_loading_is_the_same(make: Family, head: bool, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=GrinqhConfig(convert_lm_head=head))
    expected = grinqh.quantize_model(make(), GrinqhConfig(convert_lm_head=head), progress=False)
    assert_same_state(loaded, expected)


def test_the_features_that_set_the_families_apart_are_there() -> None:
    models = {name: make() for name, make in FAMILIES.items()}
    assert models["Llama 3"].model.rotary_emb.rope_type == "llama3"
    assert models["Qwen3"].model.layers[0].self_attn.q_norm.weight.shape == (16,)
    assert models["Qwen2.5"].model.layers[0].self_attn.k_proj.bias.abs().min() > 0
    assert models["Mistral"].config.sliding_window < 12  # the shortest prompt above
    assert models["SmolLM"].lm_head.weight is models["SmolLM"].model.embed_tokens.weight


def test_the_readme_lists_the_families_that_are_tested() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    table = readme.partition("<!-- families -->")[2].partition("<!-- /families -->")[0]
    listed = re.findall(r"^\| (\S.*?) +\| `(\w+)`", table, flags=re.MULTILINE)
    assert listed == [(name, type(make()).__name__) for name, make in (FAMILIES | MIXTURES).items()]
