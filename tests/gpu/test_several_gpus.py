"""Several GPUs: ops follow their tensors' device, and a model shared out gives what one GPU gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gpu_processes
import pytest
import torch
from gpu_layers import make_layer, make_x
from torch import Tensor

pytest.importorskip("transformers")
if torch.cuda.device_count() < 2:
    pytest.skip("needs two NVIDIA GPUs", allow_module_level=True)

ops = torch.ops.grinqh


def test_ops_run_on_the_device_of_their_tensors_whatever_the_current_one() -> None:
    k = 700
    layer, x = make_layer(900, k).cuda(), make_x(20, k, torch.float16).cuda()
    arguments = layer.arguments()
    elsewhere = tuple(
        [t.to("cuda:1") for t in a] if isinstance(a, list) and isinstance(a[0], Tensor) else
        a.to("cuda:1") if isinstance(a, Tensor) else a
        for a in arguments
    )  # fmt: skip
    assert torch.cuda.current_device() == 0
    for rows in (1, 3, 8, 20):
        here = ops.linear(x[:rows], *arguments, 8)
        there = ops.linear(x[:rows].to("cuda:1"), *elsewhere, 8)
        assert there.device == torch.device("cuda:1")
        assert torch.equal(there.cpu(), here.cpu())
    with pytest.raises(RuntimeError, match=r"is on cuda:1: it must be on cuda:0"):
        ops.gemv(x[:1], *elsewhere)


@pytest.fixture(scope="module")
def on_two_gpus(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("gpus")
    torch.multiprocessing.spawn(gpu_processes.run, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def on_one_gpu() -> dict[str, Any]:
    return gpu_processes.work()


@pytest.mark.parametrize("name", gpu_processes.NAMES)
@pytest.mark.parametrize("bits", [8, 3])
def test_two_gpus_give_what_one_gives(
    on_one_gpu: dict[str, Any], on_two_gpus: list[dict[str, Any]], name: str, bits: int
) -> None:
    one, first, second = on_one_gpu[name], *(found[name] for found in on_two_gpus)
    assert all(torch.equal(first[what], second[what]) for what in one)
    assert torch.equal(first[f"tokens at {bits}"], one[f"tokens at {bits}"])
    torch.testing.assert_close(first[f"read bits at {bits}"], one[f"read bits at {bits}"], rtol=1e-2, atol=1e-2)
    for what, allowed in (("prompt", 2e-3), ("logits", 2e-3 if bits == 8 else 3e-2)):
        found, expected = first[f"{what} at {bits}"], one[f"{what} at {bits}"]
        assert float((found - expected).norm() / expected.norm()) < allowed
