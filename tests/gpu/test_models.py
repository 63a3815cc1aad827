"""Converted models on the GPU: moving, saving, loading, calibrating, generating, compiling."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_model
from tiny_source import make_source
from torch import Tensor, nn

import grinqh
from grinqh.cli import main

TEXT = torch.arange(400).reshape(1, -1) * 37 % 190


@pytest.fixture(scope="module")
def converted() -> nn.Module:
    model = grinqh.quantize_model(tiny_model(), progress=False)
    grinqh.calibrate(model, TEXT, progress=False)
    return model


@pytest.fixture
def model(converted: nn.Module) -> nn.Module:
    return copy.deepcopy(converted)


def same_state(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        a.dtype == second[name].dtype and torch.equal(a.cpu(), second[name].cpu()) for name, a in first.items()
    )


def test_moving_to_the_gpu_and_back_changes_no_bit(model: nn.Module, converted: nn.Module) -> None:
    moved = model.to("cuda")
    layers = grinqh.packed_layers(moved).values()
    assert all(layer.tiled for layer in layers)
    assert [layer.stored_channels for layer in layers] == [
        layer.stored_channels for layer in grinqh.packed_layers(converted).values()
    ]
    assert same_state(moved, converted)
    moved.half().to("cpu")
    assert all(
        torch.equal(tensor.nan_to_num(), grinqh.packed_layers(converted)[name].tensors[key].nan_to_num())
        for name, layer in grinqh.packed_layers(moved).items()
        for key, tensor in layer.tensors.items()
    )
    assert not any(layer.tiled for layer in layers)


def test_outputs_on_the_gpu_are_those_of_the_cpu(model: nn.Module, converted: nn.Module) -> None:
    for bits in (8, 3, 2):
        grinqh.set_bits(converted, bits)
        grinqh.set_bits(model, bits)
        with torch.no_grad(), grinqh.graded(converted), grinqh.graded(model):
            wanted = converted(TEXT[:, :64]).logits
            got = model.to("cuda")(TEXT[:, :64].cuda()).logits.cpu()
        # A channel close to a threshold may be graded otherwise, and then differs by a step of its codes.
        assert float((got - wanted).norm() / wanted.norm()) < (2e-3 if bits == 8 else 2e-2)


@pytest.mark.parametrize("bits", [8, 3, 2])
def test_every_layer_on_the_gpu_gives_what_the_cpu_gives_for_its_input(
    model: nn.Module, converted: nn.Module, bits: int
) -> None:
    # Layer by layer: through a whole model errors of rounding move channels over thresholds, on the CPU as on the GPU.
    grinqh.set_bits(converted, bits)
    grinqh.set_bits(model, bits)
    on_gpu, errors = grinqh.packed_layers(model.to("cuda")), {}

    def compare(name: str, x: Tensor, wanted: Tensor) -> None:
        got = on_gpu[name](x.cuda()).cpu()
        errors[name] = float((got - wanted).norm() / wanted.norm())

    handles = [
        layer.register_forward_hook(lambda _, inputs, y, name=name: compare(name, inputs[0], y))
        for name, layer in grinqh.packed_layers(converted).items()
    ]
    with torch.no_grad(), grinqh.graded(converted), grinqh.graded(model):
        converted(TEXT[:, :64])
    for handle in handles:
        handle.remove()
    assert errors.keys() == on_gpu.keys()
    assert max(errors.values()) < 5e-3


def test_quantizing_on_the_gpu_gives_the_bits_of_the_cpu() -> None:
    on_cpu = grinqh.quantize_model(tiny_model(), progress=False)
    on_gpu = grinqh.quantize_model(tiny_model().to("cuda"), progress=False)
    assert all(layer.tiled for layer in grinqh.packed_layers(on_gpu).values())
    for name, layer in grinqh.packed_layers(on_cpu).items():
        other = grinqh.packed_layers(on_gpu)[name].tensors
        for tensor, value in layer.tensors.items():
            assert torch.equal(other[tensor].cpu().nan_to_num(), value.nan_to_num()), (name, tensor)


def test_calibration_on_the_gpu_reads_the_bits_asked_for() -> None:
    model = grinqh.quantize_model(tiny_model().to("cuda"), progress=False)
    grinqh.calibrate(model, TEXT, progress=False)
    grinqh.set_bits(model, 3.0)
    grinqh.count_reads(model)
    with torch.no_grad(), grinqh.graded(model):
        model(TEXT.cuda())
    assert abs(grinqh.read_stats(model).read_bits - 3.0) < 0.1


def test_save_and_load_are_bit_equal_on_the_gpu(model: nn.Module, converted: nn.Module, tmp_path: Path) -> None:
    model.to("cuda").save_pretrained(tmp_path)
    for device in ("cuda", "cpu"):
        loaded = grinqh.from_pretrained(tmp_path, device_map=device)
        assert all(layer.tiled == (device == "cuda") for layer in grinqh.packed_layers(loaded).values())
        assert same_state(loaded, converted)


def test_a_state_dict_of_the_cpu_loads_on_the_gpu(model: nn.Module, converted: nn.Module) -> None:
    model.to("cuda")
    for parameter in model.parameters():
        parameter.data.zero_()
    model.load_state_dict(converted.state_dict())
    assert same_state(model, converted)


def test_generate_follows_the_dial(model: nn.Module) -> None:
    model.to("cuda", torch.bfloat16)
    prompts = TEXT[:, :128].reshape(8, 16).cuda()
    generated = []
    for bits in (8.0, 2.0, 8.0):
        grinqh.set_bits(model, bits)
        generated.append(model.generate(prompts, max_new_tokens=12, do_sample=False))
    at_8_bits, at_2_bits, again = generated
    assert not torch.equal(at_8_bits, at_2_bits)
    assert torch.equal(at_8_bits, again)


@pytest.mark.filterwarnings("ignore")  # of torch, in its own compiler
def test_one_compiled_graph_serves_every_setting_of_the_dial(model: nn.Module) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    model.to("cuda", torch.bfloat16)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    ids = TEXT[:, 1:2].cuda()  # not the first token, 0: it is the padding, whose embedding is 0
    with torch.no_grad():
        outputs = []
        for bits in (8.0, 3.0, 2.0):
            grinqh.set_bits(model, bits)
            wanted = model(ids, use_cache=False).logits
            got = compiled(ids, use_cache=False).logits
            assert float((got - wanted).float().norm() / wanted.float().norm()) < 2e-2
            outputs.append(got)
    assert counter.frame_count == 1
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.filterwarnings("ignore")  # the command line prints them
def test_the_commands_run_on_the_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, text = make_source(tmp_path / "source"), tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 40, encoding="utf-8")

    def run(*arguments: object) -> dict[str, object]:
        assert main([*map(str, arguments), "--json"]) == 0
        printed = capsys.readouterr()
        where = arguments[arguments.index("--device") + 1]
        assert ("device: cpu (" if where == "cpu" else "device: cuda:0 (") in printed.err
        return json.loads(printed.out)

    # Heads are rotated by activations, which round differently.
    made = {
        device: run("convert", source, tmp_path / device, "--calibration", text, "--device", device, "--keep-heads")
        for device in ("cpu", "cuda")
    }
    assert made["cuda"]["device"] == "cuda:0"
    assert made["cuda"]["packed_bytes"] == made["cpu"]["packed_bytes"]
    ours, theirs = (load_file(tmp_path / device / "model.safetensors") for device in ("cuda", "cpu"))
    # Calibration rounds differently, which may exchange channels; what does not depend on it is the same.
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in theirs.items()}
    assert all(
        torch.equal(ours[name], theirs[name]) for name in ours if name.endswith(("row_scale", ".gain", ".error"))
    )
    # With rotated heads that holds for all layers but v and o.
    for device in ("cpu", "cuda"):
        run("convert", source, tmp_path / device, "--calibration", text, "--device", device, "--force")
    ours, theirs = (load_file(tmp_path / device / "model.safetensors") for device in ("cuda", "cpu"))
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in theirs.items()}
    assert all(
        torch.equal(ours[name], theirs[name])
        for name in ours
        if name.endswith(("row_scale", ".gain", ".error")) and ".v_proj." not in name and ".o_proj." not in name
    )
    for device in ("cuda:0", "auto"):
        answer = run("generate", tmp_path / "cuda", "It was", "--max-new-tokens", 4, "--device", device)
        assert answer["device"] == "cuda:0"
        scores = run("ppl", tmp_path / "cuda", "--text", text, "--window", 64, "--windows", 1, "--device", device)
        assert scores["device"] == "cuda:0"
