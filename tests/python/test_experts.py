"""Mixtures of experts: refused by name, unless the config says that the experts stay at full precision."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_families import assert_same_state, generate
from tiny_models import MIXTURES, calibrated, token_ids
from tiny_source import TOKENS, make_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM

import grinqh
from grinqh import GrinqhConfig, GrinqhLinear, InputError
from grinqh.convert import convert

Family = Callable[..., Any]

GATE_UP, DOWN = (f"model.layers.*.mlp.experts.{name}_proj" for name in ("gate_up", "down"))
ROUTER = "mlp.gate"
each_mixture = pytest.mark.parametrize("make", MIXTURES.values(), ids=MIXTURES.keys())


def refused() -> Any:
    share, patterns = r"\d\d% of its parameters", re.escape(f"{sorted([GATE_UP, DOWN])}")
    stacks = re.escape(f": {GATE_UP} (2 of shape [4, 64, 64]); {DOWN} (2 of shape [4, 64, 32]), ")
    return pytest.raises(InputError, match=rf"{stacks}{share}\. .* modules_to_not_convert \(--exclude\): {patterns}$")


def attention_names() -> set[str]:
    return {f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qkvo"}


@each_mixture
def test_experts_are_refused_by_name_number_and_shape_and_nothing_is_converted(make: Family) -> None:
    model = make()
    with refused():
        grinqh.quantize_model(model)
    assert not any(isinstance(module, GrinqhLinear) for module in model.modules())


@each_mixture
def test_experts_are_refused_while_loading(make: Family, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    with refused():
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=GrinqhConfig())


@each_mixture
@pytest.mark.parametrize("patterns", [[GATE_UP, DOWN], ["experts"], ["mlp.*"]])
def test_experts_that_are_named_stay_and_the_rest_is_converted(make: Family, patterns: list[str]) -> None:
    model = make()
    before = model.model.layers[1].mlp.experts.down_proj
    grinqh.quantize_model(model, GrinqhConfig(modules_to_not_convert=[*patterns, ROUTER]))
    assert set(grinqh.packed_layers(model)) == attention_names()
    assert model.model.layers[1].mlp.experts.down_proj is before


@each_mixture
def test_naming_some_of_the_experts_is_not_enough(make: Family) -> None:
    with pytest.raises(InputError, match=re.escape(f": {DOWN} (1 of shape [4, 64, 32]), ")):
        grinqh.quantize_model(make(), GrinqhConfig(modules_to_not_convert=["layers.0.mlp.experts", GATE_UP]))


@each_mixture
def test_a_router_that_is_not_named_is_warned_of(make: Family) -> None:
    config = GrinqhConfig(modules_to_not_convert=["experts"])
    with pytest.warns(UserWarning, match=r": model\.layers\.\*\.mlp\.gate\.weight \(2 of shape \[4, 64\]\)$"):
        grinqh.quantize_model(make(), config)


@each_mixture
def test_a_pattern_that_means_neither_layer_nor_expert_is_refused(make: Family) -> None:
    with pytest.raises(InputError, match="modules_to_not_convert: the pattern 'expert' matches none"):
        grinqh.quantize_model(make(), GrinqhConfig(modules_to_not_convert=["experts", "expert"]))


@each_mixture
@pytest.mark.parametrize("while_loading", [False, True])
def test_a_mixture_with_its_experts_as_they_are_is_loaded_bit_for_bit(
    make: Family, while_loading: bool, tmp_path: Path
) -> None:
    config = GrinqhConfig(modules_to_not_convert=["experts", ROUTER])
    if while_loading:
        make().save_pretrained(tmp_path / "full")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "full", quantization_config=config)
        grinqh.calibrate(model, token_ids(), progress=False)
    else:
        model = calibrated(make(), config)
    model.save_pretrained(tmp_path / "packed")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert not any(info.values())
    assert_same_state(loaded, model)
    assert torch.equal(generate(loaded, token_ids(2, 12)), generate(model, token_ids(2, 12)))


@each_mixture
def test_the_model_card_says_what_stayed_at_full_precision(make: Family, tmp_path: Path) -> None:
    make(vocab_size=len(TOKENS)).save_pretrained(tmp_path / "full")
    make_tokenizer().save_pretrained(tmp_path / "full")
    with refused():
        convert(tmp_path / "full", tmp_path / "packed", calibration_tokens=128)
    assert not (tmp_path / "packed").exists()
    config = GrinqhConfig(modules_to_not_convert=["experts", ROUTER])
    convert(tmp_path / "full", tmp_path / "packed", config, calibration_tokens=128)
    card = (tmp_path / "packed" / "README.md").read_text(encoding="utf-8")
    row = next(line for line in card.splitlines() if line.startswith("| at full precision |"))
    for left in (f"{GATE_UP} (2 of shape [4, 64, 64])", f"{DOWN} (2 of shape [4, 64, 32])"):
        assert f"`{left}`" in row
    assert "embed_tokens.weight (1 of shape" in row
    assert "self_attn" not in row


def test_stacks_outside_transformers_are_refused_too() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(8, 2)
            self.gate_up_proj = nn.Parameter(torch.zeros(2, 8, 24))

    with pytest.raises(
        InputError, match=r": \*\.gate_up_proj \(2 of shape \[2, 8, 24\]\), 9\d% .*\['\*\.gate_up_proj'\]"
    ):
        grinqh.quantize_model(nn.ModuleList([Experts(), Experts()]))
