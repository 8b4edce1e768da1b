"""Exceptions of sparse_run and the exit code that the command line gives for each."""

from __future__ import annotations


class Error(Exception):
    """Base of all errors that sparse_run raises on purpose; the text says what is wrong and what to do."""

    exit_code = 1


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
