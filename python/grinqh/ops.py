"""Loads the compiled ops into `torch.ops.grinqh` and gives them their fake kernels and gradients.

The schemas, with shapes and dtypes, are documented in docs/ops.md.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grinqh.defaults import GRADED_ROWS


def _load() -> None:
    # Loading a second copy would register the ops twice, which ends the process.
    if hasattr(torch.ops.grinqh, "gemv"):
        return
    # find_spec, not a path beside this file: in an editable install the library lies elsewhere.
    spec = importlib.util.find_spec("grinqh._ops")
    if spec is None or spec.origin is None:
        raise ImportError("grinqh._ops, the compiled ops, was not found: install the package with pip")
    torch.ops.load_library(spec.origin)


_load()


def cpu_isa() -> str:
    """The instruction set that the CPU kernels use here: "avx512", "avx2", "neon" or "scalar"."""
    return str(torch.ops.grinqh.cpu_isa())


@torch.library.register_fake("grinqh::gemv")
def _gemv_fake(
    x: Tensor, planes: Sequence[Tensor], block_scale: Tensor, row_scale: Tensor, *_: Any, **__: Any
) -> Tensor:
    return x.new_empty((*x.shape[:-1], row_scale.shape[0]))


@torch.library.register_fake("grinqh::gemv.out")
def _gemv_out_fake(*_: Any, out: Tensor, **__: Any) -> None:
    pass


@torch.library.register_fake("grinqh::gemv_read_bits")
def _gemv_read_bits_fake(
    x: Tensor, planes: Sequence[Tensor], block_scale: Tensor, row_scale: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], row_scale.shape[0])), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.register_fake("grinqh::linear")
def _linear_fake(
    x: Tensor, planes: Sequence[Tensor], block_scale: Tensor, row_scale: Tensor, *_: Any, **__: Any
) -> Tensor:
    return x.new_empty((*x.shape[:-1], row_scale.shape[0]))


@torch.library.register_fake("grinqh::prepare")
def _prepare_fake(x: Tensor, norm_weight: Tensor | None, norm_eps: float, gated: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2 if gated else x.shape[-1]))


@torch.library.register_fake("grinqh::fused_linear")
def _fused_linear_fake(
    x: Tensor, planes: Sequence[Tensor], block_scale: Tensor, row_scale: Tensor, *_: Any, **__: Any
) -> Tensor:
    return x.new_empty((*x.shape[:-1], row_scale.shape[0]))


@torch.library.register_fake("grinqh::decode_attention")
def _decode_attention_fake(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    batch, heads, _, dim = query.shape
    return query.new_empty((batch, 1, heads, dim))


@torch.library.register_fake("grinqh::sort_channels")
def _sort_channels_fake(weight: Tensor, mean_square: Tensor | None = None) -> Tensor:
    return weight.new_empty((weight.shape[1],), dtype=torch.int32)


@torch.library.register_fake("grinqh::quantize")
def _quantize_fake(
    weight: Tensor, channel_order: Tensor, block: int = 64
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, k = weight.shape
    return (
        weight.new_empty((k, n), dtype=torch.uint8),
        weight.new_empty((k, (n + block - 1) // block), dtype=torch.float16),
        weight.new_empty((n,)),
        weight.new_empty((9,)),
        weight.new_empty((9, k)),
    )


@torch.library.register_fake("grinqh::pack")
def _pack_fake(codes: Tensor, widths: Sequence[int], channels: Sequence[int]) -> list[Tensor]:
    n = codes.shape[1]
    return [codes.new_empty((c, (n * width + 7) // 8)) for c, width in zip(channels, widths, strict=True)]


@torch.library.register_fake("grinqh::unpack")
def _unpack_fake(planes: Sequence[Tensor], widths: Sequence[int], n: int, k: int) -> Tensor:
    return planes[0].new_empty((k, n))


# Tile order: cuda/layout.h.
_TILE = 256


def _tile_shapes(widths: Sequence[int], n: int, block: int) -> tuple[int, int, list[tuple[int, int]]]:
    """Tiles, scales of a channel, and for each plane its subplanes and the bytes of a run."""
    tiles = -(-n // _TILE)
    return tiles, tiles * (_TILE // block) + 1, [(max(1, w // 2), _TILE * min(w, 2) // 8) for w in widths]


@torch.library.register_fake("grinqh::repack")
def _repack_fake(
    planes: Sequence[Tensor], block_scale: Tensor, widths: Sequence[int], n: int, block: int
) -> tuple[list[Tensor], Tensor]:
    tiles, scales, runs = _tile_shapes(widths, n, block)
    tiled = [p.new_empty((subplanes, tiles, p.shape[0], run)) for p, (subplanes, run) in zip(planes, runs, strict=True)]
    return tiled, block_scale.new_empty((scales, block_scale.shape[0]))


@torch.library.register_fake("grinqh::unpack_tiles")
def _unpack_tiles_fake(
    planes: Sequence[Tensor], block_scale: Tensor, widths: Sequence[int], n: int, block: int
) -> tuple[list[Tensor], Tensor]:
    rows = [p.new_empty((p.shape[2], (n * width + 7) // 8)) for p, width in zip(planes, widths, strict=True)]
    return rows, block_scale.new_empty((block_scale.shape[1], -(-n // block)))


@torch.library.register_fake("grinqh::grade")
def _grade_fake(
    x: Tensor,
    planes: Sequence[Tensor],
    channel_order: Tensor,
    channel_weight: Tensor,
    thresholds: Tensor,
    widths: Sequence[int],
    budget: Tensor | None = None,
    sections: Sequence[int] = (),
) -> Tensor:
    return x.new_empty((*([len(sections)] if sections else []), *x.shape), dtype=torch.uint8)


@torch.library.register_fake("grinqh::dequantize")
def _dequantize_fake(
    planes: Sequence[Tensor],
    block_scale: Tensor,
    row_scale: Tensor,
    gain: Tensor,
    channel_order: Tensor,
    widths: Sequence[int],
    block: int,
    grade: int,
    dtype: torch.dtype,
) -> Tensor:
    return row_scale.new_empty((channel_order.shape[0], row_scale.shape[0]), dtype=dtype)


# The backward for x takes the grades as constants: channel j of row m gets the gradient through its weights at
# the grade that the forward read. One dense matmul for each grade that occurs.


# The dispatcher leaves out trailing arguments that have their default values.


def _save_gemv(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    layer, (bias, budget, sections) = inputs[:10], _filled(inputs[10:], None, None, ())
    _save_for_backward(ctx, layer, bias, budget, None, sections)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    layer, optional = inputs[:10], _filled(inputs[10:], None, None, GRADED_ROWS, ())
    _save_for_backward(ctx, layer, *optional)


def _filled(given: tuple[Any, ...], *defaults: Any) -> tuple[Any, ...]:
    return *given, *defaults[len(given) :]


def _save_for_backward(
    ctx: Any,
    layer: tuple[Any, ...],
    bias: Tensor | None,
    budget: Tensor | None,
    max_graded_rows: int | None,
    sections: Sequence[int],
) -> None:
    x, planes, block_scale, row_scale, gain, order, channel_weight, thresholds, widths, block = layer
    ctx.save_for_backward(x, *planes, block_scale, row_scale, gain, order, channel_weight, thresholds, budget)
    ctx.widths, ctx.block, ctx.has_bias = widths, block, bias is not None
    ctx.max_graded_rows, ctx.sections = max_graded_rows, list(sections)


def _gradients(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    x, *planes, block_scale, row_scale, gain, order, channel_weight, thresholds, budget = ctx.saved_tensors
    rows = x.shape[:-1].numel()
    layer = (planes, block_scale, row_scale, gain, order, ctx.widths, ctx.block)
    grad_x = torch.zeros_like(x)
    if ctx.max_graded_rows is not None and rows > ctx.max_graded_rows:
        dense = torch.ops.grinqh.dequantize(*layer, len(planes), grad_y.dtype)
        grad_x = grad_y @ dense.T
    else:
        of_layer = (x, planes, order, channel_weight, thresholds, ctx.widths, budget, ctx.sections)
        stored = torch.ops.grinqh.grade(*of_layer)
        grades = torch.empty_like(stored).index_copy_(-1, order.long(), stored)
        outputs = ctx.sections or [grad_y.shape[-1]]
        by_section = list(zip(grades if ctx.sections else [grades], grad_y.split(outputs, -1), strict=True))
        for grade in range(1, len(planes) + 1):
            dense = torch.ops.grinqh.dequantize(*layer, grade, grad_y.dtype).split(outputs, -1)
            for (chosen, grad), weight in zip(by_section, dense, strict=True):
                grad_x += torch.where(chosen == grade, grad @ weight.T, 0)
    grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0) if ctx.has_bias else None
    gradients = (grad_x, [None] * len(planes), *(None,) * 8, grad_bias, *(None,) * 3)
    return gradients[: len(ctx.needs_input_grad)]


torch.library.register_autograd("grinqh::gemv", _gradients, setup_context=_save_gemv)
torch.library.register_autograd("grinqh::linear", _gradients, setup_context=_save_linear)
torch.library.register_autograd(
    "grinqh::gemv_read_bits",
    lambda ctx, grad_y, _: _gradients(ctx, grad_y),
    setup_context=_save_gemv,
)
