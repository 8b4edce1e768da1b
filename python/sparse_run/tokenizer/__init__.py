"""Text to token ids and back. `Tokenizer` serves a packed model; `export_gguf` and `export_hf` write what it loads."""

from __future__ import annotations

from .export import export_gguf, export_hf
from .stream import TokenStream
from .tokenizer import Tokenizer

__all__ = ["TokenStream", "Tokenizer", "export_gguf", "export_hf"]
