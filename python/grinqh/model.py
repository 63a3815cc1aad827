"""A model's packed layers: making them, finding them, counting what they read."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from grinqh import packing, resume
from grinqh.config import GrinqhConfig, check_patterns, matches
from grinqh.errors import InputError
from grinqh.fusion import fuse_linears, sections_of
from grinqh.linear import GrinqhLinear
from grinqh.memory import trim_heap
from grinqh.unconverted import check_unconverted, named, other_weights

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)

UNLIMITED_ROWS = 2**31 - 1
_CONFIG_ATTRIBUTE = "grinqh_config"  # where a model that is not transformers' keeps its config


def quantize_model(model: Model, config: GrinqhConfig | None = None, *, progress: bool = True) -> Model:
    """Replaces the model's linear layers by `GrinqhLinear`, in place.

    The new layers read everything until `grinqh.calibrate` has recorded the dial. What each layer loses at each grade
    is logged (logger `grinqh.model`, level INFO).

    Args:
        model: any module; for a transformers model the config is recorded, so that `save_pretrained` works.
        config: what to convert and how; None for the defaults.
        progress: whether to show a progress bar on stderr (only if that is a terminal).

    Returns:
        The model.

    Raises:
        InputError: nothing to convert, a pattern that matches nothing, experts that cannot be converted and are not
            named (see `GrinqhConfig`), or a weight that is NaN, infinite or no float, by name; the model is then
            unchanged.

    Warns:
        UserWarning: other matrices that cannot be converted and are not named, by name.
    """
    config = GrinqhConfig() if config is None else config
    layers = linear_layers(model, config)
    check_unconverted(model, config)
    for name, linear in layers.items():
        packing.check_weight(f"{name}.weight", linear.weight)
        if linear.bias is not None and not torch.isfinite(linear.bias).all():
            raise InputError(f"{name}.bias holds NaN or infinity, must be finite")
    pack_linears(model, config, layers, progress=progress)
    return model


def pack_linears(
    model: nn.Module, config: GrinqhConfig, layers: dict[str, nn.Linear], *, progress: bool = True
) -> None:
    """Puts packed layers in place of the given ones, by name, fused if the config says so, and records the config.

    `layers` is emptied on the way, so that full-precision weights go one by one.
    """
    if config.fuse:
        fuse_linears(model, config, layers)
    shared = shared_weights(model)
    converted: dict[int, GrinqhLinear] = {}
    quiet = None if progress and layers else True
    for name in tqdm(list(layers), desc="quantize", unit="layer", file=sys.stderr, disable=quiet):
        linear = layers.pop(name)
        if id(linear) not in converted:  # else: a layer that the model uses under several names
            tensors = pack_weight(name, linear.weight, config)
            converted[id(linear)] = packed_layer(name, linear, tensors, config, linear.weight.device)
            if id(linear.weight) in shared:
                log_untied(name, converted[id(linear)])
        model.set_submodule(name, converted[id(linear)])
        del linear
        trim_heap()
    record_config(model, config)


def linear_layers(model: nn.Module, config: GrinqhConfig, *, check: bool = True) -> dict[str, nn.Linear]:
    """The layers that `quantize_model` converts, by name; a model on the meta device will do.

    Args:
        model: any module.
        config: says what to leave alone. The output head, and layers that share their weight with another module
            (a tied head), are left alone unless `convert_lm_head`.
        check: whether to refuse patterns that match nothing, and a model without such layers.

    Raises:
        InputError: see `check`.
    """
    linears = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if type(module) is nn.Linear  # not a subclass: its forward may do something else
    }
    if check:
        others = [name for name, _ in other_weights(model)]  # may be named, too: they are left alone anyway
        patterns = [p for p in config.modules_to_not_convert or [] if not any(named(p, name) for name in others)]
        check_patterns("modules_to_not_convert", patterns, linears)
        check_patterns("overrides", config.overrides, linears)
    left_alone = set() if config.convert_lm_head else output_heads(model)
    chosen = {
        name: module
        for name, module in linears.items()
        if name not in left_alone and not any(matches(p, name) for p in config.modules_to_not_convert or [])
    }
    if check and not chosen:
        raise InputError(
            f"{type(model).__name__} has no layer to convert: its {len(linears)} layers of type torch.nn.Linear "
            "are all the head or named by modules_to_not_convert"
        )
    return chosen


def packed_layers(model: nn.Module) -> dict[str, GrinqhLinear]:
    """The model's packed layers by name.

    Raises:
        InputError: there are none.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, GrinqhLinear)}
    if not layers:
        raise InputError(f"{type(model).__name__} has no packed layers: call grinqh.quantize_model first")
    return layers


def model_config(model: nn.Module) -> GrinqhConfig:
    """The config that the model was converted with.

    Raises:
        InputError: the model was not converted.
    """
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    config = config if isinstance(config, GrinqhConfig) else getattr(model, _CONFIG_ATTRIBUTE, None)
    if not isinstance(config, GrinqhConfig):
        raise InputError(f"{type(model).__name__} records no GrinqhConfig: call grinqh.quantize_model first")
    return config


def stored_bits(model: nn.Module) -> float:
    """Mean bits per weight in the planes of the packed layers; scales are not counted (see `packed_bytes`)."""
    layers = packed_layers(model).values()
    return weighted_mean(layers, [layer.stored_bits for layer in layers])


def weighted_mean(layers: Iterable[GrinqhLinear], values: Iterable[float]) -> float:
    """Mean of one value for each layer, over their weights."""
    weights = [layer.weights for layer in layers]
    return sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)


def packed_bytes(model: nn.Module) -> int:
    """Bytes of all tensors of the packed layers, scales, tables and biases included."""
    return sum(layer_bytes(layer) for layer in packed_layers(model).values())


def layer_bytes(layer: GrinqhLinear) -> int:
    """Bytes of all tensors of one packed layer."""
    return sum(tensor.numel() * tensor.element_size() for tensor in layer.parameters())


@contextmanager
def graded(model: nn.Module) -> Iterator[None]:
    """Within it every row is graded on its own, however many rows an input has: prefill reads as decoding does."""
    layers = packed_layers(model).values()
    before = [layer.max_graded_rows for layer in layers]
    for layer in layers:
        layer.max_graded_rows = UNLIMITED_ROWS
    try:
        yield
    finally:
        for layer, rows in zip(layers, before, strict=True):
            layer.max_graded_rows = rows


@dataclass(frozen=True)
class ReadStats:
    """What graded rows read since counting began."""

    read_bits: float  # mean bits per weight, over rows and weights
    layers: dict[str, float]  # the same of each layer that saw a row


@dataclass(frozen=True)
class TokenReads:
    """What single tokens read: graded rows, oldest first."""

    read_bits: Tensor  # float64 [rows]: mean bits per weight, over weights
    layers: dict[str, Tensor]  # float64 [rows]: the same of each layer that saw a row


def count_reads(model: nn.Module, enabled: bool = True, *, keep_tokens: int = 0) -> None:
    """Switches the counting of read bits on or off.

    Counts are summed on the layers' device. Only graded rows count: prefill, which reads everything, does not.

    Args:
        model: a converted model.
        enabled: whether to count; what was counted stays when counting stops.
        keep_tokens: if above 0, counting begins anew and the bits of so many of the last rows are kept one by one,
            for `token_reads`: 4 bytes a row in each layer, on its device.

    Raises:
        InputError: `keep_tokens` is no integer of at least 0, or the model has no packed layers.
    """
    if not isinstance(keep_tokens, int) or isinstance(keep_tokens, bool) or keep_tokens < 0:
        raise InputError(f"keep_tokens is {keep_tokens!r}, must be an integer of at least 0")
    for layer in packed_layers(model).values():
        layer.count_reads = enabled
        if enabled and not keep_tokens:
            layer.read_log = None
        elif keep_tokens:
            layer.read_total.zero_()
            if layer.read_log is None or len(layer.read_log) != keep_tokens:
                layer.read_log = layer.thresholds.new_zeros(keep_tokens)


def read_stats(model: nn.Module) -> ReadStats:
    """Read bits since `count_reads` or `reset_read_stats`.

    Raises:
        InputError: nothing was counted.
    """
    layers = packed_layers(model)
    sums = {name: layer.read_total.tolist() for name, layer in layers.items()}
    bits = {name: total / rows for name, (total, rows) in sums.items() if rows > 0}
    if not bits:
        raise InputError("no rows were counted: call grinqh.count_reads(model) before running the model")
    return ReadStats(weighted_mean([layers[name] for name in bits], bits.values()), bits)


def token_reads(model: nn.Module) -> TokenReads:
    """Read bits of single rows since `count_reads(model, keep_tokens=..)` or `reset_read_stats`, on the CPU.

    These are the last `keep_tokens` rows if there were more. A step of a batch gives one row for each sequence, in
    their order. A converted output head sees only the last token of a prompt: its rows are paired with those of
    the other layers from the newest back, and older ones are left out.

    Raises:
        InputError: nothing was kept, or layers besides the head saw different rows (experts, say).
    """
    layers = packed_layers(model)
    kept = {name: layer.read_log for name, layer in layers.items() if layer.read_log is not None}
    counted = {name: int(layers[name].read_total[1]) for name in kept}
    counted = {name: rows for name, rows in counted.items() if rows > 0}
    if not counted:
        raise InputError("no rows were kept: call grinqh.count_reads(model, keep_tokens=..) before running the model")
    head = getattr(model, "get_output_embeddings", lambda: None)()
    seen = {rows: name for name, rows in counted.items() if layers[name] is not head}
    if len(seen) > 1:
        listed = ", ".join(f"{name} saw {rows}" for rows, name in seen.items())
        raise InputError(f"layers saw different numbers of rows, which have no mean row by row: {listed}")
    rows = min(min(rows, len(kept[name])) for name, rows in counted.items())
    bits = {name: kept[name][-rows:].to("cpu", torch.float64) for name in counted}
    weights = torch.tensor([layers[name].weights for name in bits], dtype=torch.float64)
    return TokenReads(weights @ torch.stack(list(bits.values())) / weights.sum(), bits)


def reset_read_stats(model: nn.Module) -> None:
    """Forgets what was counted."""
    for layer in packed_layers(model).values():
        layer.read_total.zero_()


def pack_weight(name: str, weight: Tensor, config: GrinqhConfig) -> packing.PackedTensors:
    """The tensors of the layer of that name, without its bias, on the weight's device (see `packing.pack_weight`)."""
    format, points = config.format(name), int(config.dial_grid[2])

    def pack() -> packing.PackedTensors:
        return packing.pack_weight(weight, format, name=f"{name}.weight", dial_points=points)

    tensors = resume.packed(name, tuple(weight.shape), format, points, pack)
    return {tensor: data.to(weight.device) for tensor, data in tensors.items()} if weight.is_cuda else tensors


def packed_layer(
    name: str, linear: nn.Linear, tensors: packing.PackedTensors, config: GrinqhConfig, device: torch.device
) -> GrinqhLinear:
    """The packed layer that takes a linear layer's place; what each grade loses is logged."""
    if linear.bias is not None:
        tensors["bias"] = linear.bias
    format, sections = config.format(name), sections_of(linear)
    if sections:  # until calibration tells them apart
        tensors["unit_thresholds"] = tensors["unit_thresholds"].repeat(len(sections), 1)
    layer = GrinqhLinear(tensors, format, config.max_graded_rows, sections).to(device)
    layer.train(linear.training)
    if logger.isEnabledFor(logging.INFO):
        loss = (layer.error / layer.error[0]).sqrt().tolist()
        grades = ", ".join(f"{bits} bits {part:.2%}" for bits, part in zip(format.grade_bits, loss, strict=True))
        logger.info("%s: %d x %d, relative weight error at %s", name, layer.out_features, layer.in_features, grades)
    return layer


def output_heads(model: nn.Module) -> set[str]:
    """Names of the output head and of linear layers that share their weight with another module."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find else None
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    tied_names = {name.removesuffix(".weight") for name in [*tied.keys(), *tied.values()]}
    shared = shared_weights(model)
    heads = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            is_shared = id(module.weight) in shared
            if module is head or name in tied_names or is_shared or name.rpartition(".")[2] == "lm_head":
                heads.add(name)
    return heads


def shared_weights(model: nn.Module) -> set[int]:
    """The `id` of each parameter that several modules share."""
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))
    return {parameter for parameter, modules in owners.items() if len(modules) > 1}


def log_untied(name: str, layer: GrinqhLinear) -> None:
    """Logs what it costs that a layer no longer shares its weight with another module."""
    logger.info("%s: untied, its packed weights take %s bytes of their own", name, f"{layer_bytes(layer):,}")


def record_config(model: nn.Module, config: GrinqhConfig) -> None:
    """Leaves the config where `model_config` and `save_pretrained` find it."""
    hf_config: Any = getattr(model, "config", None)
    if hf_config is None or not hasattr(hf_config, "save_pretrained"):
        setattr(model, _CONFIG_ATTRIBUTE, config)
        return
    hf_config.quantization_config = config
    hf_model: Any = model
    if isinstance(hf_model.get_output_embeddings(), GrinqhLinear):  # the head has weights of its own now
        hf_config.tie_word_embeddings = False
        hf_model.all_tied_weights_keys = {}
