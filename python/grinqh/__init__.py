"""GRINQH: weights quantized to nested planes of bits, read as far as each token needs.

`import grinqh` registers the ops `torch.ops.grinqh.*` and makes transformers' `from_pretrained` load GRINQH models.
Everything else is imported when it is first used; without torch, `grinqh._core` alone can be used.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grinqh.attention import use_grouped_attention
    from grinqh.calibration import CalibrationReport, calibrate, record_dial
    from grinqh.config import GrinqhConfig, LayerFormat
    from grinqh.decoder import fuse_decoder
    from grinqh.dial import DialDrift, DialTable, dial_drift, dial_table, set_bits
    from grinqh.errors import InputError
    from grinqh.heads import rotate_heads
    from grinqh.linear import GrinqhLinear
    from grinqh.loading import from_pretrained
    from grinqh.model import (
        ReadStats,
        TokenReads,
        count_reads,
        graded,
        packed_bytes,
        packed_layers,
        quantize_model,
        read_stats,
        reset_read_stats,
        stored_bits,
        token_reads,
    )
    from grinqh.parallel import tensor_parallel
    from grinqh.schedule import BitsSchedule

_MODULES = {
    "attention": ("use_grouped_attention",),
    "calibration": ("CalibrationReport", "calibrate", "record_dial"),
    "config": ("GrinqhConfig", "LayerFormat"),
    "decoder": ("fuse_decoder",),
    "dial": ("DialDrift", "DialTable", "dial_drift", "dial_table", "set_bits"),
    "errors": ("InputError",),
    "heads": ("rotate_heads",),
    "linear": ("GrinqhLinear",),
    "loading": ("from_pretrained",),
    "model": (
        "ReadStats",
        "TokenReads",
        "count_reads",
        "graded",
        "packed_bytes",
        "packed_layers",
        "quantize_model",
        "read_stats",
        "reset_read_stats",
        "stored_bits",
        "token_reads",
    ),
    "parallel": ("tensor_parallel",),
    "schedule": ("BitsSchedule",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "BitsSchedule",
    "CalibrationReport",
    "DialDrift",
    "DialTable",
    "GrinqhConfig",
    "GrinqhLinear",
    "InputError",
    "LayerFormat",
    "ReadStats",
    "TokenReads",
    "calibrate",
    "count_reads",
    "dial_drift",
    "dial_table",
    "from_pretrained",
    "fuse_decoder",
    "graded",
    "packed_bytes",
    "packed_layers",
    "quantize_model",
    "read_stats",
    "record_dial",
    "reset_read_stats",
    "rotate_heads",
    "set_bits",
    "stored_bits",
    "tensor_parallel",
    "token_reads",
    "use_grouped_attention",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"grinqh.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'grinqh' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]


if find_spec("torch"):
    from grinqh import ops as ops
    from grinqh.registration import register_with_transformers

    register_with_transformers()
