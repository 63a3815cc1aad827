"""transformers: `from_pretrained` and `save_pretrained` of converted models.

`grinqh.registration` imports this module when transformers loads its own quantizers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from grinqh import packing
from grinqh.checkpoint import read_specs
from grinqh.config import QUANT_METHOD, GrinqhConfig
from grinqh.dial import restore_dial
from grinqh.errors import InputError
from grinqh.fusion import fuse_linears, sections_of
from grinqh.linear import GrinqhLinear
from grinqh.model import linear_layers, packed_layers
from grinqh.packing import TensorSpec
from grinqh.streaming import expect_weights, pack_rest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LayerSpecs = dict[str, TensorSpec]


class GrinqhQuantizer(HfQuantizer):
    """Loads converted models; converts others while they are loaded."""

    requires_calibration = False
    quantization_config: GrinqhConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        """Puts empty packed layers in place, after checking that the files hold just what they need.

        The loader itself would only report a missing tensor, and leave random weights in its place.
        """
        config = self.quantization_config
        _refuse_tensor_parallel(model)
        if not self.pre_quantized:
            expect_weights(model, config)
            return
        layers = linear_layers(model, config, check=False)
        if config.fuse:
            fuse_linears(model, config, layers)
        found = _find_packed(model, layers, _read_checkpoint(checkpoint_files))
        for name, linear in layers.items():
            bias = linear.bias is not None
            format, points, sections = config.format(name), int(config.dial_grid[2]), sections_of(linear)
            packing.check_specs(
                name, format, linear.in_features, linear.out_features, bias, points, found[name], max(1, len(sections))
            )
            kept = format.within(config.stored_bits_to_load)
            unread = {packing.plane_name(p) for p in range(kept.planes, format.planes)}
            model._keys_to_ignore_on_load_unexpected |= {re.escape(f"{name}.{plane}") for plane in unread}
            tensors = {
                tensor: torch.empty(spec.shape, dtype=spec.dtype, device="meta")
                for tensor, spec in found[name].items()
                if tensor not in unread
            }
            if bias:
                tensors["bias"] = linear.bias
            model.set_submodule(name, GrinqhLinear(tensors, kept, sections=sections))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        config = self.quantization_config
        if not self.pre_quantized:
            pack_rest(model, config)
            return
        for name, layer in packed_layers(model).items():
            packing.check_values(name, layer.tensors)
            layer.set_packed(packing.keep_planes(layer.tensors, layer.format.planes), layer.format)
        config.keep_planes(config.stored_bits_to_load)
        restore_dial(model)

    def is_serializable(self) -> bool:
        """`save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The packed weights cannot be trained."""
        return False

    @property
    def is_compileable(self) -> bool:
        """`generate` may compile the model."""
        return True


def _refuse_tensor_parallel(model: PreTrainedModel) -> None:
    # transformers' loader cuts each tensor of a layer alike, along one of its dimensions. The channels of a range of
    # inputs lie all over the packed planes.
    world = getattr(getattr(model.config, "distributed_config", None), "tp_size", None) or 1
    if world > 1:
        raise InputError(
            f"tensor parallelism (tp_plan, or distributed_config with tp_size) of {world} processes is asked of the "
            "loader, must not be for a GRINQH model: load it whole on every process and call "
            "grinqh.tensor_parallel(model)"
        )


def _read_checkpoint(files: Sequence[str] | None) -> LayerSpecs:
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        raise InputError(f"a GRINQH model is loaded from safetensors files, not from {files}")
    specs: LayerSpecs = {}
    for file in files:
        if not Path(file).is_file():
            raise InputError(f"{file} does not exist: the index of the weight files names it")
        specs |= read_specs(file)
    return specs


def _find_packed(
    model: PreTrainedModel, layers: Mapping[str, nn.Linear], checkpoint: Mapping[str, TensorSpec]
) -> dict[str, LayerSpecs]:
    """The checkpoint's tensors of each layer to be loaded.

    Raises:
        InputError: the checkpoint holds a packed layer that the model and its config do not.
    """
    # Names in the file may differ from the model's: older names, or those of a model with a head for one without.
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    tensors = {tensor for spec in checkpoint for tensor in [spec.rpartition(".")[2]]}
    known = {f"{layer}.{tensor}": True for layer in layers for tensor in tensors}
    prefix = f"{model.base_model_prefix}."
    is_base_model = not hasattr(model, model.base_model_prefix)
    found: dict[str, LayerSpecs] = {name: {} for name in layers}
    for key, spec in checkpoint.items():
        name, _ = rename_source_key(key, renamings, [], model.base_model_prefix, known)
        layer, _, tensor = name.rpartition(".")
        if layer in found:
            found[layer][tensor] = spec
        elif tensor == packing.plane_name(0) and not (is_base_model and not key.startswith(prefix)):
            raise InputError(
                f"{key} is in the checkpoint, but {layer} is no layer to be packed by the model's config "
                f"(modules_to_not_convert, convert_lm_head, or the model's own settings)"
            )
    return found


def _register() -> None:
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = GrinqhConfig
    auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = GrinqhQuantizer
    # Without this, a GrinqhConfig given to from_pretrained for a converted model would be ignored.
    if GrinqhConfig not in auto.LOADING_ATTRIBUTES_CONFIG_TYPES:
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (GrinqhConfig,)


_register()
