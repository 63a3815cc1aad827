"""What a conversion is asked for and what a saved model records: `GrinqhConfig`."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Any

from grinqh.defaults import GRADED_ROWS
from grinqh.errors import InputError

try:
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError:  # transformers is optional: the class is then a plain one

    class QuantizationConfigMixin:  # type: ignore[no-redef]
        """Stands in where transformers is not installed."""


QUANT_METHOD = "grinqh"
FORMAT_VERSION = 1  # kFormatVersion of format.h
CODE_BITS = 8

ReadBits = float | Mapping[str, float]

_OVERRIDABLE = ("plane_widths", "block", "stored_bits")


def matches(pattern: str, name: str) -> bool:
    """Whether a module's dotted name is meant by a pattern.

    A pattern is a shell-style wildcard (`*`, `?`, `[..]`) for the whole name or for its last parts: `down_proj`,
    `mlp.*_proj` and `model.layers.0.*` all mean `model.layers.0.mlp.down_proj`.
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def check_patterns(argument: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    """Raises InputError for a pattern that means none of the names."""
    names = list(names)
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            raise InputError(
                f"{argument}: the pattern {pattern!r} matches none of the model's {len(names)} linear layers"
            )


@dataclass(frozen=True)
class LayerFormat:
    """How the codes of one layer are laid out (format.h)."""

    plane_widths: tuple[int, ...]  # bits of each plane, most significant first
    block: int  # outputs that share a block scale

    @property
    def planes(self) -> int:
        """Planes, and grades above 0."""
        return len(self.plane_widths)

    @property
    def grade_bits(self) -> tuple[int, ...]:
        """Bits read at the grades 0..planes."""
        return tuple(accumulate(self.plane_widths, initial=0))

    def within(self, stored_bits: float | None) -> LayerFormat:
        """The format with only so many whole planes as fit into so many bits per weight; all for None."""
        if stored_bits is None:
            return self
        planes = sum(bits <= stored_bits for bits in self.grade_bits) - 1
        if planes < 1:
            raise InputError(
                f"stored_bits is {stored_bits}, must be at least {self.plane_widths[0]}, the first plane's bits"
            )
        return LayerFormat(self.plane_widths[:planes], self.block)


class GrinqhConfig(QuantizationConfigMixin):
    """Settings of a conversion; saved as `quantization_config` in a model's config.json.

    Args:
        plane_widths: bits of the planes that a weight's 8-bit code is cut into, most significant first; each 1, 2, 4
            or 8, at most 8 in all. The grades read 0, 1, 2, .. planes.
        block: outputs that share a scale: 32, 64 or 128.
        stored_bits: mean bits per weight to keep in memory, scales not counted; None keeps all. `calibrate` meets it
            by leaving out the low planes of rarely important channels. Given to `from_pretrained` for a converted
            model, it leaves out whole low planes, which are then never read from the disk.
        read_bits: mean bits per weight that a token reads: the dial's setting after loading, default 3. A number, or
            numbers by name pattern (see `grinqh.set_bits`).
        exact_budget: whether every token keeps to the budget, instead of tokens on average; default False.
        modules_to_not_convert: name patterns (see `grinqh.config.matches`) of linear layers to leave alone, besides
            the head; and of the experts of a mixture, which cannot be converted and are refused unless named here, by
            the parameter (`experts.down_proj`) or its module (`experts`).
        convert_lm_head: whether the output head is converted too. A head tied to the embeddings then gets weights of
            its own.
        overrides: other settings for some layers: {pattern: {"plane_widths" | "block" | "stored_bits": value}}; where
            several patterns match, the later wins.
        max_graded_rows: inputs of more rows than this (prefill) are read in full; default 8, what an H100 is faster
            with at 3 read bits.
        fuse: whether q_proj, k_proj and v_proj of one parent become one layer, `qkv_proj`, and gate_proj and up_proj
            become `gate_up_proj` (see `grinqh.fusion`): fewer and larger kernels. These are then the names that
            `set_bits`, `read_stats` and the saved file know. Layers named by `overrides` stay apart. Each projection
            keeps thresholds of its own (docs/method.md, "Sections"). Default False.
        format_version: version of the packed format.
        dial_grid: the dial settings at which each layer's read bits are recorded: log2 of the first, step, number.

    Raises:
        InputError: a value out of range, an unknown setting, or a format version newer than this package knows.
    """

    def __init__(
        self,
        plane_widths: Iterable[int] = (2, 2, 2, 2),
        block: int = 64,
        stored_bits: float | None = None,
        read_bits: ReadBits | None = None,
        exact_budget: bool | None = None,
        modules_to_not_convert: Iterable[str] | None = None,
        convert_lm_head: bool = False,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        max_graded_rows: int | None = None,
        fuse: bool = False,
        format_version: int = FORMAT_VERSION,
        dial_grid: Iterable[float] = (-20.0, 0.5, 64),
        **others: Any,
    ) -> None:
        if isinstance(format_version, int) and format_version > FORMAT_VERSION:
            raise InputError(
                f"format_version is {format_version}, must be at most {FORMAT_VERSION}: a newer grinqh wrote this model"
            )
        if others.pop("quant_method", QUANT_METHOD) != QUANT_METHOD or others:
            raise InputError(f"GrinqhConfig has no setting named {', '.join(map(repr, others or ['quant_method']))}")

        self.quant_method = QUANT_METHOD
        self.format_version = format_version
        self.plane_widths = tuple(plane_widths)
        self.block = block
        self.stored_bits = stored_bits
        self.read_bits: ReadBits = 3.0 if read_bits is None else read_bits
        self.exact_budget = bool(exact_budget)
        self.modules_to_not_convert = None if modules_to_not_convert is None else list(modules_to_not_convert)
        self.convert_lm_head = convert_lm_head
        self.overrides = {pattern: dict(settings) for pattern, settings in (overrides or {}).items()}
        self.max_graded_rows = GRADED_ROWS if max_graded_rows is None else max_graded_rows
        self.fuse = fuse
        self.dial_grid = tuple(dial_grid)

        # What from_pretrained(dir, quantization_config=GrinqhConfig(...)) may set over what the directory records.
        # stored_bits goes by another name: what is on the disk already meets the one recorded there.
        given = {
            "read_bits": read_bits,
            "exact_budget": exact_budget,
            "max_graded_rows": max_graded_rows,
            "stored_bits_to_load": stored_bits,
        }
        self._loading_attributes = {name: value for name, value in given.items() if value is not None}
        self.stored_bits_to_load: float | None = None  # not recorded
        self._check()

    def _check(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise InputError(f"format_version is {self.format_version!r}, must be {FORMAT_VERSION}")
        for pattern, settings in self.overrides.items():
            for unknown in settings.keys() - set(_OVERRIDABLE):
                raise InputError(f"overrides[{pattern!r}] sets {unknown!r}, may set {', '.join(_OVERRIDABLE)}")
        for name in ["", *self.overrides]:
            where = f"overrides[{name!r}]: " if name else ""
            widths, block = self.format(name).plane_widths, self.format(name).block
            if not widths or any(width not in (1, 2, 4, 8) for width in widths) or sum(widths) > CODE_BITS:
                raise InputError(
                    f"{where}plane_widths is {widths}, must be widths of 1, 2, 4 or 8, at most {CODE_BITS} bits in all"
                )
            if block not in (32, 64, 128):
                raise InputError(f"{where}block is {block!r}, must be 32, 64 or 128")
            stored_bits = self.layer_stored_bits(name) if name else self.stored_bits
            if stored_bits is not None:
                _check_bits(f"{where}stored_bits", stored_bits, least=widths[0])
        check_read_bits(self.read_bits)
        if not isinstance(self.max_graded_rows, int) or self.max_graded_rows < 0:
            raise InputError(f"max_graded_rows is {self.max_graded_rows!r}, must be an integer of at least 0")
        if not isinstance(self.fuse, bool):
            raise InputError(f"fuse is {self.fuse!r}, must be True or False")
        first, step, points = self.dial_grid if len(self.dial_grid) == 3 else (math.nan, 0, 0)
        if not (math.isfinite(first) and step > 0 and points >= 2 and points == int(points)):
            raise InputError(
                f"dial_grid is {self.dial_grid}, must be (log2 of the first setting, step > 0, number >= 2)"
            )

    def format(self, name: str = "") -> LayerFormat:
        """Layout of the layer of this name."""
        settings: dict[str, Any] = {"plane_widths": self.plane_widths, "block": self.block}
        settings |= {key: value for key, value in self._overrides_of(name).items() if key in settings}
        return LayerFormat(tuple(settings["plane_widths"]), settings["block"])

    def layer_stored_bits(self, name: str) -> float | None:
        """The stored bits that an override asks of this layer alone, or None."""
        stored_bits: float | None = self._overrides_of(name).get("stored_bits")
        return stored_bits

    def _overrides_of(self, name: str) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for pattern, settings in self.overrides.items():
            if name == pattern or matches(pattern, name):
                merged |= settings
        return merged

    def keep_planes(self, stored_bits: float | None) -> None:
        """Records that every layer keeps only the whole planes that fit into so many bits per weight."""
        for settings in [self.__dict__, *self.overrides.values()]:
            if "plane_widths" in settings:
                widths = LayerFormat(tuple(settings["plane_widths"]), self.block).within(stored_bits).plane_widths
                settings["plane_widths"] = widths

    def get_loading_attributes(self) -> dict[str, Any]:
        """The settings given to this object that replace those of a model being loaded."""
        return self._loading_attributes

    def to_dict(self) -> dict[str, Any]:
        """The settings as config.json records them."""
        unrecorded = ("_loading_attributes", "stored_bits_to_load")
        return {key: copy.deepcopy(value) for key, value in self.__dict__.items() if key not in unrecorded}


def check_read_bits(read_bits: ReadBits) -> None:
    """Raises InputError unless read bits, or each of those given by pattern, lie in (0, 8]."""
    by_pattern = read_bits if isinstance(read_bits, Mapping) else {"": read_bits}
    for pattern, value in by_pattern.items():
        _check_bits(f"read_bits[{pattern!r}]" if pattern else "read_bits", value)


def _check_bits(argument: str, value: Any, least: float = 0) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= CODE_BITS or value < least:
        allowed = f"at least {least} (the first plane) and" if least else "above 0 and"
        raise InputError(f"{argument} is {value!r}, must be {allowed} at most {CODE_BITS}")
