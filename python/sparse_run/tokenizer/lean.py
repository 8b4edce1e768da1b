"""The tokenizer of a process under a memory budget: ids become text by one table of bytes, which takes a twentieth of what the
library that cuts text into ids takes; that library is there only from a text's cutting to the answer's first token."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .tokenizer import CONFIG_FILE, JSON_FILE, Backend, JsonBackend, Tokenizer, read_config

MARGIN = 2 << 20
"""Bytes that loading may take beyond what it took the first time."""


def load_lean(directory: str | Path) -> LeanTokenizer | None:
    """The tokenizer of a packed model in its small form; None where it has no `tokenizer.json`, or where this system does not
    tell what a process takes. Raises ModelError where it is damaged."""
    folder = Path(directory)
    if not (folder / JSON_FILE).is_file() or not _memory("VmRSS:"):
        return None
    config = read_config(folder / CONFIG_FILE)
    import tokenizers  # noqa: F401 - stays: what is measured is the vocabulary

    before = _memory("VmRSS:")
    full = JsonBackend(folder / JSON_FILE)
    backend = LeanBackend(lambda: JsonBackend(folder / JSON_FILE), full)
    backend.peak_bytes = max(_memory("VmHWM:"), _memory("VmRSS:")) - before + MARGIN
    return LeanTokenizer(backend, config)


class LeanBackend:
    """`peak_bytes`: what loading the library's part takes at most. `set_aside(bytes)`: called before that is loaded, and with 0
    after it is gone; None: nobody has to make room."""

    def __init__(self, load: Callable[[], Backend], full: Backend) -> None:
        self._load = load
        self._lock = threading.Lock()
        self._full: Backend | None = None
        self.peak_bytes = 0
        self.set_aside: Callable[[int], None] | None = None
        self.n_vocab = full.n_vocab
        data, self._ends, self._control = bytearray(), array("I"), set[int]()
        for token in range(full.n_vocab):
            piece, control = full.piece(token)
            data += piece
            self._ends.append(len(data))
            if control:
                self._control.add(token)
        self._data = bytes(data)
        self._named = {self.piece(token)[0]: token for token in sorted(self._control, reverse=True) if self.piece(token)[0]}

    def encode(self, text: str, parse_special: bool) -> list[int]:
        with self._lock:
            return self._loaded().encode(text, parse_special)

    def piece(self, token: int) -> tuple[bytes, bool]:
        return self._data[self._ends[token - 1] if token else 0 : self._ends[token]], token in self._control

    def find(self, text: str) -> int | None:
        token = self._named.get(text.encode(errors="replace"))
        if token is not None:
            return token
        with self._lock:
            return self._loaded().find(text)

    def release(self) -> None:
        """Gives up what only cutting needs; the next text brings it back."""
        with self._lock:
            if self._full is not None:
                self._full = None
                if self.set_aside is not None:
                    self.set_aside(0)

    def _loaded(self) -> Backend:
        if self._full is None:
            if self.set_aside is not None:
                self.set_aside(self.peak_bytes)
            self._full = self._load()
        return self._full


class LeanTokenizer(Tokenizer):
    """A tokenizer whose larger part can be given up between texts."""

    _backend: LeanBackend

    def __init__(self, backend: LeanBackend, config: dict[str, Any]) -> None:
        super().__init__(backend, config)

    @property
    def peak_bytes(self) -> int:
        return self._backend.peak_bytes

    def attach(self, set_aside: Callable[[int], None]) -> None:
        self._backend.set_aside = set_aside

    def release(self) -> None:
        self._backend.release()


def _memory(key: str) -> int:
    """A line of this process's status in bytes; 0 where there is none."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 0
