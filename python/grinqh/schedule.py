"""`BitsSchedule`: the dial set between the tokens of a generation."""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from grinqh.config import ReadBits
from grinqh.dial import dial_settings
from grinqh.errors import InputError
from grinqh.linear import GrinqhLinear
from grinqh.model import model_config, packed_layers

# What transformers' `generate` calls before every pass of a model. A forward hook would be compiled with the model.
_STEP = "prepare_inputs_for_generation"


class _State:
    """Thresholds and budgets of some layers, ready to be copied into them."""

    def __init__(self, thresholds: Sequence[Tensor], budgets: Sequence[Tensor | None]) -> None:
        self.thresholds, self.budgets = list(thresholds), list(budgets)

    @classmethod
    def of(cls, layers: Sequence[GrinqhLinear]) -> _State:
        """The present state, copied."""
        budgets = [None if layer.budget is None else layer.budget.clone() for layer in layers]
        return cls([layer.thresholds.clone() for layer in layers], budgets)

    def put(self, layers: Sequence[GrinqhLinear]) -> None:
        """Writes the state in place: copies on the device, nothing waits for it."""
        torch._foreach_copy_([layer.thresholds for layer in layers], self.thresholds)
        pairs = []
        for layer, new in zip(layers, self.budgets, strict=True):
            if layer.budget is not None and new is not None:
                pairs.append((layer.budget, new))
            elif layer.budget is not new:  # set_bits was called meanwhile, with or without an exact budget
                layer.budget = None if new is None else new.clone()
        if pairs:
            torch._foreach_copy_([old for old, _ in pairs], [new for _, new in pairs])


class BitsSchedule:
    """Within it, the dial follows a schedule over the tokens of each generation; after it, it is as before.

        with grinqh.BitsSchedule(model, [(16, 4.0), (None, 2.5)]):
            model.generate(**inputs)  # 4 bits for the first 16 new tokens, 2.5 for the rest

    The bits of a token are those read by the pass that computes it. The first new token is computed by the prompt's
    pass, which reads everything if the prompt is longer than `max_graded_rows`.

    transformers' `generate` needs nothing else, compiled or not; a loop of one's own calls `turn` before each pass.
    What a phase sets is worked out beforehand. The dial is written, in place, only where a phase begins: device copies
    that nothing waits for. The model's config goes on recording the dial of before. With an exact budget the budgets
    change with the thresholds.

    Args:
        model: a calibrated model.
        phases: pairs (tokens, read bits), in order: so many tokens, at bits as `grinqh.set_bits` takes them. The last
            one's tokens are None: all that follow.

    Raises:
        InputError: no phases, tokens that are no integer of at least 1 (or None where not last, or not None there),
            read bits out of range, or a model without a dial.
    """

    def __init__(self, model: nn.Module, phases: Sequence[tuple[int | None, ReadBits]]) -> None:
        lengths = _lengths(phases)
        self._model = model
        self._layers = list(packed_layers(model).values())
        exact = model_config(model).exact_budget
        present, states = _State.of(self._layers), []
        for _, read_bits in phases:
            settings = dial_settings(model, read_bits, exact_budget=exact)[1]
            thresholds, budgets = list(present.thresholds), list(present.budgets)
            for i, name in enumerate(packed_layers(model)):
                if name in settings:
                    thresholds[i], budget = settings[name].thresholds, settings[name].budget
                    budgets[i] = None if budget is None else thresholds[i].new_full((1,), budget)
            states.append(_State(thresholds, budgets))
        self._states = states
        self._ends = list(accumulate(lengths))  # the last token of each phase but the last
        self._phase: int | None = None  # the one that is set
        self._token = 0
        # What to restore; None outside `with`.
        self._before: _State | None = None
        self._recorded: tuple[ReadBits, bool] | None = None
        self._replaced: Any = None

    def __enter__(self) -> BitsSchedule:
        step = getattr(self._model, _STEP, None)
        if self._before is not None or hasattr(step, "bits_schedule"):
            raise InputError("the model already follows a BitsSchedule: leave that one first")
        config = model_config(self._model)
        self._before, self._recorded = _State.of(self._layers), (config.read_bits, config.exact_budget)
        self._replaced = vars(self._model).get(_STEP)
        if step is not None:
            setattr(self._model, _STEP, self._hooked(step))
        self.turn(1)
        return self

    def __exit__(self, *_: object) -> None:
        if self._replaced is not None:
            setattr(self._model, _STEP, self._replaced)
        elif _STEP in vars(self._model):
            delattr(self._model, _STEP)
        assert self._before is not None
        assert self._recorded is not None
        self._before.put(self._layers)
        config = model_config(self._model)
        config.read_bits, config.exact_budget = self._recorded
        self._before = self._phase = None

    def turn(self, token: int) -> None:
        """Sets the dial for the pass that computes the token of this number, from 1; no work within a phase.

        Raises:
            InputError: a number below 1, or the schedule is not entered.
        """
        if token < 1:
            raise InputError(f"token is {token}, must be at least 1, the first new token")
        if self._before is None:
            raise InputError("the schedule is not in force: use it in a with statement")
        self._token = token
        phase = bisect_right(self._ends, token - 1)
        if phase != self._phase:
            self._states[phase].put(self._layers)
            self._phase = phase

    def _hooked(self, step: Any) -> Any:
        @functools.wraps(step)  # `generate` looks at the parameters
        def prepare(*arguments: Any, is_first_iteration: bool = False, **keywords: Any) -> Any:
            # True for the prompt's pass, or for every piece of it.
            self.turn(1 if is_first_iteration else self._token + 1)
            return step(*arguments, is_first_iteration=is_first_iteration, **keywords)

        prepare.bits_schedule = self  # type: ignore[attr-defined]
        return prepare


def _lengths(phases: Sequence[tuple[int | None, ReadBits]]) -> list[int]:
    """Tokens of all phases but the last; refuses what is none."""
    if not phases:
        raise InputError("phases is empty, must hold at least (None, read bits)")
    lengths = []
    for i, phase in enumerate(phases):
        if not isinstance(phase, tuple | list) or len(phase) != 2:
            raise InputError(f"phases[{i}] is {phase!r}, must be a pair (tokens, read bits)")
        tokens, last = phase[0], i == len(phases) - 1
        if last and tokens is not None:
            raise InputError(f"phases[{i}] is for {tokens!r} tokens, the last one must be for None: all that follow")
        if not last:
            if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
                raise InputError(f"phases[{i}] is for {tokens!r} tokens, must be an integer of at least 1")
            lengths.append(tokens)
    return lengths
