"""Attention of one new token for models with fewer key and value heads than query heads.

transformers' own implementations copy keys and values for every query head, or run a kernel with too few blocks to
fill a GPU. Here the query heads that share a key head read the cache together, where it is: on a GPU in one kernel, the
op `decode_attention`, elsewhere as rows of one batched product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from grinqh.device import has_cuda_kernels
from grinqh.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "grinqh_grouped"
KERNEL_DIMS = (64, 128, 256)  # numbers of a head that the op `decode_attention` is compiled for
_COMPILED = has_cuda_kernels()


def grouped_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls as an attention implementation; prompts and whatever is out of the ordinary go to sdpa.

    Args:
        module: the attention layer.
        query: [B, H, Q, D].
        key: [B, H_kv, L, D], H a multiple of H_kv.
        value: [B, H_kv, L, D'].
        attention_mask: bool (True: attend) or a number to add, [B or 1, 1, Q, L]; or None.
        dropout: probability.
        scaling: of the products of queries and keys; None for D ** -0.5.
        kwargs: of other implementations.

    Returns:
        [B, Q, H, D'], and None for the weights.

    Raises:
        InputError: the model needs what neither this nor sdpa does, which sdpa may leave out without a word.
    """
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise InputError(f"{NAME} attention has no {name}, which {type(module).__name__} needs")
    ordinary = kwargs.get("position_bias") is None and kwargs.get("cache") is None
    shared_mask = attention_mask is None or attention_mask.shape[1] == 1
    if query.shape[2] != 1 or dropout or not ordinary or not shared_mask:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return grouped_attention(query, key, value, attention_mask, scaling), None


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Attention of one query position, [B, 1, H, D']; shapes as for `grouped_attention_forward`, with Q = 1.

    What `has_kernel` says is one kernel; everything else, and all gradients, are products of torch.
    """
    if has_kernel(query, key, value, mask):
        return torch.ops.grinqh.decode_attention(query, key, value, mask, scaling)
    batch, heads, _, _ = query.shape
    groups, length = batch * key.shape[1], key.shape[2]
    # Scaled before the product, which could be too large for float16; a compiler makes it part of another kernel.
    rows = query.reshape(groups, -1, query.shape[-1]) * scaling  # [B * H_kv, H / H_kv, D]
    scores = torch.bmm(rows, key.flatten(0, 1).transpose(1, 2))
    if mask is not None:
        scores = _masked(scores.view(batch, -1, length), mask[:, 0, :, :length]).view(scores.shape)
    # Sums of the softmax are float32 for every dtype.
    products = torch.bmm(torch.softmax(scores, dim=-1), value.flatten(0, 1))
    return products.view(batch, 1, heads, value.shape[-1])


def has_kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether the op `decode_attention` takes these (docs/ops.md)."""
    tensors = (query, key, value)
    gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return (
        _COMPILED
        and query.is_cuda
        and not gradients
        and query.dtype in (torch.float16, torch.bfloat16)
        and all(tensor.dtype == query.dtype and tensor.shape[-1] in KERNEL_DIMS for tensor in tensors)
        and key.shape == value.shape
        and all(tensor.stride(3) == 1 and all(tensor.stride(d) % 8 == 0 for d in range(3)) for tensor in (key, value))
        and (mask is None or mask.dtype in (torch.bool, query.dtype))
    )


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    """The scores [B, H, L] under a mask [B or 1, 1, L]; a row that may attend to nothing stays finite."""
    if mask.dtype == torch.bool:
        return torch.where(mask, scores, torch.finfo(scores.dtype).min)
    return scores + mask


def use_grouped_attention(model: PreTrainedModel) -> None:
    """Makes a model of transformers decode with `grouped_attention`; prompts are processed by sdpa as before.

    Args:
        model: any model whose attention can be exchanged, converted or not.

    Raises:
        InputError: its attention cannot be exchanged.
    """
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise InputError(f"{type(model).__name__} does not let its attention be exchanged")


AttentionInterface.register(NAME, grouped_attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
