"""Long work that runs while other tests do: builds and emulated programs that tests wait for, at the lowest priority.

A test module that defines `ahead(work, items)` is called once, when its tests `items` are chosen, and submits what they will
wait for. When the session ends, what is left is stopped.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Work:
    """Two pieces at a time, in the order submitted; `run` is how they start programs."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(2)
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def submit(self, piece: Callable[[], T]) -> Future[T]:
        return self._pool.submit(piece)

    def run(self, command: Sequence[str], timeout: float | None = None) -> subprocess.CompletedProcess[str]:
        """As subprocess.run with captured text, giving way to all other processes."""
        with self._lock:
            if self._stopped:
                raise CancelledError
            process = subprocess.Popen(
                ["nice", "-n", "19", *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # so that its own children end with it
            )
            self._running.add(process)
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            self._kill(process)
            raise
        finally:
            with self._lock:
                self._running.discard(process)
        return subprocess.CompletedProcess(list(command), process.returncode, out, err)

    @staticmethod
    def _kill(process: subprocess.Popen[str]) -> None:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)  # ninja passes it on to compilers, which have groups of their own
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def stop(self) -> None:
        """Ends what runs and forgets what waits."""
        with self._lock:
            self._stopped = True
            running = list(self._running)
        for process in running:
            self._kill(process)
        self._pool.shutdown(cancel_futures=True)
