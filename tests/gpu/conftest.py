"""Tests that need an NVIDIA GPU: `pytest tests/gpu`. Without one they are skipped."""

import sys
from pathlib import Path

import pytest
import torch

import grinqh  # noqa: F401  registers torch.ops.grinqh

sys.path.insert(0, str(Path(__file__).parent))  # for gpu_layers


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
