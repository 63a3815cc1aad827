"""Layers that an interrupted conversion has packed, kept on the disk for the next one."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from types import TracebackType
from typing import IO, Any
from urllib.parse import quote

from safetensors.torch import load, save

from grinqh import packing
from grinqh.checkpoint import read_specs
from grinqh.config import LayerFormat
from grinqh.errors import InputError

MARKER = "conversion.json"  # tells such a folder from others, and one conversion from others


def fingerprint(facts: Any) -> str:
    """Tells conversions apart by all that their packed layers depend on, given as JSON."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class KeptLayers:
    """The folder of packed layers beside OUT; to be entered before use, and left to unlock it.

    Layers of another fingerprint are deleted on entering. With `enabled` false, all are, and none is kept.

    Raises:
        InputError: on entering: the folder is none of ours, or another conversion is using it.
    """

    def __init__(self, out: Path, fingerprint: str, *, enabled: bool = True) -> None:
        self.folder = out.absolute().parent / f"{out.absolute().name}.packing"
        self.fingerprint = fingerprint
        self.enabled = enabled
        self.taken = 0  # layers that were not packed again
        self._lock: IO[str] | None = None

    def __enter__(self) -> KeptLayers:
        marker = self.folder / MARKER
        if self.folder.exists() and not marker.is_file() and any(self.folder.iterdir()):
            raise InputError(f"{self.folder} holds something else than packed layers: give another OUT, or remove it")
        if not self.enabled and not self.folder.exists():
            return self
        self.folder.mkdir(exist_ok=True)
        self._lock = marker.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise InputError(f"another conversion to the same OUT is using {self.folder}") from error
        if not self.enabled:
            self.discard()
            return self
        self._lock.seek(0)
        if self._lock.read() != self.fingerprint:
            for file in self.folder.glob("*.safetensors*"):
                file.unlink()
            self._lock.truncate(0)
            self._lock.write(self.fingerprint)
            self._lock.flush()
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if self._lock is not None:
            self._lock.close()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within it `packed` takes layers from here and keeps them here.

        A refusal of the input deletes them, but not one that another error caused (a full disk, say).
        """
        token = _IN_USE.set(self if self.enabled else None)
        try:
            yield
        except InputError as error:
            if error.__cause__ is None or not any(self.folder.glob("*.safetensors")):
                self.discard()
            raise
        finally:
            _IN_USE.reset(token)

    def load(
        self, name: str, format: LayerFormat, in_features: int, out_features: int, dial_points: int
    ) -> packing.PackedTensors | None:
        """A layer's tensors on the CPU; None where there are none, or damaged ones."""
        file = self._file(name)
        if not file.is_file():
            return None
        try:
            packing.check_specs(name, format, in_features, out_features, False, dial_points, read_specs(file))
            # Clones, for the tensors that `load` gives share memory.
            tensors = {tensor: data.clone() for tensor, data in load(file.read_bytes()).items()}
            packing.check_values(name, tensors)
        except InputError:
            return None
        self.taken += 1
        return tensors

    def save(self, name: str, tensors: packing.PackedTensors) -> None:
        """Keeps a layer; its file has its name only when it is whole."""
        file = self._file(name)
        partial = file.with_name(f"{file.name}.partial")
        with partial.open("wb") as stream:
            stream.write(save({tensor: data.cpu().contiguous() for tensor, data in tensors.items()}))
            stream.flush()
            os.fsync(stream.fileno())
        partial.rename(file)

    def discard(self) -> None:
        """Removes the folder."""
        with suppress(FileNotFoundError):
            shutil.rmtree(self.folder)

    def _file(self, name: str) -> Path:
        return self.folder / f"{quote(name, safe='')}.safetensors"


_IN_USE: ContextVar[KeptLayers | None] = ContextVar("grinqh_kept_layers", default=None)


def packed(
    name: str,
    shape: tuple[int, ...],
    format: LayerFormat,
    dial_points: int,
    pack: Callable[[], packing.PackedTensors],
) -> packing.PackedTensors:
    """A layer's tensors, from the kept ones where there are some, else from `pack`, and then kept.

    Args:
        name: the layer's.
        shape: of its weight, [out_features, in_features].
        format: the layer's.
        dial_points: entries of its dial.
        pack: makes the tensors.
    """
    kept = _IN_USE.get()
    if kept is None or len(shape) != 2:
        return pack()
    tensors = kept.load(name, format, shape[1], shape[0], dial_points)
    if tensors is None:
        tensors = pack()
        kept.save(name, tensors)
    return tensors
