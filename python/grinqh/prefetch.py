"""Layers that have the GPU fetch the beginning of the layer after them, while the kernels in between run."""

from __future__ import annotations

from torch import nn

from grinqh.model import packed_layers


def prefetch_next(model: nn.Module, enabled: bool = True) -> None:
    """Links the packed layers of a model, in the order in which they are registered and the last to the first.

    A linked layer's decoding kernel ends with a request to bring the first bits of the next layer's most important
    channels, up to 4 MiB, into the L2 cache: attention, norms and activations between two layers leave the GPU's memory
    idle. It is a hint: results are bit-equal with and without it, whatever order the layers are called in. Nothing
    happens on a CPU, nor between layers on different devices. Copies and saved models are not linked.

    Args:
        model: converted; its layers may move to another device later.
        enabled: False removes the links.

    Raises:
        InputError: the model has no packed layers.
    """
    layers = list(packed_layers(model).values())
    for layer, after in zip(layers, layers[1:] + layers[:1], strict=True):
        layer._next = (after,) if enabled and len(layers) > 1 else None
