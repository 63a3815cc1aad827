"""transformers: models are saved and loaded bit for bit, and what does not fit is refused before it is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import calibrated, logits, qwen3, tiny_model, token_ids
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, CompileConfig
from transformers.quantizers import auto

import grinqh
from grinqh import GrinqhConfig, GrinqhLinear, InputError
from grinqh.model import model_config
from grinqh.registration import register_with_transformers

UP = "model.layers.0.mlp.up_proj"


def load(folder: Path, **arguments: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **arguments)


def assert_same(loaded: Any, model: Any) -> None:
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == expected[name].dtype
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(logits(loaded), logits(model))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    calibrated().save_pretrained(tmp_path)
    return tmp_path


def edit_tensors(folder: Path, **changes: Tensor | None) -> None:
    """Replaces, adds or (None) removes tensors of one layer."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[f"{UP}.{name}"]
        else:
            tensors[f"{UP}.{name}"] = tensor
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= changes
    file.write_text(json.dumps(config))


# ---- saving and loading


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("make", [tiny_model, qwen3])
def test_a_model_is_loaded_bit_for_bit(make: Any, tied: bool, tmp_path: Path) -> None:
    model = calibrated(make(tied=tied))
    model.save_pretrained(tmp_path)
    loaded, info = load(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same(loaded, model)
    assert not loaded.training
    assert not any(p.requires_grad for layer in grinqh.packed_layers(loaded).values() for p in layer.parameters())
    with grinqh.graded(model), grinqh.graded(loaded):
        assert torch.equal(logits(loaded, token_ids()), logits(model, token_ids()))


def test_saving_what_was_loaded_writes_the_same_file(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    again = tmp_path_factory.mktemp("again")
    load(saved).save_pretrained(again)
    for name in ("model.safetensors", "config.json"):
        assert (again / name).read_bytes() == (saved / name).read_bytes()


def test_a_sharded_model_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    model = calibrated()
    model.save_pretrained(tmp_path, max_shard_size="100kB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same(load(tmp_path), model)


@pytest.mark.parametrize("tied", [False, True])
def test_a_converted_head_is_loaded_bit_for_bit(tied: bool, tmp_path: Path) -> None:
    model = calibrated(tiny_model(tied=tied), GrinqhConfig(convert_lm_head=True))
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert isinstance(loaded.lm_head, GrinqhLinear)
    assert_same(loaded, model)


def test_biases_left_out_channels_and_overrides_are_loaded_bit_for_bit(tmp_path: Path) -> None:
    config = GrinqhConfig(stored_bits=4.5, overrides={"down_proj": {"plane_widths": (4, 4), "block": 32}})
    model = tiny_model(attention_bias=True)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.q_proj.bias)
    calibrated(model, config).save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert_same(loaded, model)
    assert grinqh.stored_bits(loaded) == grinqh.stored_bits(model) < 8


def test_a_bfloat16_model_keeps_its_scales(tmp_path: Path) -> None:
    model = calibrated(tiny_model(dtype=torch.bfloat16))
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert_same(loaded, model)
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    assert loaded.get_submodule(UP).block_scale.dtype == torch.float16
    assert loaded.get_submodule(UP).row_scale.dtype == torch.float32


def test_another_dtype_on_loading_changes_only_what_is_not_packed(saved: Path) -> None:
    packed = {name: tensor for name, tensor in load(saved).state_dict().items() if ".mlp." in name}
    loaded = load(saved, dtype=torch.bfloat16)
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    for name, tensor in packed.items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert logits(loaded).dtype == torch.bfloat16


def test_the_body_without_its_head_can_be_loaded(tmp_path: Path) -> None:
    model = calibrated(config=GrinqhConfig(convert_lm_head=True, read_bits=8))
    model.save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path)
    ids = token_ids(1, 9)
    with torch.no_grad():
        assert torch.equal(body(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_an_uncalibrated_model_is_loaded_and_says_that_it_reads_everything(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = grinqh.quantize_model(tiny_model())
    model.save_pretrained(tmp_path)
    assert_same(load(tmp_path), model)
    assert "not calibrated: every token reads all stored bits" in caplog.text


def test_a_full_precision_model_is_converted_on_loading(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "full")
    loaded = load(tmp_path / "full", quantization_config=GrinqhConfig(block=32))
    expected = grinqh.quantize_model(tiny_model(), GrinqhConfig(block=32))
    assert_same(loaded, expected)
    grinqh.calibrate(loaded, token_ids())
    loaded.save_pretrained(tmp_path / "packed")
    assert_same(load(tmp_path / "packed"), loaded)


# ---- the dial of a loaded model


@pytest.mark.parametrize("setting", [2.5, 8.0, {"*": 3.0, "mlp.*": 2.0}])
@pytest.mark.parametrize("exact_budget", [False, True])
def test_the_dial_is_saved_with_the_model(setting: Any, exact_budget: bool, tmp_path: Path) -> None:
    model = calibrated()
    grinqh.set_bits(model, 4)
    grinqh.set_bits(model, setting, exact_budget=exact_budget)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    for name, layer in grinqh.packed_layers(model).items():
        assert torch.equal(loaded.get_submodule(name).thresholds, layer.thresholds)
        assert (loaded.get_submodule(name).budget is not None) == exact_budget
    assert_same(loaded, model)


def test_the_dial_can_be_given_on_loading(saved: Path) -> None:
    two, four = grinqh.from_pretrained(saved, read_bits=2), grinqh.from_pretrained(saved, read_bits=4)
    assert (two.get_submodule(UP).thresholds > four.get_submodule(UP).thresholds).all()
    with pytest.warns(UserWarning, match="loading attributes"):
        again = load(saved, quantization_config=GrinqhConfig(read_bits=2, max_graded_rows=3))
    assert torch.equal(again.get_submodule(UP).thresholds, two.get_submodule(UP).thresholds)
    assert again.get_submodule(UP).max_graded_rows == 3
    assert model_config(again).block == 64


def test_without_settings_the_recorded_ones_hold(tmp_path: Path) -> None:
    model = calibrated(config=GrinqhConfig(read_bits=2.25, max_graded_rows=5))
    model.save_pretrained(tmp_path)
    loaded = grinqh.from_pretrained(tmp_path)
    assert model_config(loaded).read_bits == 2.25
    assert loaded.get_submodule(UP).max_graded_rows == 5


@pytest.mark.parametrize(("stored_bits", "planes"), [(8, 5), (7.9, 4), (6, 4), (4, 3), (2, 1)])
def test_low_planes_can_be_left_on_the_disk(saved: Path, stored_bits: float, planes: int) -> None:
    full = load(saved)
    loaded = grinqh.from_pretrained(saved, stored_bits=stored_bits, read_bits=8)
    assert len(loaded.get_submodule(UP).stored_channels) == planes
    assert grinqh.stored_bits(loaded) == loaded.get_submodule(UP).stored_bits <= stored_bits
    assert not [name for name in loaded.state_dict() if f"plane_{planes}" in name]
    for name, tensor in grinqh.dial_table(loaded).layers.items():
        widths = torch.tensor(loaded.get_submodule(UP).format.plane_widths, dtype=torch.float64)
        torch.testing.assert_close(tensor, widths @ full.get_submodule(name).dial[:planes].double())
    assert (logits(loaded) - logits(full)).abs().max() < (0.4 if planes == 1 else 0.2)


def test_a_model_loaded_with_fewer_planes_can_be_saved(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    smaller = tmp_path_factory.mktemp("smaller")
    loaded = grinqh.from_pretrained(saved, stored_bits=4)
    loaded.save_pretrained(smaller)
    assert_same(load(smaller), loaded)
    assert (smaller / "model.safetensors").stat().st_size < (saved / "model.safetensors").stat().st_size


def test_fewer_bits_than_the_first_plane_are_refused(saved: Path) -> None:
    edit_config(saved, plane_widths=[2, 1, 1, 2, 2])
    with pytest.raises(InputError, match="stored_bits is 1, must be at least 2"):
        grinqh.from_pretrained(saved, stored_bits=1)


def test_other_models_are_refused_by_the_convenience(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"is not a GRINQH model: its config\.json has quant_method None"):
        grinqh.from_pretrained(tmp_path)


# ---- running


def test_a_loaded_model_generates_the_same_with_a_compiled_static_cache(saved: Path) -> None:
    model, ids = load(saved), token_ids(2, 9)
    plain = model.generate(ids, max_new_tokens=6, do_sample=False)
    settings = CompileConfig(backend="eager", fullgraph=True, mode=None)
    settings._compile_all_devices = True
    torch._dynamo.reset()
    compiled = model.generate(
        ids, max_new_tokens=6, do_sample=False, cache_implementation="static", compile_config=settings
    )
    assert torch.equal(compiled, plain)


def test_a_loaded_model_keeps_its_scales_when_its_dtype_changes(saved: Path) -> None:
    model = load(saved)
    before = model.get_submodule(UP).block_scale.clone()
    model.to(torch.bfloat16)
    assert torch.equal(model.get_submodule(UP).block_scale, before)
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "imports",
    ["import sys, grinqh; assert 'transformers' not in sys.modules", "import grinqh.hf"],
    ids=["before transformers", "by importing the quantizer itself"],
)
def test_importing_grinqh_registers_it_once_transformers_is_loaded(imports: str) -> None:
    check = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; assert 'grinqh' in m"
    subprocess.run([sys.executable, "-c", f"{imports}; {check}"], check=True)


def test_registering_after_transformers_is_loaded_works_too() -> None:
    finders = list(sys.meta_path)
    register_with_transformers()
    assert sys.meta_path == finders
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["grinqh"] is GrinqhConfig


def test_every_public_name_can_be_imported() -> None:
    assert set(grinqh._HOMES) == set(grinqh.__all__)
    for name in grinqh.__all__:
        assert getattr(grinqh, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = grinqh.nothing


# ---- files that do not fit


def layer_tensor(folder: Path, name: str) -> Tensor:
    return load_file(folder / "model.safetensors")[f"{UP}.{name}"]


@pytest.mark.parametrize("name", ["plane_0", "plane_2", "plane_4", "block_scale", "gain", "channel_order", "dial"])
def test_a_missing_tensor_is_named(saved: Path, name: str) -> None:
    edit_tensors(saved, **{name: None})
    with pytest.raises(InputError, match=f"{UP}.{name} is missing from the checkpoint"):
        load(saved)


@pytest.mark.parametrize("name", ["plane_5", "plane_04", "bias", "weight"])
def test_an_extra_tensor_is_named(saved: Path, name: str) -> None:
    edit_tensors(saved, **{name: torch.zeros(96)})
    with pytest.raises(InputError, match=f"{UP}.{name} is in the checkpoint"):
        load(saved)


def test_a_packed_layer_that_the_config_leaves_alone_is_named(saved: Path) -> None:
    edit_config(saved, modules_to_not_convert=["layers.0.mlp.up_proj"])
    with pytest.raises(InputError, match=f"{UP}.plane_0 is in the checkpoint, but"):
        load(saved)


def test_a_packed_layer_that_the_model_does_not_have_is_named(saved: Path) -> None:
    config = AutoConfig.from_pretrained(saved)
    config.num_hidden_layers = 1
    with pytest.raises(InputError, match=r"model\.layers\.1\.\S+\.plane_0 is in the checkpoint, but"):
        load(saved, config=config)


def test_a_layer_that_is_not_packed_is_named(saved: Path) -> None:
    edit_config(saved, convert_lm_head=True)
    with pytest.raises(InputError, match=r"lm_head\.plane_0 is missing"):
        load(saved)


@pytest.mark.parametrize(
    ("change", "tensor"),
    [
        ({"plane_widths": [2, 2, 2, 2]}, "plane_1"),
        ({"plane_widths": [2, 1, 1, 2]}, "gain"),
        ({"block": 32}, "block_scale"),
        ({"dial_grid": [-20, 1, 32]}, "dial"),
        ({"overrides": {"layers.0.mlp.up_proj": {"block": 32}}}, "block_scale"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(saved: Path, change: dict[str, Any], tensor: str) -> None:
    edit_config(saved, **change)
    with pytest.raises(InputError, match=rf"{tensor} is torch\.\w+ \[.*\], must be torch\.\w+ \[.*\] by the"):
        load(saved)


def test_a_model_config_of_other_sizes_is_refused(saved: Path) -> None:
    config = AutoConfig.from_pretrained(saved)
    config.intermediate_size = 128
    with pytest.raises(InputError, match=r"mlp\.gate_proj\.plane_0 is torch.uint8 \[64, 24\], must be"):
        load(saved, config=config)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("row_scale", lambda t: t.half()),
        ("row_scale", lambda t: t[:-1].clone()),
        ("plane_3", lambda t: t[:, :-1].clone()),
        ("plane_3", lambda t: t.flatten()),
        ("channel_order", lambda t: t.long()),
    ],
)
def test_a_tensor_of_another_type_or_shape_is_named(saved: Path, name: str, wrong: Any) -> None:
    edit_tensors(saved, **{name: wrong(layer_tensor(saved, name))})
    with pytest.raises(InputError, match=f"{UP}.{name} is torch"):
        load(saved)


def test_a_plane_longer_than_the_one_above_is_named(saved: Path) -> None:
    edit_tensors(saved, plane_1=layer_tensor(saved, "plane_1")[:10].clone())
    with pytest.raises(InputError, match=rf"{UP}.plane_2 holds 64 channels, must hold at most 10"):
        load(saved)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("channel_order", 3, "channel_order is no permutation of 0..63"),
        ("block_scale", torch.nan, "block_scale holds NaN or infinity"),
        ("row_scale", torch.inf, "row_scale holds NaN or infinity"),
        ("channel_weight", -1, "channel_weight holds a negative number"),
        ("unit_thresholds", torch.nan, "unit_thresholds is .* none NaN"),
        ("unit_thresholds", 1e30, "unit_thresholds is .*, must never fall"),
        ("dial", 1.5, "dial holds numbers outside 0..1"),
    ],
)
def test_corrupted_values_are_named(saved: Path, name: str, value: float, message: str) -> None:
    tensor = layer_tensor(saved, name)
    tensor.view(-1)[1] = value
    edit_tensors(saved, **{name: tensor})
    with pytest.raises(InputError, match=f"{UP}.{message}"):
        load(saved)


def test_a_file_cut_short_names_the_tensor_and_the_file(saved: Path) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(InputError, match=r"model.safetensors is cut off: \S+ should end at byte"):
        load(saved)


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0", b"\x04\0\0\0\0\0\0\0nope....", b"\xff" * 100])
def test_a_file_without_a_header_is_named(saved: Path, content: bytes) -> None:
    (saved / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors is no safetensors file"):
        load(saved)


def test_a_header_whose_sizes_contradict_each_other_is_refused(saved: Path) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"shape":[64,24]', b'"shape":[64,25]'))
    with pytest.raises(InputError, match=r"is corrupted: \S+ is torch.uint8 \[64, 25\] in 1536 bytes"):
        load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "a newer grinqh wrote this model"),
        ({"plane_widths": [3, 5]}, "plane_widths"),
        ({"colour": "blue"}, "no setting named 'colour'"),
    ],
)
def test_a_record_that_cannot_be_read_is_refused(saved: Path, change: dict[str, Any], message: str) -> None:
    edit_config(saved, **change)
    with pytest.raises(InputError, match=message):
        load(saved)


def test_a_checkpoint_of_another_kind_is_refused(saved: Path) -> None:
    state = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    torch.save(state, saved / "pytorch_model.bin")
    with pytest.raises(InputError, match="is loaded from safetensors files"):
        load(saved)
