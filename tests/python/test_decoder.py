"""Fused decoder layers: what they answer against transformers' own, and everything that a packed model can do."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, calibrated, llama3, logits, mistral, qwen2, qwen3, qwen3_moe, tiny_model, token_ids
from torch import Tensor, nn

import grinqh
from grinqh import GrinqhConfig
from grinqh.linear import GrinqhLinear, prepared

pytest.importorskip("transformers")
from transformers import StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# At 8 bits every channel is read, whatever the order of sums makes of an importance: what is left is rounding.
CLOSE: Any = {"rtol": 1e-4, "atol": 1e-5}
# Of kernels for rows that are graded, which round what they multiply to fixed-point numbers: inputs that differ in
# their last bit may be a step apart. Logits are about 1, and reading by grades moves them by 1e-3 to 2e-3 in itself.
GRADED: Any = {"rtol": 2e-3, "atol": 2e-3}
# 8 bits of precision through two blocks, at logits of about 1.
LOOSE: Any = {"rtol": 0.05, "atol": 0.05}
Family = Callable[..., Any]
each_family = pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES.keys())
each_cache = pytest.mark.parametrize("static", [False, True], ids=["growing cache", "static cache"])


def converted(make: Family = llama3, bits: float = 8, **settings: Any) -> Any:
    """Its norms are not those of a new model, which are all ones."""
    model = make(initializer_range=0.15, **settings)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
    calibrated(model, GrinqhConfig(fuse=True))
    grinqh.set_bits(model, bits)
    return model


def both(make: Family = llama3, **settings: Any) -> tuple[Any, Any]:
    """A model with fused decoder layers, and the same as transformers runs it."""
    model = converted(make, **settings)
    fused = copy.deepcopy(model)
    grinqh.fuse_decoder(fused)
    return fused, model


def decoded(model: Any, ids: Tensor, prompt: int, static: bool = False) -> Tensor:
    """Logits of a prompt and of single tokens after it."""
    cache: Any = StaticCache(config=model.config, max_cache_len=32) if static else None
    outputs = []
    with torch.no_grad():
        for part in ids.split([prompt] + [1] * (ids.shape[1] - prompt), dim=1):
            step = model(part, past_key_values=cache, use_cache=True)
            outputs.append(step.logits)
            cache = step.past_key_values
    return torch.cat(outputs, dim=1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[GrinqhLinear]:
    """The layers that were called with the work around them."""
    called: list[GrinqhLinear] = []
    fused = GrinqhLinear.fused

    def noting(self: GrinqhLinear, *arguments: Any, **keywords: Any) -> Tensor:
        called.append(self)
        return fused(self, *arguments, **keywords)

    monkeypatch.setattr(GrinqhLinear, "fused", noting)
    return called


@pytest.fixture
def scalar_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that round no input."""
    monkeypatch.setenv("GRINQH_CPU_ISA", "scalar")


@each_family
@each_cache
@pytest.mark.usefixtures("scalar_kernels")
def test_prompts_and_steps_are_those_of_the_model_before(make: Family, static: bool, calls: list[Any]) -> None:
    fused, model = both(make)
    ids = token_ids(2, 24)  # prompts of 40 rows are read in full, steps of 2 are graded
    got = decoded(fused, ids, 20, static)
    assert len(calls) == 2 * 4 * 5
    torch.testing.assert_close(got, decoded(model, ids, 20, static), **CLOSE)


@each_family
def test_steps_of_the_kernels_of_this_machine(make: Family) -> None:
    fused, model = both(make)
    ids = token_ids(2, 24)
    torch.testing.assert_close(decoded(fused, ids, 20), decoded(model, ids, 20), **GRADED)


@each_family
def test_bfloat16(make: Family) -> None:
    fused, model = both(make, dtype=torch.bfloat16)
    ids = token_ids(2, 24)
    got = decoded(fused, ids, 20)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, decoded(model, ids, 20), **LOOSE)


@each_family
@pytest.mark.parametrize("static", [None, "static"])
def test_generated_tokens_are_the_same(make: Family, static: str | None) -> None:
    fused, model = both(make)
    options = {"max_new_tokens": 10, "do_sample": False, "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    options |= {"cache_implementation": static, "disable_compile": True}
    assert torch.equal(fused.generate(token_ids(2, 9), **options), model.generate(token_ids(2, 9), **options))


@pytest.mark.parametrize("make", [mistral, qwen3])
@pytest.mark.usefixtures("scalar_kernels")
def test_grouped_attention(make: Family) -> None:
    fused, model = both(make)
    grinqh.use_grouped_attention(fused)
    ids = token_ids(2, 24)
    torch.testing.assert_close(decoded(fused, ids, 20, static=True), decoded(model, ids, 20, static=True), **CLOSE)


def test_padding_is_masked() -> None:
    fused, model = both(qwen2)
    ids, mask = token_ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    with torch.no_grad():
        got, wanted = (m(ids, attention_mask=mask).logits[:, 5:] for m in (fused, model))
    torch.testing.assert_close(got, wanted, **CLOSE)


@each_family
def test_eager_attention(make: Family) -> None:
    fused, model = both(make, attn_implementation="eager")
    torch.testing.assert_close(logits(fused), logits(model), **CLOSE)


@each_family
def test_attention_is_told_what_the_family_tells_it(make: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    models = both(make)
    told: list[dict[str, Any]] = []
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def noting(module: nn.Module, *tensors: Any, **keywords: Any) -> Any:
        told.append({key: value for key, value in keywords.items() if not isinstance(value, Tensor)})
        return attend(module, *tensors, **keywords)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", noting)
    for model in models:
        logits(model)
    for of_fused, of_model in zip(told[:2], told[2:], strict=True):
        assert of_fused == {"sliding_window": None} | of_model


@each_family
@pytest.mark.filterwarnings("ignore")  # of torch, in its own compiler
def test_a_step_compiles_into_one_graph_for_every_setting_of_the_dial(make: Family) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    # A window's static cache counts its tokens in Python, which compiles again.
    windows: dict[str, Any] = {"sliding_window": None} if make is mistral else {}
    model = converted(make, **windows)
    grinqh.fuse_decoder(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    cache = StaticCache(config=model.config, max_cache_len=16)
    ids, mask = token_ids(2, 9), (torch.arange(16) <= 8).expand(2, 1, 1, 16)
    with torch.no_grad():
        model(ids[:, :8], past_key_values=cache, use_cache=True)
        for bits, tolerance in ((8.0, GRADED), (3.0, LOOSE)):  # at 3 a channel may pass a threshold or not
            grinqh.set_bits(model, bits)
            outputs = []
            for forward in (model, compiled):
                for layer in cache.layers:
                    layer.cumulative_length.fill_(8)
                step = forward(
                    ids[:, 8:],
                    position_ids=torch.full((2, 1), 8),
                    attention_mask=mask,
                    past_key_values=cache,
                    use_cache=True,
                )
                outputs.append(step.logits.clone())
            torch.testing.assert_close(outputs[1], outputs[0], **tolerance)
    assert counter.frame_count == 1
    names = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    assert sum("grinqh.fused_linear" in name for name in names) == 8
    assert not [name for name in names if "grinqh.linear" in name]


@pytest.mark.usefixtures("scalar_kernels")
def test_the_dial_turns_and_reads_are_counted_as_before() -> None:
    # Importances that differ by rounding may pass a threshold or not: a few channels of 64.
    fused, model = both(qwen3)
    counts = []
    for m in (fused, model):
        grinqh.count_reads(m, keep_tokens=8)
        for bits in (2.0, 4.0):
            grinqh.set_bits(m, bits)
            decoded(m, token_ids(2, 12), 10)
        counts.append((grinqh.read_stats(m), grinqh.token_reads(m)))
    (got, got_tokens), (wanted, wanted_tokens) = counts
    assert got.layers.keys() == wanted.layers.keys()
    assert abs(got.read_bits - wanted.read_bits) < 0.02
    torch.testing.assert_close(got_tokens.read_bits, wanted_tokens.read_bits, rtol=0, atol=0.05)


def test_counting_changes_no_logits() -> None:
    fused, _ = both(bits=3)
    before = decoded(fused, token_ids(2, 12), 10)
    grinqh.count_reads(fused)
    torch.testing.assert_close(decoded(fused, token_ids(2, 12), 10), before, rtol=0, atol=0)


def test_a_schedule_sets_other_bits_for_other_tokens() -> None:
    fused, _ = both()
    grinqh.count_reads(fused, keep_tokens=6)
    with grinqh.BitsSchedule(fused, [(3, 6.0), (None, 2.0)]):
        fused.generate(token_ids(1, 20), max_new_tokens=7, min_new_tokens=7, do_sample=False)
    read = grinqh.token_reads(fused).read_bits
    assert read[:2].min() > 4
    assert read[-2:].max() < 3


def test_calibration_records_the_same_dial_after_fusing_as_before() -> None:
    fused, model = both()
    for m in (fused, model):
        grinqh.calibrate(m, token_ids(seed=5), progress=False)
    for got, wanted in zip(*(grinqh.packed_layers(m).values() for m in (fused, model)), strict=True):
        assert torch.equal(got.dial, wanted.dial)
        assert torch.equal(got.channel_order, wanted.channel_order)


def test_gradients_training_and_hooks_run_the_own_forward(calls: list[Any]) -> None:
    fused, model = both()
    ids = token_ids(2, 9)
    gradients = []
    for m in (fused, model):
        embedded = m.get_input_embeddings()(ids).detach().requires_grad_()
        m(inputs_embeds=embedded).logits.square().sum().backward()
        gradients.append(embedded.grad)
    assert torch.equal(*gradients)
    fused.train()
    logits(fused)
    fused.eval()
    seen: list[Any] = []
    handle = fused.model.layers[0].mlp.register_forward_hook(lambda *arguments: seen.append(arguments))
    assert not calls
    logits(fused)
    assert len(seen) == 1
    assert len(calls) == 4  # of the other layer
    handle.remove()
    logits(fused)
    assert len(calls) == 12


def test_attentions_and_hidden_states_can_be_asked_for() -> None:
    fused, model = both()
    for m in (fused, model):
        m.set_attn_implementation("eager")
    with torch.no_grad():
        got, wanted = (m(token_ids(2, 9), output_attentions=True, output_hidden_states=True) for m in (fused, model))
    for name in ("attentions", "hidden_states"):
        assert len(got[name]) == len(wanted[name])
        for a, b in zip(got[name], wanted[name], strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.filterwarnings("ignore")  # of torch, about autocast on this CPU
def test_autocast() -> None:
    fused, model = both()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(logits(fused).float(), logits(model).float(), **LOOSE)


def test_state_dicts_files_and_parameters_stay_as_they_were(tmp_path: Path) -> None:
    fused, model = both()
    assert [name for name, _ in fused.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert [name for name, _ in fused.named_modules()] == [name for name, _ in model.named_modules()]
    assert list(fused.state_dict()) == list(model.state_dict())
    fused.save_pretrained(tmp_path)
    loaded = grinqh.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    grinqh.fuse_decoder(loaded)
    assert torch.equal(logits(loaded), logits(fused))
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(logits(loaded), logits(fused))


def test_a_copy_is_fused_and_independent() -> None:
    fused, _ = both()
    exact = logits(fused)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    for other in (copy.deepcopy(fused), torch.load(file, weights_only=False)):
        assert torch.equal(logits(other), exact)
        other.model.layers[1].input_layernorm.weight.data.zero_()
        assert not torch.equal(logits(other), exact)
        assert torch.equal(logits(fused), exact)


def test_it_can_be_undone_and_done_again(calls: list[Any]) -> None:
    fused, model = both(qwen3)
    for _ in range(2):
        grinqh.fuse_decoder(fused, enabled=False)
        calls.clear()
        assert torch.equal(logits(fused), logits(model))
        assert not calls
    assert "forward" not in vars(fused.model.layers[0])
    for _ in range(2):
        grinqh.fuse_decoder(fused)
        calls.clear()
        logits(fused)
        assert len(calls) == 8


def gelu() -> Any:
    return converted(tiny_model, hidden_act="gelu")


def apart() -> Any:
    return calibrated(tiny_model())


def partly() -> Any:
    config = GrinqhConfig(fuse=True, modules_to_not_convert=["layers.1.self_attn.o_proj"])
    return grinqh.quantize_model(tiny_model(), config, progress=False)


def other_norm() -> Any:
    model = converted()
    model.model.layers[1].input_layernorm = nn.Identity()
    return model


def other_forward() -> Any:
    model = converted()
    model.model.layers[1].mlp.forward = lambda x: x
    return model


def other_layer() -> Any:
    model = converted()
    layers = model.model.layers
    layers[1].__class__ = type("LlamaDecoderLayer", (type(layers[1]),), {})
    return nn.Sequential(layers[1])


def mixture() -> Any:
    config = GrinqhConfig(fuse=True, modules_to_not_convert=["experts"])
    return grinqh.quantize_model(qwen3_moe(), config, progress=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tiny_model, "LlamaForCausalLM has no packed layers"),
        (apart, r"model\.layers\.0 has no self_attn\.qkv_proj: convert with GrinqhConfig\(fuse=True\)"),
        (partly, r"model\.layers\.1\.self_attn\.o_proj is a Linear, must be a packed layer"),
        (gelu, r"model\.layers\.0\.mlp\.act_fn is a GELUActivation, must be SiLU"),
        (other_norm, r"model\.layers\.1\.input_layernorm is a Identity, must be a LlamaRMSNorm"),
        (other_forward, r"model\.layers\.1\.mlp has a forward that is not its class's"),
        (other_layer, "Sequential has no decoder layers of Llama, Mistral, Qwen2, Qwen3"),
        (mixture, "Qwen3MoeForCausalLM has no decoder layers of Llama"),
    ],
)
@pytest.mark.filterwarnings("ignore:left at full precision")
def test_what_cannot_be_fused_is_refused_and_stays_as_it_was(make: Family, message: str) -> None:
    model = make()
    with pytest.raises(grinqh.InputError, match=message):
        grinqh.fuse_decoder(model)
    layers = [module for module in model.modules() if type(module).__name__.endswith("DecoderLayer")]
    assert not [layer for layer in layers if "forward" in vars(layer)]


def packed_linear(dtype: torch.dtype) -> GrinqhLinear:
    torch.manual_seed(0)
    layer: Any = grinqh.quantize_model(nn.Sequential(nn.Linear(96, 70)), progress=False)[0]
    return layer.to(dtype)


AROUND = {"nothing": (False, False), "gated": (True, False), "norm": (False, True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize(("gated", "normed"), AROUND.values(), ids=AROUND.keys())
@pytest.mark.parametrize("added", [False, True], ids=["no residual", "residual"])
def test_a_layer_with_what_is_around_it(dtype: torch.dtype, rows: int, gated: bool, normed: bool, added: bool) -> None:
    layer = packed_linear(dtype)
    x = torch.randn(2, rows, 192 if gated else 96).to(dtype)
    settings: dict[str, Any] = {"gated": gated}
    if normed:
        settings |= {"norm_weight": (0.5 + torch.rand(96)).to(dtype), "norm_eps": 1e-5}
    residual = torch.randn(2, rows, 70).to(dtype) if added else None
    with torch.no_grad():
        got = layer.fused(x, residual=residual, **settings)
        wanted = layer(prepared(x, **settings))
        wanted = wanted if residual is None else wanted + residual
        layer.count_reads = True
        counted = layer.fused(x, residual=residual, **settings)
    # An input that is rounded the other way moves an output by a part of its last digit, at outputs of about 1.
    tolerance = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    assert torch.equal(got, counted)
    assert int(layer.read_total[1]) == (2 * rows if 2 * rows <= 16 else 0)


@pytest.mark.parametrize("gated", [False, True], ids=["norm", "gated"])
def test_gradients_of_a_layer_reach_all_that_is_around_it(gated: bool) -> None:
    layer = packed_linear(torch.float32)
    x, residual = torch.randn(3, 192 if gated else 96, requires_grad=True), torch.randn(3, 70, requires_grad=True)
    weight = None if gated else torch.rand(96, requires_grad=True)
    inputs = [tensor for tensor in (x, residual, weight) if tensor is not None]
    outputs = (
        layer.fused(x, norm_weight=weight, norm_eps=1e-5, gated=gated, residual=residual),
        layer(prepared(x, weight, 1e-5, gated)) + residual,
    )
    got, wanted = (torch.autograd.grad(y.square().sum(), inputs) for y in outputs)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_a_norm_with_gates_is_refused() -> None:
    with pytest.raises(grinqh.InputError, match="norm_weight is given and gated is True"):
        packed_linear(torch.float32).fused(torch.randn(1, 192), norm_weight=torch.ones(96), gated=True)


def test_hooks_of_a_layer_see_the_prepared_input() -> None:
    layer = packed_linear(torch.float32)
    x, seen = torch.randn(3, 192), []
    layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    layer.fused(x, gated=True)
    torch.testing.assert_close(seen[0], prepared(x, gated=True))
