"""sparse-run: language models on the processor you own.

>>> import sparse_run as sr
>>> with sr.load() as model:  # doctest: +SKIP
...     for piece in model.generate("Once upon a time", max_tokens=32):
...         print(piece, end="", flush=True)

Importing this loads nothing heavy; the parts come on first use. Everything raised on purpose is a `sparse_run.Error`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import (
    BudgetError,
    Cancelled,
    CheckFailed,
    ContextLengthError,
    Error,
    IsaError,
    ModelError,
    UnsupportedModelError,
    UsageError,
)

if TYPE_CHECKING:
    from .generation import Generation, Timings
    from .model import Message, Model, load
    from .sampling import Sampling
    from .session import Session
    from .template import ChatTemplate
    from .tokenizer import Tokenizer

    __version__: str

__all__ = [
    "BudgetError",
    "Cancelled",
    "ChatTemplate",
    "CheckFailed",
    "ContextLengthError",
    "Error",
    "Generation",
    "IsaError",
    "Message",
    "Model",
    "ModelError",
    "Sampling",
    "Session",
    "Timings",
    "Tokenizer",
    "UnsupportedModelError",
    "UsageError",
    "__version__",
    "load",
]

_HOMES = {
    "ChatTemplate": "template",
    "Generation": "generation",
    "Message": "model",
    "Model": "model",
    "Sampling": "sampling",
    "Session": "session",
    "Timings": "generation",
    "Tokenizer": "tokenizer",
    "load": "model",
    "__version__": "_core",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
