"""Calibration: what a model's activations say about which channels and which layers need bits."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from tqdm import tqdm

from grinqh import grading, packing
from grinqh.compensation import Task, compensated
from grinqh.config import GrinqhConfig
from grinqh.dial import DialTable, dial_table, dial_taus, set_bits
from grinqh.errors import InputError
from grinqh.linear import GrinqhLinear
from grinqh.memory import trim_heap
from grinqh.model import model_config, packed_layers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# A layer on whose outputs the loss does not depend at all gets this part of the mean sensitivity.
LEAST_SENSITIVITY = 2.0**-20
LABEL_SEED = 0  # of the labels that the loss is taken with
SECOND_MOMENT_BYTES = 2 << 30  # of the layers that are rounded anew after one run over the text
TOGETHER_BYTES = 1 << 28  # of the weights, in float32, that are rounded together


@dataclass(frozen=True)
class CalibrationReport:
    """What calibration saw and recorded."""

    tokens: int
    sensitivity: dict[str, float]  # mean squared gradient of a token's loss by a layer's outputs; 1 if not measured
    stored_bits: dict[str, float]  # mean bits per weight that each layer keeps
    dial: DialTable


def calibrate(
    model: nn.Module,
    data: str | Sequence[str] | Tensor | Sequence[Tensor],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    sequence_length: int = 512,
    max_tokens: int = 8192,
    sensitivity: bool = True,
    compensate: bool = True,
    progress: bool = True,
) -> CalibrationReport:
    """Measures a converted model on a text, and records the dial in its layers, in place.

    The model runs over the text once with everything read, and back for the gradients: that gives each input
    channel's mean square, each layer's sensitivity, and how often each importance occurs. Then the dial is recorded and
    set to the config's read_bits. What `stored_bits` of the config leaves out is dropped before that: channels are put
    in order of importance, the unimportant ones lose their low bits, and the rest is rounded anew so that channels make
    up for each other's error (`grinqh.compensation`); for this the text is run twice more, or more often for a large
    model. It can be done again with another text.

    Args:
        model: a module converted by `quantize_model`, whose forward takes token ids [batch, length] and returns
            logits [batch, length, vocabulary], or an object with such `logits`.
        data: texts, cut into sequences of `sequence_length`; or token ids, int tensors [length] or [batch, length].
        tokenizer: of the model; needed for texts.
        sequence_length: tokens in a sequence, at least 2.
        max_tokens: at most about so many tokens are used, spread over the data.
        sensitivity: whether to share bits out among layers by the gradients; else one rule holds for all layers.
        compensate: whether to round anew what `stored_bits` leaves of a layer that stored everything; else low bits
            are cut off.
        progress: whether to show a progress bar on stderr (only if that is a terminal).

    Raises:
        InputError: data that is empty, of another type or without its tokenizer; activations or gradients that are
            NaN or infinite, by the layer's name; a model that is shared out among processes. The model is then
            unchanged.

    Source: docs/method.md, after arXiv 2606.23419.
    """
    config, layers = model_config(model), packed_layers(model)
    if any(layer.sharded for layer in layers.values()):
        raise InputError("the model is shared out among processes: calibrate it before grinqh.tensor_parallel")
    batches = token_batches(data, tokenizer, sequence_length, max_tokens)

    observed = _observe(model, layers, batches, gradients=sensitivity, progress=progress)
    seen = {name: statistics for name, statistics in observed.items() if statistics.rows > 0}
    for name in layers.keys() - seen.keys():
        logger.warning("%s saw no token of the calibration data: it will read everything, whatever the dial says", name)
    if not seen:
        raise InputError("no packed layer saw a token of the calibration data")
    if sensitivity:
        sensitivities = _sensitivities(seen)
    else:
        sensitivities = {name: [1.0] * len(_outputs_of_sections(layers[name])) for name in seen}

    units, section_units = {}, {}
    for name in seen:
        units[name], section_units[name] = _unit_thresholds(layers[name], sensitivities[name])
    kept = _kept_channels(config, layers, units, {name: statistics.mean_square for name, statistics in seen.items()})
    for name in kept:
        _sort_by_importance(layers[name], seen[name].mean_square)
        trim_heap()  # every tensor of the layer has been replaced by one in another place
    if kept:
        _drop_channels(model, layers, batches, kept, compensate=compensate, progress=progress)
        observed = _observe(model, layers, batches, gradients=False, progress=progress)

    _record_dial(config, layers, section_units, observed)
    set_bits(model, config.read_bits, exact_budget=config.exact_budget)
    return CalibrationReport(
        tokens=sum(batch.numel() for batch in batches),
        sensitivity={
            name: _mean(layers[name], sensitivities[name]) if name in sensitivities else 0.0 for name in layers
        },
        stored_bits={name: layer.stored_bits for name, layer in layers.items()},
        dial=dial_table(model),
    )


def record_dial(
    model: nn.Module,
    data: str | Sequence[str] | Tensor | Sequence[Tensor],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    sequence_length: int = 512,
    max_tokens: int = 8192,
    progress: bool = True,
) -> DialTable:
    """Records the dial of a calibrated model anew, in place, for text of another kind than calibration's.

    The model runs over the text once with everything read. What layers and channels are worth, and so how bits are
    shared out among them, stays as it was; only the bits that each setting reads are counted again. The dial is then
    set to the same bits as before. A layer that sees no token keeps its record.

    Args:
        model: a model that `calibrate` has been called with.
        data: texts or token ids, as for `calibrate`.
        tokenizer: of the model; needed for texts.
        sequence_length: tokens in a sequence, at least 2.
        max_tokens: at most about so many tokens are used, spread over the data.
        progress: whether to show a progress bar on stderr (only if that is a terminal).

    Returns:
        The new record.

    Raises:
        InputError: the model is not calibrated, or what `calibrate` raises. The model is then unchanged.
    """
    config, layers = model_config(model), packed_layers(model)
    if any(layer.sharded for layer in layers.values()):
        raise InputError("the model is shared out among processes: record its dial before grinqh.tensor_parallel")
    dial_table(model)  # raises where there is none
    batches = token_batches(data, tokenizer, sequence_length, max_tokens)
    calibrated = {name: layer for name, layer in layers.items() if layer.calibrated}
    observed = _observe(model, calibrated, batches, gradients=False, progress=progress)
    for name, statistics in observed.items():
        if statistics.rows > 0:
            layer = calibrated[name]
            layer.dial.copy_(_shares(layer, statistics, layer.unit_thresholds.cpu(), dial_taus(config)))
    set_bits(model, config.read_bits, exact_budget=config.exact_budget)
    return dial_table(model)


def token_batches(data: Any, tokenizer: Any, sequence_length: int, max_tokens: int) -> list[Tensor]:
    """The calibration data as batches of token ids [batch, length]."""
    if sequence_length < 2:
        raise InputError(f"sequence_length is {sequence_length}, must be at least 2")
    if max_tokens < 2:
        raise InputError(f"max_tokens is {max_tokens}, must be at least 2")
    items: list[Any] = [data] if isinstance(data, str | Tensor) else list(data)
    if items and all(isinstance(item, str) for item in items):
        if tokenizer is None:
            raise InputError("calibrate was given texts but no tokenizer")
        batches = _tokenize(items, tokenizer, sequence_length)
    else:
        batches = [_check_ids(item) for item in items]
    if not batches:
        raise InputError("the calibration data is empty, must hold at least one sequence of 2 tokens")
    mean_tokens = sum(batch.numel() for batch in batches) / len(batches)
    count = min(len(batches), max(1, round(max_tokens / mean_tokens)))
    return [batches[i * len(batches) // count] for i in range(count)]


def _tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> list[Tensor]:
    from grinqh.evaluate import token_windows

    sequences: list[Tensor] = []
    for text in texts:
        try:
            sequences += token_windows(tokenizer, text, sequence_length).ids[:, None]
        except InputError:  # a text of less than 2 tokens teaches nothing
            continue
    return sequences


def _check_ids(ids: Any) -> Tensor:
    if not isinstance(ids, Tensor):
        raise InputError(f"the calibration data holds a {type(ids).__name__}, must be texts or tensors of token ids")
    if ids.dtype not in (torch.int32, torch.int64) or ids.ndim not in (1, 2) or ids.numel() == 0 or ids.shape[-1] < 2:
        raise InputError(
            f"token ids are {ids.dtype} {list(ids.shape)}, must be int64 or int32, [length] or [batch, length >= 2]"
        )
    return ids if ids.ndim == 2 else ids[None]


class _Statistics:
    """Sums over the rows that one layer saw."""

    def __init__(self, layer: GrinqhLinear) -> None:
        self.layer = layer
        self.rows = 0
        self.square_sum = torch.zeros(layer.in_features, dtype=torch.float64)
        self.gradient_square_sums = [0.0 for _ in _outputs_of_sections(layer)]
        self.gradients = 0  # rows of them
        # For each number of stored channels, the importances of those channels.
        self.histograms: dict[int, Tensor] = {}

    @property
    def mean_square(self) -> Tensor:
        """Mean of x_j^2, float64 [K], by input feature."""
        return self.square_sum / self.rows

    def see_input(self, x: Tensor) -> None:
        rows = x.detach().reshape(-1, self.layer.in_features).float()
        self.rows += rows.shape[0]
        self.square_sum += rows.square().sum(0).cpu()
        importance = rows.abs().index_select(1, self.layer.channel_order) * self.layer.channel_weight
        for channels in set(self.layer.stored_channels):
            counted = grading.importance_histogram(importance[:, :channels]).cpu()
            self.histograms[channels] = self.histograms.get(channels, 0) + counted

    def see_gradient(self, gradient: Tensor) -> None:
        rows = gradient.reshape(-1, self.layer.out_features).float()
        by_output = rows.square().sum(0).double()  # in an order that the number of threads does not change
        parts = [part.sum() for part in by_output.split(_outputs_of_sections(self.layer))]
        for section, square_sum in enumerate(torch.stack(parts).tolist()):
            self.gradient_square_sums[section] += square_sum
        self.gradients += rows.shape[0]


def _observe(
    model: nn.Module, layers: Mapping[str, GrinqhLinear], batches: Sequence[Tensor], *, gradients: bool, progress: bool
) -> dict[str, _Statistics]:
    """Runs the model over the batches with everything read, and returns what each layer saw."""
    statistics = {name: _Statistics(layer) for name, layer in layers.items()}
    labels = torch.Generator(next(model.parameters()).device).manual_seed(LABEL_SEED)
    with ExitStack() as stack:
        stack.enter_context(_reading_everything(layers))
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.set_grad_enabled(gradients))
        for name, layer in layers.items():
            for handle in _hooks(layer, statistics[name], gradients):
                stack.callback(handle.remove)
        for ids, output in outputs_for(model, batches, progress):
            if gradients:
                _loss(output, ids, labels).backward()
    for name, seen in statistics.items():
        if any(grading.has_invalid(histogram) for histogram in seen.histograms.values()):
            raise InputError(f"{name} saw activations that are NaN or infinite on the calibration data")
    for name, seen in statistics.items():
        if not all(map(math.isfinite, seen.gradient_square_sums)):
            raise InputError(f"the gradients of {name} are NaN or infinite on the calibration data")
    return statistics


def outputs_for(
    model: nn.Module, batches: Sequence[Tensor], progress: bool, what: str = "calibrate"
) -> Iterator[tuple[Tensor, Any]]:
    """Runs the model: each batch's token ids, on the model's device, and what it returns for them."""
    device = next(model.parameters()).device
    for ids in tqdm(batches, desc=what, unit="batch", file=sys.stderr, disable=None if progress else True):
        ids = ids.to(device)
        yield ids, model(ids)


def _loss(output: Any, ids: Tensor, generator: torch.Generator) -> Tensor:
    """Cross entropy of next tokens drawn from the model's own predictions, summed over positions.

    Its mean squared gradient is then the Fisher information, which says how far the predictions move (in KL divergence)
    when a layer's outputs do. The text's own next tokens would weigh what the model gets wrong, most of all in early
    layers. A mean over positions would make gradients shrink with the sequence's length.
    """
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != ids.shape:
        raise InputError(
            "the model returns no logits [batch, length, vocabulary]: calibrate(..., sensitivity=False) needs none"
        )
    if not logits.requires_grad:
        raise InputError("the model's logits do not depend on any packed layer")
    predictions = logits.float().flatten(0, 1)
    # What is not finite is refused by the layer's name, later.
    probabilities = predictions.detach().softmax(-1).nan_to_num(1.0)
    drawn = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
    return functional.cross_entropy(predictions, drawn, reduction="sum")


def _hooks(layer: GrinqhLinear, seen: _Statistics, gradients: bool) -> Iterator[Any]:
    yield layer.register_forward_pre_hook(lambda _, arguments: seen.see_input(arguments[0]))

    def watch(_: nn.Module, __: Any, y: Tensor) -> Tensor:
        # No parameter requires a gradient, so the graph begins at the first layer's output.
        y = y if y.requires_grad else y.detach().requires_grad_()
        y.register_hook(seen.see_gradient)
        return y

    if gradients:
        yield layer.register_forward_hook(watch)


@contextmanager
def _reading_everything(layers: Mapping[str, GrinqhLinear]) -> Iterator[None]:
    before = [(layer, layer.thresholds, layer.budget, layer.count_reads) for layer in layers.values()]
    for layer in layers.values():
        layer.thresholds, layer.budget, layer.count_reads = torch.zeros_like(layer.thresholds), None, False
    try:
        yield
    finally:
        for layer, thresholds, budget, count_reads in before:
            layer.thresholds, layer.budget, layer.count_reads = thresholds, budget, count_reads


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, with no parameter's gradient computed."""
    training = [module for module in model.modules() if module.training]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


def _sensitivities(seen: Mapping[str, _Statistics]) -> dict[str, list[float]]:
    """The mean squared gradient by the outputs of each section of each layer."""
    measured = {
        name: [
            squares / max(s.gradients * outputs, 1)
            for squares, outputs in zip(s.gradient_square_sums, _outputs_of_sections(s.layer), strict=True)
        ]
        for name, s in seen.items()
    }
    mean = sum(_mean(seen[name].layer, values) for name, values in measured.items()) / len(measured)
    if mean == 0:
        raise InputError("the loss does not depend on any packed layer: calibrate(..., sensitivity=False) goes without")
    return {name: [max(value, LEAST_SENSITIVITY * mean) for value in values] for name, values in measured.items()}


def _outputs_of_sections(layer: GrinqhLinear) -> list[int]:
    return layer.sections or [layer.out_features]


def _mean(layer: GrinqhLinear, by_section: Sequence[float]) -> float:
    """The mean over a layer's outputs of what is known by section."""
    outputs = _outputs_of_sections(layer)
    return sum(value * n for value, n in zip(by_section, outputs, strict=True)) / layer.out_features


def _unit_thresholds(layer: GrinqhLinear, sensitivities: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Unit thresholds of a layer as a whole, [G], and as `unit_thresholds` of the layer has them.

    An error of weights is in proportion to their scales, at every grade alike, so a section's is the layer's times the
    ratio of their mean squared scales.
    """
    weighed = [s * ratio for s, ratio in zip(sensitivities, _section_errors(layer), strict=True)]
    bits, error = layer.format.grade_bits, layer.error
    whole = grading.unit_thresholds(bits, error, _mean(layer, weighed))
    if not layer.sections:
        return whole, whole
    return whole, torch.stack([grading.unit_thresholds(bits, error, s) for s in weighed])


def _section_errors(layer: GrinqhLinear) -> list[float]:
    """The mean squared weight error of each section over the layer's."""
    if not layer.sections:
        return [1.0]
    tensors = layer.tensors
    by_block = tensors["block_scale"].float().square().mean(0).double()
    by_output = by_block.repeat_interleave(layer.format.block)[: layer.out_features]
    squares = by_output * tensors["row_scale"].double().square()
    mean = float(squares.mean())
    return [
        max(float(part.mean()) / mean, LEAST_SENSITIVITY) if mean > 0 else 1.0 for part in squares.split(layer.sections)
    ]


def _sort_by_importance(layer: GrinqhLinear, mean_square: Tensor) -> None:
    """Puts channels that are stored in equally many planes in order of mean square times column energy."""
    by_feature = torch.ops.grinqh.sort_channels(layer.dense().T.contiguous(), mean_square.float().to(layer.gain.device))
    rank = by_feature.argsort()[layer.channel_order]
    layer.set_packed(packing.sort_channels(layer.tensors, rank), layer.format)


def _kept_channels(
    config: GrinqhConfig,
    layers: Mapping[str, GrinqhLinear],
    units: Mapping[str, Tensor],
    mean_square: Mapping[str, Tensor],
) -> dict[str, list[int]]:
    """How many channels each layer that drops any keeps in its planes, for the stored bits that the config asks for.

    A channel whose root mean square importance would be graded below a plane is not stored in it, with one dial
    setting for the whole model; a layer with an override of its own has its own setting. The first plane stays whole.
    """
    together = {name for name in units if config.layer_stored_bits(name) is None}
    targets = [({name}, config.layer_stored_bits(name)) for name in units.keys() - together]
    kept: dict[str, list[int]] = {}
    for names, target in [(together, config.stored_bits), *targets]:
        if names and target is not None:
            rms = {name: _stored_rms(layers[name], mean_square[name]) for name in names}
            kept |= _stored_channels({name: layers[name] for name in names}, units, rms, target)
    return {name: stored for name, stored in kept.items() if stored != layers[name].stored_channels}


def _drop_channels(
    model: nn.Module,
    layers: Mapping[str, GrinqhLinear],
    batches: Sequence[Tensor],
    kept: Mapping[str, list[int]],
    *,
    compensate: bool,
    progress: bool,
) -> None:
    """Keeps in each plane so many channels; a layer that stored everything is rounded anew if `compensate`."""
    whole = {name: layers[name] for name in kept if compensate and layers[name].stores_everything}
    sizes = {name: 4 * layer.in_features**2 for name, layer in whole.items()}
    quiet = None if whole and progress else True
    with tqdm(total=len(whole), desc="round anew", unit="layer", file=sys.stderr, disable=quiet) as steps:
        for group in _groups_within(SECOND_MOMENT_BYTES, sizes):
            moments = _second_moments(model, layers, group, batches, progress=progress)
            for names in _alike(layers, group):
                tasks = [Task(layers[name], moments.pop(name), kept[name]) for name in names]
                for task, tensors in zip(tasks, compensated(tasks), strict=True):
                    task.layer.set_packed(tensors, task.layer.format)
                steps.update(len(names))
    for name in kept:
        layer = layers[name]
        tensors = layer.tensors if name in whole else packing.keep_channels(layer.tensors, kept[name])
        # In the order of features what a product reads of x lies together.
        layer.set_packed(packing.sort_channels(tensors, tensors["channel_order"]), layer.format)


def _alike(layers: Mapping[str, GrinqhLinear], names: Sequence[str]) -> Iterator[list[str]]:
    """The names in groups of one shape and format, as many as may be rounded together."""
    by_shape: dict[Any, list[str]] = {}
    for name in names:
        layer = layers[name]
        by_shape.setdefault((layer.in_features, layer.out_features, layer.format), []).append(name)
    for alike in by_shape.values():
        yield from _groups_within(TOGETHER_BYTES, {name: 4 * layers[name].weights for name in alike})


def _groups_within(most_bytes: int, sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Names in groups of so many bytes at most, but of at least one each."""
    group: list[str] = []
    taken = 0
    for name, size in sizes.items():
        if group and taken + size > most_bytes:
            yield group
            group, taken = [], 0
        group.append(name)
        taken += size
    if group:
        yield group


def _second_moments(
    model: nn.Module,
    layers: Mapping[str, GrinqhLinear],
    names: Sequence[str],
    batches: Sequence[Tensor],
    *,
    progress: bool,
) -> dict[str, Tensor]:
    """The mean of x x^T of the named layers' inputs, float32 [K, K], with everything read."""
    moments = {name: layers[name].gain.new_zeros((layers[name].in_features,) * 2) for name in names}
    rows = dict.fromkeys(names, 0)

    def see(name: str, x: Tensor) -> None:
        inputs = x.detach().reshape(-1, x.shape[-1]).float()
        moments[name].addmm_(inputs.T, inputs)
        rows[name] += inputs.shape[0]

    with ExitStack() as stack:
        stack.enter_context(_reading_everything(layers))
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        for name in names:
            hook = layers[name].register_forward_pre_hook(lambda _, arguments, name=name: see(name, arguments[0]))
            stack.callback(hook.remove)
        for _ in outputs_for(model, batches, progress):
            pass
    for name, moment in moments.items():
        moment /= max(rows[name], 1)
    return moments


def _stored_rms(layer: GrinqhLinear, mean_square: Tensor) -> Tensor:
    order = layer.channel_order.long().cpu()
    return mean_square[order].sqrt() * layer.channel_weight.cpu()


def _stored_channels(
    layers: Mapping[str, GrinqhLinear], units: Mapping[str, Tensor], rms: Mapping[str, Tensor], target: float
) -> dict[str, list[int]]:
    """Channels to store in each plane of each layer, for mean stored bits of at most (and nearly) the target."""
    weights = sum(layer.weights for layer in layers.values())

    def choose(tau: float) -> dict[str, list[int]]:
        chosen = {}
        for name, layer in layers.items():
            important = [int((rms[name] >= tau * unit).sum()) for unit in units[name].double().tolist()]
            important[0] = layer.in_features
            chosen[name] = [min(pair) for pair in zip(important, layer.stored_channels, strict=True)]
        return chosen

    def bits(chosen: Mapping[str, list[int]]) -> float:
        total = 0
        for name, layer in layers.items():
            kept = zip(layer.format.plane_widths, chosen[name], strict=True)
            total += layer.out_features * sum(width * channels for width, channels in kept)
        return total / weights

    everything = {name: layer.stored_channels for name, layer in layers.items()}
    if bits(everything) <= target:
        return everything
    low, high = -128.0, 128.0  # log2 of tau; too many bits at low
    for _ in range(48):
        middle = (low + high) / 2
        low, high = (low, middle) if bits(choose(2.0**middle)) <= target else (middle, high)
    return choose(2.0**high)


def _shares(layer: GrinqhLinear, statistics: _Statistics, units: Tensor, taus: Tensor) -> Tensor:
    """The part of the weights of each plane that is read at each setting, [planes, T]."""
    stored = [channels / layer.in_features for channels in layer.stored_channels]
    by_plane = [statistics.histograms[channels] for channels in layer.stored_channels]
    shares = [
        grading.read_shares(by_plane, stored, of_section, taus.float()) * (outputs / layer.out_features)
        for of_section, outputs in zip(units.view(-1, layer.format.planes), _outputs_of_sections(layer), strict=True)
    ]
    return torch.stack(shares).sum(0)


def _record_dial(
    config: GrinqhConfig,
    layers: Mapping[str, GrinqhLinear],
    units: Mapping[str, Tensor],
    observed: Mapping[str, _Statistics],
) -> None:
    """Writes unit thresholds and dials.

    Unit thresholds are scaled by one number, so that the middle of the dial's grid reads about half the stored bits.
    """
    wide = 2.0 ** torch.arange(-100.0, 100.0, 0.5, dtype=torch.float64)
    read = torch.zeros_like(wide)
    for name, unit in units.items():
        layer = layers[name]
        widths = torch.tensor(layer.format.plane_widths, dtype=torch.float64)
        shares = _shares(layer, observed[name], unit, wide)
        read += layer.out_features * layer.in_features * (widths @ shares.double())
    half = sum(layers[name].stored_bits * layers[name].weights for name in units) / 2
    taus = dial_taus(config)
    scale = float(wide[int((read - half).abs().argmin())] / taus[len(taus) // 2])

    for name, layer in layers.items():
        if name in units:
            layer.unit_thresholds.copy_(units[name] * scale)
            layer.dial.copy_(_shares(layer, observed[name], units[name] * scale, taus))
        else:
            layer.dial.fill_(torch.nan)
