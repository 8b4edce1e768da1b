"""Text to token ids and back. `Tokenizer` serves a packed model; `export_gguf` and `export_hf` write what it loads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .stream import TokenStream
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .export import export_gguf, export_hf

__all__ = ["TokenStream", "Tokenizer", "export_gguf", "export_hf"]


def __getattr__(name: str) -> Any:
    """The exporters are needed by conversions only and come when asked for."""
    if name not in ("export_gguf", "export_hf"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import export

    return getattr(export, name)
