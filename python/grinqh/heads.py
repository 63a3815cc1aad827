"""Attention heads in bases in which o has few large inputs and many small ones, and so needs fewer bits.

Attention adds up values, each query head those of its key head, and mixes none of the numbers of a value with another.
So the basis of a key head's values is free: with an invertible M, the rows of v become M W_v and the columns of o that
its query heads feed become W_o M^-1; the model computes what it did, at the same cost. (Liu et al., SpinQuant, arXiv
2405.16406, learn a rotation for this place.) Here M makes what reaches o on the calibration text uncorrelated, and o's
columns orthogonal: the error that is left where each input has bits of its own is then least (docs/method.md).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from grinqh.calibration import evaluating, outputs_for, token_batches
from grinqh.errors import InputError
from grinqh.memory import release_file_pages, trim_heap
from grinqh.model import shared_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DAMPING = 0.01  # of the mean, added to the energy of every direction
TRIAL_TOKENS = 64  # of the text, on which it is tried whether other bases leave the model's function as it is
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


class Basis(NamedTuple):
    """The bases of a layer's key heads: float64 [count, size, size] on the CPU."""

    into: Tensor  # M
    back: Tensor  # M^-1


Bases = Mapping[Heads, Basis]


def change_bases(
    model: nn.Module,
    data: str | Sequence[str] | Tensor | Sequence[Tensor],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    sequence_length: int = 512,
    max_tokens: int = 8192,
    progress: bool = True,
) -> list[str]:
    """Gives attention heads bases in which o_proj needs fewer bits, in place, before `quantize_model`.

    The model runs over the text once; then v_proj and o_proj get other weights. Its function stays, but for rounding to
    their dtype. What is between the two is another: adapters of the original model for them do not fit any more.
    Layers are left alone where on a few tokens the model turns out to do more with values than attention does.

    Args:
        model: a causal language model whose attention layers have `head_dim`, and `torch.nn.Linear`s named v_proj and
            o_proj; other layers may be packed already, not yet calibrated.
        data: texts or token ids, as for `grinqh.calibrate`.
        tokenizer: of the model; needed for texts.
        sequence_length: tokens in a sequence, at least 2.
        max_tokens: at most about so many tokens are used, spread over the data.
        progress: whether to show a progress bar on stderr (only if that is a terminal).

    Returns:
        The names of the attention layers that got other bases.

    Raises:
        InputError: data that is empty, of another type or without its tokenizer; activations that are NaN or infinite,
            by the layer's name. The model is then unchanged.

    Source: docs/method.md, "Heads in other bases".
    """
    batches = token_batches(data, tokenizer, sequence_length, max_tokens)
    with evaluating(model), torch.no_grad():
        with second_moments(find_heads(model)) as moments:
            for _ in outputs_for(model, batches, progress, "change bases"):
                pass
        for of, moment in moments.items():
            if not torch.isfinite(moment).all():
                raise InputError(
                    f"{of.attention}.o_proj saw activations that are NaN or infinite on the calibration data"
                )
        bases = that_change_nothing(model, find_bases(moments), batches[0])
        for of, basis in bases.items():
            _change(of, basis)
            trim_heap()
    return [of.attention for of in bases]


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


def find_bases(moments: Mapping[Heads, Tensor]) -> Bases:
    """For second moments C of what o sees and A of o's columns: M C M^T and M^-T A M^-1 are diagonal, both damped."""
    bases = {}
    for of, moment in moments.items():
        heads = of.o.weight.detach().double().T.unflatten(0, (of.count, of.sharing, of.size))
        columns = heads.transpose(1, 2).flatten(2)  # [count, size, sharing * N]
        root = torch.linalg.cholesky(_damped(moment))
        _, vectors = torch.linalg.eigh(root.mT @ _damped(columns @ columns.mT) @ root)
        back = root @ vectors
        into = torch.linalg.inv(back)
        norm = into.norm(dim=2)
        bases[of] = Basis(into / norm[:, :, None], back * norm[:, None, :])
    return bases


def _damped(moment: Tensor) -> Tensor:
    moment = moment.double().cpu()
    mean = moment.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(torch.float32).tiny)
    return moment / mean[:, None, None] + DAMPING * torch.eye(moment.shape[-1], dtype=torch.float64)


def that_change_nothing(model: nn.Module, bases: Bases, ids: Tensor) -> Bases:
    """Those of the bases in which the model computes what it does now.

    A model may do something between v and o that knows the basis, or use values elsewhere too. So it is tried: with
    v's outputs in the new basis, every o must see its input in that basis; then with o's inputs brought back, the
    logits must be what they are now.

    Args:
        model: in evaluation mode, without gradients.
        bases: to be tried.
        ids: token ids [batch, length].
    """
    if not bases:
        return {}
    ids = ids[:1, :TRIAL_TOKENS].to(next(model.parameters()).device)
    seen: dict[Heads, Tensor] = {}
    reached: dict[Heads, Basis] = {}

    def keep(of: Heads, x: Tensor) -> Tensor:
        return seen.setdefault(of, x)

    def compare(of: Heads, x: Tensor) -> Tensor:
        if of in seen and _close(x, _of_queries(bases[of].into, of, seen[of])):
            reached[of] = bases[of]
        return seen.get(of, x)  # so that each layer is tried by itself

    with _hooked({}, dict.fromkeys(bases, keep)):
        now = _logits(model, ids)
    with _hooked(bases, dict.fromkeys(bases, compare)):
        model(ids)
    for of in bases.keys() - reached.keys():
        logger.info("%s: o_proj does not see values as they are, so its heads keep their basis", of.attention)
    with _hooked(reached, {of: lambda of, x: _of_queries(reached[of].back, of, x) for of in reached}):
        then = _logits(model, ids)
    if reached and (now is None or then is None or not _close(then, now)):
        logger.warning("all heads keep their basis: the model uses values elsewhere than in o_proj, or has no logits")
        return {}
    return reached


def _change(of: Heads, basis: Basis) -> None:
    """Brings v and o into another basis. Their parameters are replaced: a file may be behind the old ones."""
    v, o = of.v, of.o
    parameters = [(v, "weight", _of_keys(basis.into, of, v.weight.T).T)]
    if v.bias is not None:
        parameters.append((v, "bias", _of_keys(basis.into, of, v.bias)))
    parameters.append((o, "weight", _of_queries(basis.back.mT, of, o.weight)))
    for layer, name, value in parameters:
        old = getattr(layer, name)
        setattr(layer, name, nn.Parameter(value.contiguous(), requires_grad=old.requires_grad))
        release_file_pages(old)


def _of_queries(by: Tensor, of: Heads, x: Tensor) -> Tensor:
    """What o sees, [.., H * size], with the part of every query head multiplied by its key head's matrix."""
    heads = x.unflatten(-1, (of.count, of.sharing, of.size)).to(by.dtype)
    return torch.einsum("hed,...hsd->...hse", by.to(x.device), heads).flatten(-3).to(x.dtype)


def _of_keys(by: Tensor, of: Heads, x: Tensor) -> Tensor:
    """Values, [.., count * size], with the part of every key head multiplied by its matrix."""
    heads = x.unflatten(-1, (of.count, of.size)).to(by.dtype)
    return torch.einsum("hed,...hd->...he", by.to(x.device), heads).flatten(-2).to(x.dtype)


@contextmanager
def _hooked(bases: Bases, inputs: Mapping[Heads, Callable[[Heads, Tensor], Tensor]]) -> Iterator[None]:
    """Within it values are made in other bases, and what o sees is what a function makes of it."""
    with ExitStack() as stack:
        for of, basis in bases.items():
            hook: Any = of.v.register_forward_hook(lambda _, __, y, of=of, basis=basis: _of_keys(basis.into, of, y))
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
