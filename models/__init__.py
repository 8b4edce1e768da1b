"""The architectures: one file each, found by listing this folder. A file defines `ARCHITECTURE`.

To add one, add a file; nothing else needs to know (README.md says what goes into it).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .common import Architecture

_NOT_ARCHITECTURES = {"__init__", "common", "fields", "rope", "usual"}


def module_names() -> list[str]:
    """Names of the architecture files, sorted."""
    return sorted({path.stem for path in Path(__file__).parent.glob("*.py")} - _NOT_ARCHITECTURES)


def architectures() -> Iterator[Architecture]:
    """All architectures; imports their files."""
    for name in module_names():
        architecture: Architecture = importlib.import_module(f"{__name__}.{name}").ARCHITECTURE
        yield architecture


def find_gguf(name: str) -> Architecture | None:
    """The architecture for a GGUF file's `general.architecture`, or None."""
    return next((a for a in architectures() if name in a.gguf), None)


def find_hf(name: str) -> Architecture | None:
    """The architecture for a name in `architectures` of a Hugging Face config.json, or None."""
    return next((a for a in architectures() if name in a.hf), None)
