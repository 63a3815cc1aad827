"""Rotated attention heads: what changes, what does not, and where they are left alone."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import FAMILIES, assert_unchanged, logits, qwen2, state, tiny_model, token_ids
from tiny_source import make_source
from torch import Tensor, nn

import grinqh
from grinqh import GrinqhConfig, InputError, heads, packed_layers
from grinqh.cli import main
from grinqh.convert import convert
from grinqh.source import Source

ATTENTION = ["model.layers.0.self_attn", "model.layers.1.self_attn"]
TEXT = Path(__file__).read_text(encoding="utf-8")  # of more distinct tokens than a single sentence


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def of_heads(x: Tensor, of: heads.Heads) -> Tensor:
    """x [.., H * size] as [count, rows, size]."""
    return x.detach().reshape(-1, of.count, of.sharing, of.size).transpose(0, 1).flatten(1, 2).double()


def correlation(moment: Tensor) -> float:
    """Root mean square of the correlations off the diagonal of [count, size, size]."""
    root = moment.diagonal(dim1=1, dim2=2).sqrt()
    correlations = moment / (root[:, :, None] * root[:, None])
    size = moment.shape[-1]
    return float(((correlations.square().sum((1, 2)) - size) / (size * (size - 1))).mean().sqrt())


class Attention(nn.Module):
    """Four query heads on two key heads, 8 numbers each, that attend to all tokens alike."""

    def __init__(self, between: Callable[[Tensor], Tensor], size: Any) -> None:
        super().__init__()
        self.v_proj, self.o_proj = nn.Linear(24, 16), nn.Linear(32, 24)
        self.between, self.head_dim = between, size

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values = self.v_proj(x)
        means = (values.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]).unflatten(-1, (2, 8))
        attended = means.repeat_interleave(2, dim=-2).flatten(-2)
        return self.o_proj(self.between(attended)), values


class Model(nn.Module):
    """A language model of one such layer, in which values may be used elsewhere too."""

    def __init__(
        self,
        between: Callable[[Tensor], Tensor] = lambda x: x,
        elsewhere: Callable[[Tensor, Tensor], Any] = lambda logits, _: logits,
        size: Any = 8,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.attention = nn.Embedding(256, 24), Attention(between, size)
        self.lm_head, self.elsewhere = nn.Linear(24, 256), elsewhere

    def forward(self, ids: Tensor) -> Any:
        x, values = self.attention(self.embedding(ids))
        return self.elsewhere(self.lm_head(x), values)


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
def test_the_model_computes_what_it_did(make: Callable[..., Any]) -> None:
    model = make(initializer_range=0.15)
    before = logits(model)
    assert grinqh.rotate_heads(model, token_ids()) == ATTENTION
    assert error(logits(model), before) < 1e-5


def test_in_16_bits_nothing_is_lost_but_rounding() -> None:
    exact, model = tiny_model(initializer_range=0.15), tiny_model(initializer_range=0.15, dtype=torch.bfloat16)
    rounding = error(logits(model), logits(exact))
    assert grinqh.rotate_heads(model, token_ids()) == ATTENTION
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert error(logits(model), logits(exact)) < 1.5 * rounding


def test_only_v_its_bias_and_o_change() -> None:
    model = qwen2()
    before = state(model)
    grinqh.rotate_heads(model, token_ids())
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{of}.{name}" for of in ATTENTION for name in ("v_proj.weight", "v_proj.bias", "o_proj.weight")}


def test_parameters_keep_whether_they_are_trained_and_what_was_behind_them_stays() -> None:
    model = tiny_model().requires_grad_(False)
    old = model.model.layers[0].self_attn.v_proj.weight
    was = old.clone()
    grinqh.rotate_heads(model, token_ids())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(old, was)


def test_what_reaches_o_is_not_correlated() -> None:
    model, correlations = tiny_model(initializer_range=0.15), []
    for rotate in (False, True):
        if rotate:
            grinqh.rotate_heads(model, token_ids())
        of, seen = heads.find_heads(model)[0], list[Tensor]()
        hook = of.o.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0]))
        logits(model, token_ids())
        hook.remove()
        rows = of_heads(seen[0], of)
        correlations.append(correlation(rows.mT @ rows))
    assert correlations[1] < 1e-3 * correlations[0]


@given(count=st.integers(1, 3), sharing=st.integers(1, 3), size=st.integers(1, 12), seed=st.integers(0, 99))
def test_rotations_are_orthogonal_and_leave_no_correlation(count: int, sharing: int, size: int, seed: int) -> None:
    torch.manual_seed(seed)
    inputs = count * sharing * size
    of = heads.Heads("attention", nn.Linear(3, count * size), nn.Linear(inputs, 9), count, sharing, size)
    rows = of_heads(torch.randn(40, inputs) @ torch.randn(inputs, inputs), of)
    moment = rows.mT @ rows
    (rotation,) = heads.principal_components({of: moment}).values()
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(size).double().expand(count, -1, -1))
    rotated = rotation @ moment @ rotation.mT
    energy = rotated.diagonal(dim1=1, dim2=2)
    assert (rotated - torch.diag_embed(energy)).norm() < 1e-9 * moment.norm()
    assert (energy.diff(dim=1) >= -1e-9 * energy.amax()).all()


def test_heads_are_not_rotated_where_something_happens_between_v_and_o(caplog: pytest.LogCaptureFixture) -> None:
    gate = torch.rand(32, generator=torch.Generator().manual_seed(1))
    model = Model(between=lambda x: x * gate)
    before = state(model)
    with caplog.at_level(logging.INFO):
        assert grinqh.rotate_heads(model, token_ids()) == []
    assert "attention: o_proj does not see values as they are" in caplog.text
    assert_unchanged(model, before)


def test_heads_are_not_rotated_where_values_are_used_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    model = Model(elsewhere=lambda logits, values: logits + values.abs().sum(-1, keepdim=True))
    assert grinqh.rotate_heads(model, token_ids()) == []
    assert "uses values elsewhere" in caplog.text


def test_heads_are_not_rotated_in_a_model_without_logits(caplog: pytest.LogCaptureFixture) -> None:
    assert grinqh.rotate_heads(Model(elsewhere=lambda logits, _: (logits,)), token_ids()) == []
    assert "has no logits" in caplog.text


def test_heads_of_any_module_that_names_them_so_are_rotated() -> None:
    assert grinqh.rotate_heads(Model(), token_ids()) == ["attention"]


@pytest.mark.parametrize("size", [5, 32, "8"])
def test_heads_whose_size_does_not_fit_are_left_alone(size: Any) -> None:
    assert grinqh.rotate_heads(Model(size=size), token_ids()) == []


def test_weights_that_several_modules_share_are_left_alone() -> None:
    model = tiny_model()
    first, second = (layer.self_attn for layer in model.model.layers)
    first.v_proj.weight = second.v_proj.weight
    assert grinqh.rotate_heads(model, token_ids()) == []


def test_packed_layers_are_left_alone() -> None:
    model = grinqh.quantize_model(tiny_model(), GrinqhConfig(modules_to_not_convert=["layers.0.*"]), progress=False)
    assert grinqh.rotate_heads(model, token_ids()) == ATTENTION[:1]


def test_activations_that_are_not_finite_are_refused_by_name_and_nothing_changes() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[5] = torch.nan
    before = state(model)
    with pytest.raises(InputError, match=r"model\.layers\.1\.self_attn\.o_proj saw activations that are NaN"):
        grinqh.rotate_heads(model, token_ids())
    assert_unchanged(model, before)


@pytest.mark.parametrize("distinct", [31, 32])
def test_heads_are_left_alone_where_the_text_has_few_distinct_tokens(
    distinct: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(initializer_range=0.15)  # heads of 16 numbers
    before = state(model)
    ids = (torch.arange(256) % distinct + 1).reshape(4, 64)
    with caplog.at_level(logging.WARNING, "grinqh"):
        rotated = grinqh.rotate_heads(model, ids)
    if distinct < 32:
        assert rotated == []
        assert_unchanged(model, before)
        assert "the text has 31 distinct tokens, and to rotate heads of 16 numbers takes 32" in caplog.text
    else:
        assert rotated == ATTENTION
        assert not caplog.records


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(InputError, match="texts but no tokenizer"):
        grinqh.rotate_heads(tiny_model(), "text")


def test_the_model_s_mode_and_hooks_are_left_as_they_were() -> None:
    model = tiny_model().train()
    grinqh.rotate_heads(model, token_ids(1, 8))
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("fuse", [False, True])
def test_a_folder_is_packed_as_the_model_that_was_rotated(fuse: bool, tmp_path: Path) -> None:
    source, config = Source(make_source(tmp_path / "source")), GrinqhConfig(fuse=fuse, convert_lm_head=True)
    changed: list[str] = []

    def change(model: Any) -> None:
        assert len(packed_layers(model)) == (5 if fuse else 11)  # all but v and o, or q, k, v and o
        changed.extend(grinqh.rotate_heads(model, TEXT, source.tokenizer))

    model = source.load_quantized(config, rotate_heads=change)
    assert changed == ATTENTION
    whole: Any = source.load_model()
    before = copy.deepcopy(whole)
    grinqh.rotate_heads(whole, TEXT, source.tokenizer)
    expected = packed_layers(grinqh.quantize_model(whole, config, progress=False))
    found, ids = packed_layers(model), token_ids(16, 64)
    assert found.keys() == expected.keys()
    # The layers that were packed already give heads slightly other inputs, and so slightly other rotations.
    assert error(logits(model, ids), logits(before, ids)) < 1.1 * error(logits(whole, ids), logits(before, ids))
    for name, layer in found.items():
        assert layer.sections == expected[name].sections
        if not name.endswith(("v_proj", "o_proj")):
            assert torch.equal(layer.tensors["plane_0"], expected[name].tensors["plane_0"])


@pytest.mark.parametrize(
    ("asked", "stored_bits", "layers"), [(None, None, 2), (None, 6.0, 0), (False, None, 0), (True, 6.0, 2)]
)
def test_a_conversion_rotates_heads_unless_few_bits_are_stored_or_it_is_told_not_to_and_says_so(
    asked: bool | None, stored_bits: float | None, layers: int, tmp_path: Path
) -> None:
    source, text = make_source(tmp_path / "source"), tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    config = GrinqhConfig(stored_bits=stored_bits)
    made = convert(source, tmp_path / "out", config, calibration=text, rotate_heads=asked)
    assert made.rotated_heads == layers
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"| heads | rotated in {layers} attention layers" in card


def test_the_command_leaves_heads_alone_if_told_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, text = make_source(tmp_path / "source"), tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    command = ["convert", str(source), str(tmp_path / "out"), "--calibration", str(text), "--device", "cpu", "--json"]
    assert main([*command, "--keep-heads"]) == 0
    assert json.loads(capsys.readouterr().out)["rotated_heads"] == 0
    assert main([*command, "--force"]) == 0
    assert json.loads(capsys.readouterr().out)["rotated_heads"] == 2
