"""`GrinqhLinear`: a linear layer whose weights are packed planes, read as far as each token needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from grinqh import packing
from grinqh.config import LayerFormat
from grinqh.defaults import GRADED_ROWS
from grinqh.errors import InputError


class GrinqhLinear(nn.Module):
    """Takes the place of a `torch.nn.Linear`.

    Its parameters are the tensors of `grinqh.packing`, none trainable; gradients flow to the input. The dial is the
    buffer `thresholds` (float32 [G], all 0 at first: everything is read), which `grinqh.set_bits` writes in place. A
    layer that was made of several (`grinqh.fusion`) has sections, outputs with thresholds of their own: float32 [S, G].

    On an NVIDIA GPU the parameters `plane_<p>` and `block_scale` lie in the tile order of its kernels: moving the layer
    there and back converts them. `tensors`, state dicts and saved files always hold the canonical order.

    Args:
        tensors: the packed layer (see `grinqh.packing`), with a bias or without.
        format: plane widths and block.
        max_graded_rows: inputs of more rows than this are read in full.
        sections: numbers of outputs, one section after the other; none for a layer that is graded as a whole.
    """

    # Parameters: the planes, and
    block_scale: Tensor
    row_scale: Tensor
    gain: Tensor
    channel_order: Tensor
    channel_weight: Tensor
    error: Tensor
    unit_thresholds: Tensor
    dial: Tensor
    bias: Tensor | None
    # Buffers. They are not saved: they follow from the dial setting that the model's config records.
    thresholds: Tensor
    budget: Tensor | None
    read_total: Tensor  # float64 [2]: sum of the read bits of the rows counted, and their number
    read_log: Tensor | None  # float32 [L]: read bits of the last L rows counted, the newest last
    # Whether it is only what one of several processes holds of a layer (grinqh.parallel).
    sharded = False

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        format: LayerFormat,
        max_graded_rows: int = GRADED_ROWS,
        sections: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.format = format
        self.sections = list(sections)
        self.in_features = tensors["channel_order"].shape[0]
        self.out_features = tensors["row_scale"].shape[0]
        self.max_graded_rows = max_graded_rows
        self.count_reads = False
        self.register_parameter("bias", None)
        self.set_packed(tensors, format)
        device = self.gain.device
        self.register_buffer("thresholds", self._no_thresholds(), persistent=False)
        self.register_buffer("budget", None, persistent=False)
        self.register_buffer("read_total", torch.zeros(2, dtype=torch.float64, device=device), persistent=False)
        self.register_buffer("read_log", None, persistent=False)

    @property
    def tensors(self) -> packing.PackedTensors:
        """The packed tensors by name, in canonical order."""
        tensors = {name: p.detach() for name, p in self._parameters.items() if p is not None}
        return packing.from_tiles(tensors, self.format) if self.tiled else tensors

    def set_packed(self, tensors: Mapping[str, Tensor], format: LayerFormat) -> None:
        """Puts other packed tensors, in canonical order, into the layer, for the same numbers of inputs and outputs."""
        for name in [name for name in self._parameters if name.startswith("plane_")]:
            del self._parameters[name]
        self.format = format
        self._planes = [packing.plane_name(p) for p in range(format.planes)]
        self._widths = list(format.plane_widths)
        self._set_parameters(tensors)
        self.arrange()

    def _set_parameters(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(tensor.detach(), requires_grad=False))

    @property
    def tiled(self) -> bool:
        """Whether the planes and block scales lie in the order of the CUDA kernels."""
        return packing.is_tiled(self._parameters)

    def arrange(self) -> None:
        """Brings planes and block scales into the order that the kernels of their device take."""
        if self.gain.is_cuda and not self.tiled:
            self._set_parameters(packing.to_tiles(self.tensors, self.format))

    def _arrange_canonically(self) -> None:
        if self.tiled:
            self._set_parameters(self.tensors)

    @property
    def stored_channels(self) -> list[int]:
        """Channels stored in each plane: K_p."""
        axis = 2 if self.tiled else 0
        return [self._parameters[name].shape[axis] for name in self._planes]  # type: ignore[union-attr]

    @property
    def stores_everything(self) -> bool:
        """Whether every plane is stored for all channels."""
        return all(channels == self.in_features for channels in self.stored_channels)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights with all stored planes read, [in_features, out_features]."""
        p = self._parameters
        names = ("block_scale", "row_scale", "gain", "channel_order")
        weight = ([p[name] for name in self._planes], *(p[name] for name in names), self._widths, self.format.block)
        dense: Tensor = torch.ops.grinqh.dequantize(*weight, len(self._planes), dtype)
        return dense

    @property
    def weights(self) -> int:
        """Number of weights, in_features * out_features."""
        return self.in_features * self.out_features

    @property
    def stored_bits(self) -> float:
        """Mean bits per weight in the planes."""
        kept = zip(self.format.plane_widths, self.stored_channels, strict=True)
        return sum(width * channels for width, channels in kept) / self.in_features

    @property
    def calibrated(self) -> bool:
        """Whether the dial has been recorded."""
        return not bool(self.dial.isnan().any())

    def set_thresholds(self, thresholds: Tensor | Sequence[float]) -> None:
        """Writes the thresholds, in place.

        Args:
            thresholds: [G] numbers of at least 0 that never fall; infinity is allowed. [S, G] for a layer of sections,
                which takes [G] for all of them too.

        Raises:
            InputError: a wrong number of them, NaN, a negative number, or a falling one.
        """
        new = torch.as_tensor(thresholds, dtype=torch.float32)
        if self.sections and new.ndim == 1:
            new = new.expand(len(self.sections), -1)
        if new.shape != self.thresholds.shape:
            raise InputError(f"thresholds have shape {list(new.shape)}, must have {list(self.thresholds.shape)}")
        packing.check_thresholds("thresholds", new)
        self.thresholds.copy_(new)

    def set_budget(self, read_bits: float | None) -> None:
        """Makes every row keep to so many read bits, or (None) lets the thresholds alone decide.

        Changing the number is done in place; switching the budget on or off makes `torch.compile` compile again.
        """
        if read_bits is None:
            self.budget = None
        elif self.budget is None:
            self.budget = self.thresholds.new_full((1,), read_bits)
        else:
            self.budget.fill_(read_bits)

    def reset_buffers(self) -> None:
        """Everything is read, no budget, nothing counted: the state of a new layer."""
        self.thresholds = self._no_thresholds()
        self.read_total.zero_()
        self.read_log = None
        self.budget = None

    def _no_thresholds(self) -> Tensor:
        shape = (len(self.sections), self.format.planes) if self.sections else (self.format.planes,)
        return torch.zeros(shape, device=self.gain.device)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x [..., in_features], float32, float16 or bfloat16, to [..., out_features] of the same type."""
        arguments = self._arguments(x)
        if self.count_reads and x.numel() <= self.max_graded_rows * self.in_features:
            y, read_bits = torch.ops.grinqh.gemv_read_bits(*arguments, self.sections)
            self._count(read_bits)
            return y
        return torch.ops.grinqh.linear(*arguments, self.max_graded_rows, self.sections)

    def fused(
        self,
        x: Tensor,
        *,
        norm_weight: Tensor | None = None,
        norm_eps: float = 0.0,
        gated: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        """The layer with what a decoder layer does around it: of `prepared` x, and plus a residual.

        One op does it all, in the kernel of the product where there is one. Only what gradients, hooks or the
        counting of reads need is done in steps.

        Args:
            x: float32, float16 or bfloat16 [..., in_features], or [..., 2 * in_features] if gated.
            norm_weight: x's dtype [in_features]; None for no norm. Not with `gated`.
            norm_eps: of the norm.
            gated: whether x is gates and, after them, what they are multiplied with.
            residual: x's dtype [..., out_features], added to the rounded result; None for nothing.

        Returns:
            x's dtype [..., out_features].

        Raises:
            InputError: both a norm and gates.
            RuntimeError: tensors of other shapes or dtypes.
        """
        if gated and norm_weight is not None:
            raise InputError("norm_weight is given and gated is True: a layer's input has one or the other")
        tensors = (x, norm_weight, residual)
        gradients = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        hooked = bool(self._forward_pre_hooks or self._forward_hooks)
        if gradients or hooked or self.count_reads or self.sharded:
            prepare = prepared if gradients else torch.ops.grinqh.prepare
            y = self(prepare(x, norm_weight, norm_eps, gated) if gated or norm_weight is not None else x)
            return y if residual is None else y + residual
        around = (norm_weight, norm_eps, gated, residual)
        return torch.ops.grinqh.fused_linear(*self._arguments(x), self.max_graded_rows, *around, self.sections)

    def _arguments(self, x: Tensor) -> tuple[Any, ...]:
        """What the ops of a packed layer are called with, an input first."""
        p = self._parameters
        return (
            x,
            [p[name] for name in self._planes],
            p["block_scale"],
            p["row_scale"],
            p["gain"],
            p["channel_order"],
            p["channel_weight"],
            self.thresholds,
            self._widths,
            self.format.block,
            p["bias"],
            self.budget,
        )

    def _count(self, read_bits: Tensor) -> None:
        read_bits = read_bits.detach()
        self.read_total[0] += read_bits.sum()
        self.read_total[1] += read_bits.numel()
        if self.read_log is not None:
            # Shifted, not written at a row number, which would be on the device.
            self.read_log.copy_(torch.cat([self.read_log, read_bits.flatten()])[-len(self.read_log) :])

    def extra_repr(self) -> str:
        """The layer's shape and format, for printing."""
        widths = ",".join(map(str, self.format.plane_widths))
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"planes={widths}, stored_bits={self.stored_bits:.3g}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GrinqhLinear:
        # `.to(torch.bfloat16)`, `.half()` and the like must not round the stored scales: only the bias has the
        # model's dtype, everything else moves between devices alone.
        bias = self.bias

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if tensor is bias or moved.dtype == tensor.dtype else tensor.to(moved.device)

        if not keep_dtype(self.gain.detach()).is_cuda:
            self._arrange_canonically()
        super()._apply(keep_dtype, recurse)
        self.arrange()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.tiled:
            tensors = self.tensors
            destination |= {prefix + name: tensors[name] for name in (*self._planes, "block_scale")}

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        self._arrange_canonically()
        super()._load_from_state_dict(*arguments, **keywords)
        self.arrange()


def prepared(x: Tensor, norm_weight: Tensor | None = None, norm_eps: float = 0.0, gated: bool = False) -> Tensor:
    """What the op `prepare` makes of a layer's input, in operations of torch, which have gradients.

    Args:
        x: float32, float16 or bfloat16 [..., K], or [..., 2K] if gated.
        norm_weight: x's dtype [K]: the root mean square norm with these weights; None for no norm. Not with `gated`.
        norm_eps: added to the mean square.
        gated: whether the first half of x, through SiLU, multiplies the second.

    Returns:
        x's dtype [..., K]; each step is rounded to it.
    """
    if gated:
        gate, up = x.chunk(2, dim=-1)
        return functional.silu(gate) * up
    if norm_weight is None:
        return x
    exact = x.float()
    exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + norm_eps)
    return exact.to(x.dtype) * norm_weight
