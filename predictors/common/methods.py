"""Which methods there are: the folders beside this one whose fit.py holds a `Fit` that is a Calibration. Nothing is listed by
hand, so that a method comes and goes with its folder."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from ...errors import UsageError
from .calibration import Calibration, Options

_HERE = Path(__file__).resolve().parent.parent


def candidates() -> list[str]:
    """Folders with an offline half, without loading any of them; "teal" first, where it is."""
    found = sorted(folder.parent.name for folder in _HERE.glob("*/fit.py"))
    return sorted(found, key=lambda name: name != "teal")


def module(name: str) -> ModuleType:
    """The fit.py of a method. Raises UsageError for a name that is none."""
    if name not in candidates():
        raise UsageError(f"{name!r} is no method; there are {', '.join(candidates())}")
    return importlib.import_module(f"{__package__.rpartition('.')[0]}.{name}.fit")


def fit_class(name: str) -> type[Calibration]:
    """A method's `Fit`. Raises UsageError where the method is not one of `calibrate`."""
    found = getattr(module(name), "Fit", None)
    if not (isinstance(found, type) and issubclass(found, Calibration)):
        raise UsageError(f"{name} is not calibrated to a level; see `sparse-run --help` for its command")
    return found


def calibrated() -> list[str]:
    """Names of the methods that have levels."""
    out = []
    for name in candidates():
        found = getattr(module(name), "Fit", None)
        if isinstance(found, type) and issubclass(found, Calibration):
            out.append(name)
    return out


def options(name: str, **values: Any) -> Options:
    """A method's options: of `values` those that it knows. Raises UsageError where one that it does not know differs from
    what None or the common default says."""
    kind = getattr(module(name), "Options", Options)
    known = {field.name: field.default for field in dataclasses.fields(kind)}
    for key, value in values.items():
        if key not in known and value is not None:
            raise UsageError(f"--{key.replace('_', '-')} is not an option of {name}")
    made = kind(**{key: value for key, value in values.items() if key in known and value is not None})
    assert isinstance(made, Options)
    return made
