"""Exceptions of sparse_run and the exit code that the command line gives for each."""

from __future__ import annotations

import re

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_LONGEST = 2000


def one_line(text: str, longest: int = _LONGEST) -> str:
    """Text that may come from a stranger's file, fit for a terminal: one line, escape sequences written out, its middle
    left out where it is longer than `longest`.

    >>> one_line("red \\x1b[31m and\\nmore")
    'red \\\\x1b[31m and more'
    """
    if len(text) > longest:
        text = f"{text[: longest * 2 // 3]} [...] {text[-(longest // 3) :]}"
    return _CONTROL.sub(lambda found: " " if found[0] in "\t\n\r" else ascii(found[0])[1:-1], text)


class Error(Exception):
    """Base of all errors that sparse_run raises on purpose; the text says what is wrong and what to do, on one line."""

    exit_code = 1

    def __str__(self) -> str:
        return one_line(super().__str__())


class UsageError(Error):
    """An argument or option has an impossible value."""

    exit_code = 2


class CheckFailed(Error):
    """A check that the user asked for did not hold."""

    exit_code = 3


class ModelError(Error):
    """A model is missing, unreadable, damaged, or of a kind that is not supported."""

    exit_code = 4


class UnsupportedModelError(ModelError):
    """The file is sound, but its architecture, tensor type or tokenizer is not supported."""


class BudgetError(Error):
    """The memory budget, or the machine's memory, is too small."""

    exit_code = 5


class ContextLengthError(Error):
    """Prompt and answer do not fit into the context window."""


class IsaError(Error):
    """A forced instruction set is not built in or not available on this processor."""


class Cancelled(Error):
    """The computation was cancelled from another thread."""

    exit_code = 130
