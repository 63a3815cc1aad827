"""Makes transformers know GRINQH models, without importing transformers before somebody else does."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_QUANTIZERS = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Registers the quantizer of `grinqh.hf` now if transformers' quantizers are loaded, else right after they are."""
    if _QUANTIZERS in sys.modules:
        import_module("grinqh.hf")
    else:
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Lets transformers' quantizers be imported as usual, and imports `grinqh.hf` when that is done."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _QUANTIZERS:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            import_module("grinqh.hf")

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
