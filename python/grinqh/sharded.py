"""What a process computes of a packed layer that several processes share, and how their results come together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from grinqh.errors import InputError
from grinqh.linear import GrinqhLinear

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LayerShard(GrinqhLinear):
    """A part of a layer. Its dial, weights and stored bits are the whole layer's, so that `set_bits` is the same.

    Args:
        whole: the layer; its thresholds and counts are taken over.
        tensors: the part's (see `grinqh.sharding`).
        group: the processes; None for all.
        sections: the part's numbers of outputs, for a layer that has sections.
    """

    sharded = True

    def __init__(
        self,
        whole: GrinqhLinear,
        tensors: Mapping[str, Tensor],
        group: ProcessGroup | None,
        sections: Sequence[int] = (),
    ) -> None:
        super().__init__(tensors, whole.format, whole.max_graded_rows, sections)
        self.group = group
        self.whole_shape = (whole.out_features, whole.in_features)
        self._whole_stored_bits = whole.stored_bits
        self.thresholds = whole.thresholds
        self.count_reads, self.read_total, self.read_log = whole.count_reads, whole.read_total, whole.read_log
        self.train(whole.training)

    @property
    def weights(self) -> int:
        """Number of weights of the whole layer."""
        return self.whole_shape[0] * self.whole_shape[1]

    @property
    def stored_bits(self) -> float:
        """Mean bits per weight in the planes of the whole layer."""
        return self._whole_stored_bits

    def extra_repr(self) -> str:
        """The part's shape and the whole layer's, for printing."""
        return f"{super().extra_repr()}, part of {self.whole_shape[0]} x {self.whole_shape[1]}"

    def _save_to_state_dict(self, *_: Any) -> None:
        # A file of parts would look like that of a smaller model.
        raise InputError("the model is shared out among processes: save it before grinqh.tensor_parallel")


class OutputShard(LayerShard):
    """Computes a range of a layer's outputs.

    Args:
        whole: see `LayerShard`.
        tensors: see `LayerShard`.
        group: see `LayerShard`.
        gather_at: where the range begins, if every process is to get all outputs; None if it keeps its own alone.
        sections: see `LayerShard`.
    """

    def __init__(
        self,
        whole: GrinqhLinear,
        tensors: Mapping[str, Tensor],
        group: ProcessGroup | None,
        gather_at: int | None = None,
        sections: Sequence[int] = (),
    ) -> None:
        super().__init__(whole, tensors, group, sections)
        self.gather_at = gather_at

    def forward(self, x: Tensor) -> Tensor:
        """Maps x [..., in_features], the same on every process, to [..., out_features] of the part or of the whole."""
        if x.requires_grad:
            x = _SumGradients.apply(x, self.group)
        y = super().forward(x)
        if self.gather_at is None:
            return y
        # Not all_gather: parts may be of different sizes. Adding zeros changes no number.
        after = self.whole_shape[0] - self.gather_at - self.out_features
        return _sum(torch.nn.functional.pad(y, (self.gather_at, after)), self.group)


class InputShard(LayerShard):
    """Reads a range of a layer's inputs; every process gets the sum of all processes' outputs."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps x [..., in_features], the part's inputs, to [..., out_features], the whole layer's outputs."""
        return _sum(super().forward(x), self.group)

    def _count(self, read_bits: Tensor) -> None:
        # Each process has read some of the channels: a whole number of bits for a row's weights of one output.
        bits = (read_bits.double() * self.in_features).round()
        dist.all_reduce(bits, group=self.group)
        super()._count((bits / self.whole_shape[1]).float())


def _sum(y: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum over the processes; y is overwritten."""
    if y.requires_grad:
        summed: Tensor = _Sum.apply(y, group)
        return summed
    dist.all_reduce(y, group=group)
    return y


class _Sum(torch.autograd.Function):
    """Sums over the processes; the gradient, the same on all, goes to each."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, group: ProcessGroup | None) -> Tensor:
        y = y.clone()
        dist.all_reduce(y, group=group)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _SumGradients(torch.autograd.Function):
    """The same on every process; gradients, of which each process has some, are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None
