"""Who a source is: a quick fingerprint that keys its conversion, and the full hash that is kept for the record.

The fingerprint covers size, date, and the content of the first and last MiB of every file, so that looking a conversion up
reads 2 MiB however large the model is.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ModelError
from .layout import LayoutChoice

# Part of every key: a change of what the converter writes makes all conversions anew.
CONVERTER_VERSION = 7
_EDGE = 1 << 20
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Identity:
    """`content` names the source, `key` its conversion with certain options; `size` in bytes; `date` is the newest
    modification, seconds since 1970."""

    content: str
    key: str
    size: int
    date: float


def identify(files: Sequence[Path], *, layout: LayoutChoice = "auto") -> Identity:
    """The identity of the source made of these files. Raises ModelError where one cannot be read."""
    digest = hashlib.sha256(f"converter {CONVERTER_VERSION}".encode())
    size, date = 0, 0
    for path in files:
        try:
            with open(path, "rb", buffering=0) as file:
                stat = os.fstat(file.fileno())
                # Links and copies under another name share a conversion; a changed date does not.
                digest.update(f"|{stat.st_size}|{stat.st_mtime_ns}|".encode())
                digest.update(file.read(_EDGE))
                if stat.st_size > 2 * _EDGE:
                    file.seek(-_EDGE, os.SEEK_END)
                digest.update(file.read(_EDGE))
        except FileNotFoundError:
            raise ModelError(f"{path}: no such file; check the path") from None
        except OSError as error:
            raise ModelError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
        size += stat.st_size
        date = max(date, stat.st_mtime_ns)
    content = digest.hexdigest()[:16]
    options = "" if layout == "auto" else f"-{layout}"
    return Identity(content, content + options, size, date / 1e9)


class BackgroundHash:
    """The sha256 of files, one after the other, computed in a thread while the conversion runs."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self._stop = False
        self._hash: str | None = None
        self._thread = threading.Thread(target=self._run, name="sparse-run-hash", daemon=True)
        self._thread.start()

    def result(self) -> str | None:
        """Waits; None where a file could not be read to its end."""
        self._thread.join()
        return self._hash

    def stop(self) -> None:
        """Gives up and waits for the thread to notice."""
        self._stop = True
        self._thread.join()

    def _run(self) -> None:
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(_CHUNK))
        try:
            for path in self._files:
                with open(path, "rb", buffering=0) as file:
                    while count := file.readinto(buffer):
                        if self._stop:
                            return
                        digest.update(buffer[:count])
        except OSError:
            return
        self._hash = digest.hexdigest()
