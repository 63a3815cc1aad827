"""The dial: how many bits a model reads for each token, set at run time.

Calibration records, for every layer, what it reads at each of a grid of settings tau. A target of mean read bits is
turned into a tau by interpolation, and every layer's thresholds become `tau * unit_thresholds`, written in place.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from grinqh.config import GrinqhConfig, ReadBits, check_patterns, check_read_bits, matches
from grinqh.errors import InputError
from grinqh.linear import GrinqhLinear
from grinqh.model import model_config, packed_layers, read_stats, weighted_mean

logger = logging.getLogger(__name__)

MOST_DRIFT = 0.1  # of the promised bits, before `dial_drift` warns


@dataclass(frozen=True)
class DialTable:
    """Mean read bits at each recorded setting of the dial."""

    tau: Tensor  # float64 [T], rising
    read_bits: Tensor  # float64 [T], of all layers together, never rising
    layers: dict[str, Tensor]  # float64 [T], of each layer


@dataclass(frozen=True)
class LayerDial:
    """A setting of the dial in one layer."""

    thresholds: Tensor  # float32 [G], on the layer's device
    read_bits: float  # that calibration recorded for them
    exact: bool  # whether no row may exceed these; else the thresholds alone decide

    @property
    def budget(self) -> float | None:
        """Read bits that no row may exceed, or None."""
        return self.read_bits if self.exact else None


@dataclass(frozen=True)
class DialDrift:
    """What was read, and what the dial promises for text like that of calibration."""

    read_bits: float  # mean bits per weight that were read
    expected_bits: float  # that the dial promises
    layers: dict[str, float]  # of each layer: read bits less promised bits

    @property
    def drift(self) -> float:
        """Read over promised bits, less 1."""
        return self.read_bits / self.expected_bits - 1


def dial_taus(config: GrinqhConfig) -> Tensor:
    """The settings at which the dial is recorded, float64 [T]."""
    first, step, points = config.dial_grid
    return 2.0 ** (first + step * torch.arange(int(points), dtype=torch.float64))


def dial_table(model: nn.Module) -> DialTable:
    """What calibration recorded.

    Raises:
        InputError: the model was not converted or not calibrated.
    """
    layers = _calibrated(packed_layers(model))
    bits = {name: _layer_bits(layer) for name, layer in layers.items()}
    return DialTable(dial_taus(model_config(model)), _mean_bits(layers, bits), bits)


def set_bits(model: nn.Module, read_bits: ReadBits, *, exact_budget: bool = False) -> None:
    """Sets how many bits per weight a token reads, in place and without recompilation.

    Layers that no token of the calibration data reached have no dial: they read everything, and do not count.

    Args:
        model: a calibrated model.
        read_bits: mean over the weights of the packed layers and over tokens like those of calibration; in (0, 8].
            Layers share it out by their sensitivity. At the stored bits or above, everything is read. A dict sets
            layers by name pattern (see `grinqh.config.matches`): each entry is applied in its order to all the layers
            that it matches, and what was set before holds for the others.
        exact_budget: whether every token keeps to the budget in every layer. Otherwise it is met on average, and
            hard tokens read more than easy ones, which is better at equal bits.

    Raises:
        InputError: a value out of range, a pattern that matches nothing, a model that is not calibrated, or an exact
            budget for one that is shared out among processes; the dial is then unchanged.
    """
    config = model_config(model)
    recorded, settings = dial_settings(model, read_bits, exact_budget=exact_budget)
    _turn(packed_layers(model), settings)
    config.read_bits, config.exact_budget = recorded, exact_budget


def dial_settings(
    model: nn.Module, read_bits: ReadBits, *, exact_budget: bool = False
) -> tuple[ReadBits, dict[str, LayerDial]]:
    """What `set_bits` would set: the read bits that the config then records, and the dials of layers by name.

    Raises:
        InputError: as `set_bits`.
    """
    config, layers = model_config(model), _calibrated(packed_layers(model))
    if exact_budget and any(layer.sharded for layer in layers.values()):
        raise InputError("exact_budget is True, must be False for a model that is shared out among processes")
    check_read_bits(read_bits)
    if isinstance(read_bits, Mapping):
        check_patterns("read_bits", read_bits, layers)
        before = config.read_bits if isinstance(config.read_bits, Mapping) else {"*": config.read_bits}
        read_bits = {pattern: bits for pattern, bits in before.items() if pattern not in read_bits} | dict(read_bits)
    return read_bits, _settings(layers, dial_taus(config), read_bits, exact_budget)


def dial_drift(model: nn.Module) -> DialDrift:
    """Compares what was read since `count_reads` or `reset_read_stats` with what the dial promises.

    On text unlike that of calibration, activations are larger or smaller than the dial was recorded with. A drift of
    more than a tenth is logged as a warning; `grinqh.record_dial` with text of the new kind takes it away.

    Args:
        model: a calibrated model that counted graded rows, its dial not turned meanwhile.

    Raises:
        InputError: nothing was counted, or the model is not calibrated.
    """
    config, layers = model_config(model), _calibrated(packed_layers(model))
    counted = {name: bits for name, bits in read_stats(model).layers.items() if name in layers}
    if not counted:
        raise InputError("none of the layers that counted rows is calibrated")
    settings = _settings(layers, dial_taus(config), config.read_bits, config.exact_budget)
    expected = {name: settings[name].read_bits for name in counted}
    of_counted = [layers[name] for name in counted]
    found = DialDrift(
        weighted_mean(of_counted, counted.values()),
        weighted_mean(of_counted, expected.values()),
        {name: bits - expected[name] for name, bits in counted.items()},
    )
    if abs(found.drift) > MOST_DRIFT:
        logger.warning(
            "%.2f bits were read where the dial promises %.2f: call grinqh.record_dial with text of this kind",
            found.read_bits,
            found.expected_bits,
        )
    return found


def restore_dial(model: nn.Module) -> None:
    """Sets the dial of a newly loaded model as its config says; without calibration, everything is read."""
    config, layers = model_config(model), packed_layers(model)
    for layer in layers.values():
        layer.reset_buffers()
        layer.max_graded_rows = config.max_graded_rows
    if any(layer.calibrated for layer in layers.values()):
        _turn(layers, _settings(_calibrated(layers), dial_taus(config), config.read_bits, config.exact_budget))
    else:
        logger.warning("the model is not calibrated: every token reads all stored bits (see grinqh.calibrate)")


def _calibrated(layers: Mapping[str, GrinqhLinear]) -> dict[str, GrinqhLinear]:
    calibrated = {name: layer for name, layer in layers.items() if layer.calibrated}
    if not calibrated:
        raise InputError("the model has no dial yet: call grinqh.calibrate(model, texts, tokenizer) first")
    return calibrated


def _turn(layers: Mapping[str, GrinqhLinear], settings: Mapping[str, LayerDial]) -> None:
    for name, dial in settings.items():
        layers[name].set_thresholds(dial.thresholds)
        layers[name].set_budget(dial.budget)


def _settings(
    layers: Mapping[str, GrinqhLinear], taus: Tensor, read_bits: ReadBits, exact_budget: bool
) -> dict[str, LayerDial]:
    by_pattern = read_bits if isinstance(read_bits, Mapping) else {"*": read_bits}
    bits = {name: _layer_bits(layer) for name, layer in layers.items()}
    chosen: dict[str, float] = {}
    for pattern, target in by_pattern.items():
        group = {name: layer for name, layer in layers.items() if matches(pattern, name)}
        if group:
            stored = weighted_mean(group.values(), [layer.stored_bits for layer in group.values()])
            chosen |= dict.fromkeys(group, _tau(target, taus, _mean_bits(group, bits), stored))
    settings: dict[str, LayerDial] = {}
    for name, tau in chosen.items():
        layer = layers[name]
        # Not 0 * unit_thresholds: infinity is among them.
        thresholds = layer.unit_thresholds.detach() * tau if tau > 0 else torch.zeros_like(layer.thresholds)
        read = _interpolate(math.log2(tau), taus.log2(), bits[name]) if tau > 0 else layer.stored_bits
        settings[name] = LayerDial(thresholds, read, exact_budget)
    return settings


def _tau(target: float, taus: Tensor, read_bits: Tensor, stored_bits: float) -> float:
    """The setting at which so many bits are read; 0, which reads everything, from the first entry's bits on."""
    if target >= min(stored_bits, float(read_bits[0])):
        return 0.0
    if target < read_bits[-1]:
        raise InputError(f"read_bits is {target}, must be at least {float(read_bits[-1]):.3g}, the least recorded")
    return 2.0 ** _interpolate(target, read_bits.flip(0), taus.log2().flip(0))


def _interpolate(x: float, xs: Tensor, ys: Tensor) -> float:
    return float(np.interp(x, xs.numpy(), ys.numpy()))


def _layer_bits(layer: GrinqhLinear) -> Tensor:
    widths = torch.tensor(layer.format.plane_widths, dtype=torch.float64)
    return widths @ layer.dial.to("cpu", torch.float64)


def _mean_bits(layers: Mapping[str, GrinqhLinear], bits: Mapping[str, Tensor]) -> Tensor:
    weights = torch.tensor([layer.weights for layer in layers.values()], dtype=torch.float64)
    return weights @ torch.stack([bits[name] for name in layers]) / weights.sum()
