"""Decoder layers whose packed layers do what is around them: norms, activation and the additions of the residual.

A decode step runs a few microseconds of such kernels, and pauses between them, beside each packed layer. Here a decoder
layer's forward is replaced by one that gives this work to its four packed layers (`GrinqhLinear.fused`). Parameters and
modules stay what and where they were.
"""

from __future__ import annotations

import sys
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from grinqh.errors import InputError
from grinqh.fusion import FusedOutputs, FusedPart
from grinqh.linear import GrinqhLinear
from grinqh.model import packed_layers

# Of transformers, as the names of their classes begin. Their decoder layers differ in the norms of queries and keys
# and in where the attention's window is found.
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
PROJECTIONS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


def fuse_decoder(model: nn.Module, enabled: bool = True) -> None:
    """Makes the packed layers of a decoder do the norms, activations and additions around them, in place.

    It changes how decoder layers run, and nothing else: parameters, state dicts and saved files stay as they were, so
    a model that is loaded has to be fused again. Answers differ by rounding. A decoder layer runs as transformers has
    it where gradients are enabled (call the model under `torch.no_grad`, as `generate` does), in training mode, and
    while something in it has hooks, as in calibration. transformers leaves hooks in a model that has once been asked
    for attentions or hidden states.

    Args:
        model: holds decoder layers of transformers' Llama, Mistral, Qwen2 or Qwen3 (dense), converted with
            `GrinqhConfig(fuse=True)`.
        enabled: False gives the decoder layers their own forward back.

    Raises:
        InputError: no such layers, or one of them is not converted, has other modules than its family's, another
            activation than SiLU, or a forward that something else has replaced, by name; the model is then unchanged.
    """
    packed_layers(model)
    layers = {name: module for name, module in model.named_modules() if _family(module)}
    if not layers:
        raise InputError(f"{type(model).__name__} has no decoder layers of {', '.join(FAMILIES)}: others are not fused")
    if enabled:
        for name, layer in layers.items():
            _check(name, layer)
    for layer in layers.values():
        if _is_fused(layer):
            del layer.forward
        if enabled:
            layer.forward = FusedForward(layer).run


class FusedForward:
    """What runs in place of a decoder layer's forward.

    Args:
        layer: one that `_check` lets pass.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        attention = layer.self_attn
        code: Any = sys.modules[type(attention).__module__]
        self.rotate = code.apply_rotary_pos_emb
        self.eager_attention = code.eager_attention_forward
        window_of = attention.config if _family(layer) == "Mistral" else attention
        self.window: int | None = getattr(window_of, "sliding_window", None)

    def run(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Maps hidden states [B, Q, hidden size]; the arguments are those of transformers' decoder layers."""
        layer: Any = self.layer
        kwargs |= {"position_ids": position_ids, "use_cache": use_cache}
        if torch.is_grad_enabled() or layer.training or _is_hooked(layer):
            keywords = {"past_key_values": past_key_values, "position_embeddings": position_embeddings, **kwargs}
            return type(layer).forward(layer, hidden_states, attention_mask=attention_mask, **keywords)
        attended = self._attend(hidden_states, attention_mask, past_key_values, position_embeddings, kwargs)
        hidden_states = layer.self_attn.o_proj.fused(attended, residual=hidden_states)
        gates = layer.mlp.gate_up_proj.fused(hidden_states, **_norm(layer.post_attention_layernorm))
        return layer.mlp.down_proj.fused(gates, gated=True, residual=hidden_states)

    def _attend(self, hidden_states: Tensor, mask: Tensor | None, cache: Any, rotations: Any, kwargs: Any) -> Tensor:
        """Attention without its output projection, [B, Q, H * D], from the input of the decoder layer."""
        attention: Any = self.layer.self_attn
        qkv = attention.qkv_proj.fused(hidden_states, **_norm(self.layer.input_layernorm))
        parts = qkv.split(attention.q_proj.outputs.sizes, dim=-1)
        query, key, value = (part.view(*part.shape[:-1], -1, attention.head_dim) for part in parts)  # [B, Q, heads, D]
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        query, key = self.rotate(query, key, *rotations)
        if cache is not None:
            key, value = cache.update(key, value, attention.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, self.eager_attention)
        settings = {"dropout": 0.0, "scaling": attention.scaling, "sliding_window": self.window}
        attended, _ = attend(attention, query, key, value, mask, **settings, **kwargs)
        # Of another type under autocast.
        return attended.reshape(*hidden_states.shape[:-1], -1).to(hidden_states.dtype)


def _norm(norm: Any) -> dict[str, Any]:
    return {"norm_weight": norm.weight, "norm_eps": norm.variance_epsilon}


def _family(module: nn.Module) -> str | None:
    """The family that a module is a decoder layer of. Not that of a subclass: its forward may do something else."""
    kind = type(module)
    found = (family for family in FAMILIES if kind.__name__ == f"{family}DecoderLayer")
    return next(found, None) if kind.__module__.startswith("transformers.models.") else None


def _is_fused(layer: nn.Module) -> bool:
    forward = vars(layer).get("forward")
    return isinstance(forward, MethodType) and isinstance(forward.__self__, FusedForward)


def _is_hooked(layer: Any) -> bool:
    """Whether anything within the layer has a hook; those of fused siblings belong to what is replaced."""
    for parent in (layer, layer.self_attn, layer.mlp):
        for module in parent._modules.values():  # in every layer of every call: `children` takes three times as long
            if module is None or not (module._forward_pre_hooks or module._forward_hooks):
                continue
            for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
                if not isinstance(getattr(hook, "__self__", None), FusedOutputs):
                    return True
    return False


def _check(name: str, layer: Any) -> None:
    """Refuses a decoder layer whose own forward may do something else than the fused one."""
    family = _family(layer)
    for child, kind in {
        "input_layernorm": "RMSNorm", "self_attn": "Attention", "post_attention_layernorm": "RMSNorm", "mlp": "MLP"
    }.items():  # fmt: skip
        module = getattr(layer, child)
        if type(module).__name__ != f"{family}{kind}":
            raise InputError(f"{name}.{child} is a {type(module).__name__}, must be a {family}{kind} to be fused")
    for child in PROJECTIONS:
        parent, _, projection = child.rpartition(".")
        module = getattr(getattr(layer, parent), projection, None)
        if module is None:
            raise InputError(f"{name} has no {child}: convert with GrinqhConfig(fuse=True), naming none of its parts")
        if not isinstance(module, GrinqhLinear):
            raise InputError(f"{name}.{child} is a {type(module).__name__}, must be a packed layer to be fused")
    if not isinstance(layer.self_attn.q_proj, FusedPart):
        raise InputError(f"{name}.self_attn.q_proj is no part of qkv_proj")
    if type(layer.mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        raise InputError(f"{name}.mlp.act_fn is a {type(layer.mlp.act_fn).__name__}, must be SiLU to be fused")
    for child, module in layer.named_modules(prefix=name):
        if "forward" in vars(module) and not _is_fused(module):
            raise InputError(f"{child} has a forward that is not its class's, which fusing would leave out")
