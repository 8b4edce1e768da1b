"""`python -m sparse_run` is the command `sparse-run`, which begins here: until its modules are imported, Ctrl-C just ends it."""

from __future__ import annotations

import os
import signal
import sys


def main() -> int:
    """Runs the command line of this process and returns its exit code."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.default_int_handler:  # ignored, as in the background, or the business of whoever set it
        from .cli import main as run

        return run()
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # nothing is open yet
    from .cli import main as run

    signal.signal(signal.SIGINT, handler)
    return run()


if __name__ == "__main__":
    sys.exit(main())
