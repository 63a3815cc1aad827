"""Where a model runs: the CPU or an NVIDIA GPU, as far as torch finds one and the compiled ops have kernels for it."""

from __future__ import annotations

import torch

from grinqh.errors import InputError
from grinqh.ops import cpu_isa


def find_device(device: str | torch.device | None) -> torch.device:
    """The device of that name: "cpu" (or None), "cuda" (the current GPU), "cuda:N"; "auto": the first GPU or the CPU.

    Raises:
        InputError: another name, or a device that is not there.
    """
    found = available_devices()
    name = "cpu" if device is None else str(device)
    if name == "auto":
        return torch.device(found[1] if len(found) > 1 else "cpu")
    if name == "cuda" and len(found) > 1:
        name = f"cuda:{torch.cuda.current_device()}"
    if name not in found:
        why = "" if len(found) > 1 else f" ({_why_no_gpu()})"
        raise InputError(
            f"device is {str(device)!r}, must be auto, cpu, cuda or cuda:N; available here: {', '.join(found)}{why}"
        )
    return torch.device(name)


def available_devices() -> list[str]:
    """Names of the devices that models run on here: the CPU, then the GPUs."""
    gpus = torch.cuda.device_count() if has_cuda_kernels() and torch.cuda.is_available() else 0
    return ["cpu", *(f"cuda:{index}" for index in range(gpus))]


def describe_device(device: torch.device) -> str:
    """The device with the GPU's name, or with the kernels that the CPU uses."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    unused = torch.cuda.is_available() and not has_cuda_kernels()
    return f"{device} ({cpu_isa()} kernels{'; ' + _why_no_gpu() if unused else ''})"


def has_cuda_kernels() -> bool:
    """Whether the compiled ops were built for GPUs."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("grinqh::gemv", "CUDA")


def _why_no_gpu() -> str:
    return "torch finds no NVIDIA GPU" if has_cuda_kernels() else "this build of grinqh has no CUDA kernels"
