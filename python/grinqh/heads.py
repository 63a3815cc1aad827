"""Attention heads rotated so that o has few large inputs and many small ones, and so needs fewer bits.

Attention adds up values, each query head those of its key head, and mixes none of the numbers of a value with another.
So the values of a key head may be rotated: with an orthogonal R, the rows of v become R W_v and the columns of o that
its query heads feed become W_o R^T; the model computes what it did, at the same cost. (Liu et al., SpinQuant, arXiv
2405.16406, learn R.) Here the rows of R are the principal components of what reaches o on the calibration text.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grinqh.calibration import evaluating, outputs_for, token_batches
from grinqh.errors import InputError
from grinqh.memory import release_file_pages, trim_heap
from grinqh.model import shared_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DISTINCT_TOKENS = 2  # of the text, for each number of a head: with fewer its principal components are those of the text
TRIAL_TOKENS = 64  # of the text, on which it is tried whether rotations leave the model's function as it is
TOLERANCE = 0.05  # relative, of what is tried: above the rounding of 16-bit types, far below a wrong guess


@dataclass(frozen=True, eq=False)
class Heads:
    """The heads of an attention layer."""

    attention: str  # its name
    v: nn.Linear
    o: nn.Linear
    count: int  # key heads
    sharing: int  # query heads that share one
    size: int  # numbers of a head


Rotations = Mapping[Heads, Tensor]  # R of each key head: float64 [count, size, size] on the CPU


def rotate_heads(
    model: nn.Module,
    data: str | Sequence[str] | Tensor | Sequence[Tensor],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    sequence_length: int = 512,
    max_tokens: int = 8192,
    progress: bool = True,
) -> list[str]:
    """Rotates attention heads so that o_proj needs fewer bits, in place, before `quantize_model`.

    The model runs over the text once; then v_proj and o_proj get other weights. Its function stays, but for rounding to
    their dtype. What is between the two is another: adapters of the original model for them do not fit any more.
    Layers are left alone where on a few tokens the model turns out to do more with values than attention does. With a
    warning they are where the text has fewer than two distinct tokens for each number of a head: it then says little
    about other texts, which would read more bits than the dial is set to.

    Args:
        model: a causal language model whose attention layers have `head_dim`, and `torch.nn.Linear`s named v_proj and
            o_proj; other layers may be packed already, not yet calibrated.
        data: texts or token ids, as for `grinqh.calibrate`.
        tokenizer: of the model; needed for texts.
        sequence_length: tokens in a sequence, at least 2.
        max_tokens: at most about so many tokens are used, spread over the data.
        progress: whether to show a progress bar on stderr (only if that is a terminal).

    Returns:
        The names of the attention layers whose heads were rotated.

    Raises:
        InputError: data that is empty, of another type or without its tokenizer; activations that are NaN or infinite,
            by the layer's name. The model is then unchanged.

    Source: docs/method.md, "Rotated heads".
    """
    batches = token_batches(data, tokenizer, sequence_length, max_tokens)
    found = _that_are_known_well_enough(find_heads(model), batches)
    with evaluating(model), torch.no_grad():
        with second_moments(found) as moments:
            for _ in outputs_for(model, batches, progress, "rotate heads"):
                pass
        for of, moment in moments.items():
            if not torch.isfinite(moment).all():
                raise InputError(
                    f"{of.attention}.o_proj saw activations that are NaN or infinite on the calibration data"
                )
        rotations = that_change_nothing(model, principal_components(moments), batches[0])
        for of, rotation in rotations.items():
            _rotate(of, rotation)
            trim_heap()
    return [of.attention for of in rotations]


def find_heads(model: nn.Module) -> list[Heads]:
    """The attention layers whose v and o are ordinary linear layers with weights of their own; on any device."""
    shared, found = shared_weights(model), []
    for name, attention in model.named_modules():
        v, o, size = (getattr(attention, attribute, None) for attribute in ("v_proj", "o_proj", "head_dim"))
        if type(v) is not nn.Linear or type(o) is not nn.Linear or not isinstance(size, int):
            continue
        fits = v.out_features % size == 0 and o.in_features % v.out_features == 0
        if fits and not shared & {id(v.weight), id(o.weight)}:
            found.append(Heads(name, v, o, v.out_features // size, o.in_features // v.out_features, size))
    return found


def _that_are_known_well_enough(found: Sequence[Heads], batches: Sequence[Tensor]) -> list[Heads]:
    """Those of the heads whose numbers the text has enough distinct tokens for."""
    distinct = len(torch.cat([ids.flatten().cpu() for ids in batches]).unique())
    known = [of for of in found if distinct >= DISTINCT_TOKENS * of.size]
    if len(known) < len(found):
        size = max(of.size for of in found)
        logger.warning(
            "%d of %d attention layers keep their heads as they are: the text has %d distinct tokens, and to rotate "
            "heads of %d numbers takes %d: give more text",
            len(found) - len(known), len(found), distinct, size, DISTINCT_TOKENS * size,
        )  # fmt: skip
    return known


@contextmanager
def second_moments(heads: Sequence[Heads]) -> Iterator[dict[Heads, Tensor]]:
    """Within it, sums up x x^T over tokens and query heads of what o sees: float32 [count, size, size]."""
    moments: dict[Heads, Tensor] = {}

    def see(of: Heads, x: Tensor) -> Tensor:
        rows = x.reshape(-1, of.count, of.sharing, of.size).float()
        rows = rows.transpose(0, 1).flatten(1, 2)  # [count, tokens * sharing, size]
        moments.setdefault(of, rows.new_zeros((of.count, of.size, of.size))).baddbmm_(rows.mT, rows)
        return x

    with _hooked({}, dict.fromkeys(heads, see)):
        yield moments


def principal_components(moments: Mapping[Heads, Tensor]) -> Rotations:
    """Of second moments: the rotations after which a head's numbers are not correlated; that of most energy is last."""
    return {of: torch.linalg.eigh(moment.double().cpu()).eigenvectors.mT for of, moment in moments.items()}


def that_change_nothing(model: nn.Module, rotations: Rotations, ids: Tensor) -> Rotations:
    """Those of the rotations with which the model computes what it does now.

    A model may do something between v and o that a rotation changes, or use values elsewhere too. So it is tried: with
    v's outputs rotated, every o must see its input rotated; then with o's inputs rotated back, the logits must be what
    they are now.

    Args:
        model: in evaluation mode, without gradients.
        rotations: to be tried.
        ids: token ids [batch, length].
    """
    if not rotations:
        return {}
    ids = ids[:1, :TRIAL_TOKENS].to(next(model.parameters()).device)
    seen: dict[Heads, Tensor] = {}
    reached: dict[Heads, Tensor] = {}

    def keep(of: Heads, x: Tensor) -> Tensor:
        return seen.setdefault(of, x)

    def compare(of: Heads, x: Tensor) -> Tensor:
        if of in seen and _close(x, _queries(rotations[of], of, seen[of])):
            reached[of] = rotations[of]
        return seen.get(of, x)  # so that each layer is tried by itself

    with _hooked({}, dict.fromkeys(rotations, keep)):
        now = _logits(model, ids)
    with _hooked(rotations, dict.fromkeys(rotations, compare)):
        model(ids)
    for of in rotations.keys() - reached.keys():
        logger.info("%s: o_proj does not see values as they are, so its heads are not rotated", of.attention)
    with _hooked(reached, {of: lambda of, x: _queries(reached[of].mT, of, x) for of in reached}):
        then = _logits(model, ids)
    if reached and (now is None or then is None or not _close(then, now)):
        logger.warning("no heads are rotated: the model uses values elsewhere than in o_proj, or has no logits")
        return {}
    return reached


def _rotate(of: Heads, rotation: Tensor) -> None:
    """Rotates what is between v and o. Their parameters are replaced: a file may be behind the old ones."""
    parameters = [
        (of.v, "weight", _keys(rotation, of, of.v.weight.T).T),
        (of.o, "weight", _queries(rotation, of, of.o.weight)),
    ]
    if of.v.bias is not None:
        parameters.append((of.v, "bias", _keys(rotation, of, of.v.bias)))
    for layer, name, value in parameters:
        old = getattr(layer, name)
        setattr(layer, name, nn.Parameter(value.contiguous(), requires_grad=old.requires_grad))
        release_file_pages(old)


def _queries(rotation: Tensor, of: Heads, x: Tensor) -> Tensor:
    """What o sees, or rows of its weights, [.., H * size], with every query head rotated as its key head is."""
    heads = x.unflatten(-1, (of.count, of.sharing, of.size)).to(rotation.dtype)
    return torch.einsum("hed,...hsd->...hse", rotation.to(x.device), heads).flatten(-3).to(x.dtype)


def _keys(rotation: Tensor, of: Heads, x: Tensor) -> Tensor:
    """Values, [.., count * size], with every key head rotated."""
    heads = x.unflatten(-1, (of.count, of.size)).to(rotation.dtype)
    return torch.einsum("hed,...hd->...he", rotation.to(x.device), heads).flatten(-2).to(x.dtype)


@contextmanager
def _hooked(rotations: Rotations, inputs: Mapping[Heads, Callable[[Heads, Tensor], Tensor]]) -> Iterator[None]:
    """Within it values are rotated, and what o sees is what a function makes of it."""
    with ExitStack() as stack:
        for of, rotation in rotations.items():
            hook: Any = of.v.register_forward_hook(lambda _, __, y, of=of, rotation=rotation: _keys(rotation, of, y))
            stack.callback(hook.remove)
        for of, see in inputs.items():
            hook = of.o.register_forward_pre_hook(lambda _, x, of=of, see=see: (see(of, x[0]),))
            stack.callback(hook.remove)
        yield


def _logits(model: nn.Module, ids: Tensor) -> Tensor | None:
    output = model(ids)
    logits = getattr(output, "logits", output)
    return logits if isinstance(logits, Tensor) else None


def _close(got: Tensor, wanted: Tensor) -> bool:
    return bool((got.double() - wanted.double()).norm() <= TOLERANCE * wanted.double().norm())
