"""Which methods there are: the folders beside this one whose fit.py holds a `Fit` that is a Calibration, and the variants
that such a file names in `FITS`. Nothing is listed by hand, so that a method comes and goes with its folder."""

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
    """The fit.py of a method, or of the folder of which it is a variant. Raises UsageError for a name that is none."""
    for folder in sorted(candidates(), key=lambda folder: folder != name):
        found = importlib.import_module(f"{__package__.rpartition('.')[0]}.{folder}.fit")
        if folder == name or name in getattr(found, "FITS", {}):
            return found
    raise UsageError(f"{name!r} is no method; there are {', '.join(calibrated())}")


def fit_class(name: str) -> type[Calibration]:
    """A method's `Fit`. Raises UsageError where the method is not one of `calibrate`."""
    of = module(name)
    found = getattr(of, "FITS", {}).get(name, getattr(of, "Fit", None))
    if not (isinstance(found, type) and issubclass(found, Calibration)):
        raise UsageError(f"{name} is not calibrated to a level; see `sparse-run --help` for its command")
    return found


def calibrated() -> list[str]:
    """Names of the methods that have levels."""
    out = []
    for folder in candidates():
        of = module(folder)
        for name, found in {folder: getattr(of, "Fit", None), **getattr(of, "FITS", {})}.items():
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
