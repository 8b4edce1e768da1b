"""The sparsity file: thresholds for one model with the levels, corpus and quality they were made with.

`<packed model>/sparsity/<name>.safetensors` holds F32 tensors `layers.<i>.<site>` of one or of width(site) thresholds; a
layer and site without a tensor is dense. Tensors `predictor.*` and `clusters.*` belong to the methods that need them.
Everything else is in its metadata. A file made for another model, quantisation or version, or that is damaged, is refused.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ModelError, UsageError
from .packed_header import SITES, PackedHeader, read_header

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from . import _core
    from .tokenizer import Tokenizer

FORMAT = "sparse-run-sparsity"
VERSION = 1
SUFFIX = ".safetensors"
AUTO_NAMES = ("auto", "teal-1pct")
"""What `auto` looks for, in this order."""

_JSON_FIELDS = ("options", "levels", "quality")
_LATER = "predictor."  # what the names of arrays begin with that are read when they are wanted
_OWN = (_LATER, "clusters.")  # what the names of a method's own arrays begin with
_AGAIN = "make it again with `sparse-run calibrate`"


class Stored(Mapping[str, "NDArray[Any]"]):
    """Arrays of a sparsity file that are read each time they are asked for: predictors are as large as a share of the model,
    and the core keeps a copy of its own. Raises ModelError where the file cannot be read any more."""

    def __init__(self, path: Path, names: list[str]) -> None:
        self._path, self._names = path, dict.fromkeys(names)

    def __getitem__(self, name: str) -> NDArray[Any]:
        from safetensors import SafetensorError, safe_open

        if name not in self._names:
            raise KeyError(name)
        try:
            with safe_open(self._path, framework="np") as opened:
                array: NDArray[Any] = opened.get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelError(f"{self._path}: {name} cannot be read any more ({error}); {_AGAIN}") from None
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __len__(self) -> int:
        return len(self._names)


@dataclass
class SparsityFile:
    """What a sparsity file says. `thresholds`: site -> one entry a layer, None (dense), [1] or [width] float32.
    `levels`: site -> share of inputs below the threshold, one a layer. `quality`: what calibration measured."""

    method: str
    thresholds: dict[str, list[NDArray[np.float32] | None]]
    levels: dict[str, list[float]]
    dense_tokens: int
    model_name: str
    fingerprint: str
    shape: str
    quantisation: str
    options: dict[str, Any] = field(default_factory=dict)
    corpus: str = ""
    """sha256 over the calibration tokens."""
    n_tokens: int = 0
    quality: dict[str, Any] = field(default_factory=dict)
    tool_version: str = ""
    date: str = ""
    path: Path | None = None
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """What a method keeps besides thresholds, by name: `predictor.*` (Deja Vu), `clusters.*` (CoreInfer)."""

    @property
    def name(self) -> str:
        return self.path.stem if self.path is not None else ""

    def plan(self, model: _core.Model) -> _core.Sparsity:
        """The thresholds, bound to an opened model for `Session.set_sparsity`."""
        from . import _core
        from .bench.breakeven import known_break_evens

        known = known_break_evens(self.fingerprint, model.isa, model.threads)
        return _core.Sparsity(model, self.thresholds, dense_tokens=self.dense_tokens, break_even=known)

    @property
    def skips_nothing(self) -> bool:
        return not any(map(any, self.levels.values()))

    def faster(self) -> bool:
        """Whether calibration measured sparse decoding to be faster than dense decoding."""
        sparse, dense = self.quality.get("tokens_per_s"), self.quality.get("tokens_per_s_dense")
        return isinstance(sparse, float) and isinstance(dense, float) and sparse > dense


def folder(packed: str | Path) -> Path:
    """Where a packed model's sparsity files are."""
    return Path(packed) / "sparsity"


def names(packed: str | Path) -> list[str]:
    """Names of a packed model's sparsity files."""
    try:
        return sorted(p.stem for p in folder(packed).iterdir() if p.suffix == SUFFIX and not p.name.startswith("."))
    except OSError:
        return []


def path_of(packed: str | Path, name: str) -> Path:
    """The file of a name. Raises UsageError for a name that is no plain file name."""
    if not name or name.startswith(".") or any(c in name for c in "/\\:\0") or name.lower() == "off":
        raise UsageError(f"{name!r} cannot name a sparsity file; use letters, digits, dots and dashes")
    return folder(packed) / f"{name}{SUFFIX}"


def save(file: SparsityFile, target: str | Path) -> Path:
    """Writes a file: first under a temporary name beside it, then renamed, so that it is whole or not there."""
    import numpy as np
    from safetensors.numpy import save as to_bytes

    target = Path(target)
    tensors = {
        f"layers.{i}.{site}": np.ascontiguousarray(t, dtype=np.float32)
        for site, layers in file.thresholds.items()
        for i, t in enumerate(layers)
        if t is not None
    }
    tensors |= {name: np.ascontiguousarray(a) for name, a in file.arrays.items() if name.startswith(_OWN)}
    values: dict[str, Any] = {
        "format": FORMAT,
        "version": str(VERSION),
        "method": file.method,
        "dense_tokens": str(file.dense_tokens),
        "model_name": file.model_name,
        "fingerprint": file.fingerprint,
        "shape": file.shape,
        "quantisation": file.quantisation,
        "corpus": file.corpus,
        "n_tokens": str(file.n_tokens),
        "tool_version": file.tool_version,
        "date": file.date,
        **{key: json.dumps(getattr(file, key), sort_keys=True) for key in _JSON_FIELDS},
    }
    data = to_bytes(tensors, metadata=values)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=".part", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    file.path = target
    return target


def load(path: str | Path, header: PackedHeader) -> SparsityFile:
    """Reads a file and checks that it was made for this model.

    Raises ModelError, in one line that says what to do, where the file cannot be read, is truncated, of an unknown version,
    holds impossible thresholds, or was made for another model or quantisation.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path}: no such sparsity file; make one with `sparse-run calibrate`")
    try:
        with safe_open(path, framework="np") as opened:
            meta = dict(opened.metadata() or {})
            there = list(opened.keys())
            later = [name for name in there if name.startswith(_LATER)]
            tensors = {name: opened.get_tensor(name) for name in there if not name.startswith(_LATER)}
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path}: damaged or cut off ({error}); {_AGAIN}") from None
    if meta.get("format") != FORMAT:
        raise ModelError(f"{path}: not a sparsity file; {_AGAIN}")
    if meta.get("version") != str(VERSION):
        raise ModelError(
            f"{path}: version {meta.get('version')} of the sparsity file is not known here (this tool reads {VERSION}); "
            "update sparse-run, or make the file again"
        )
    try:
        decoded = {key: json.loads(meta[key]) for key in _JSON_FIELDS}
        file = SparsityFile(
            method=meta["method"],
            thresholds={},
            levels={str(site): [float(s) for s in levels] for site, levels in decoded["levels"].items()},
            dense_tokens=int(meta["dense_tokens"]),
            model_name=meta["model_name"],
            fingerprint=meta["fingerprint"],
            shape=meta["shape"],
            quantisation=meta["quantisation"],
            options=decoded["options"],
            corpus=meta["corpus"],
            n_tokens=int(meta["n_tokens"]),
            quality=decoded["quality"],
            tool_version=meta["tool_version"],
            date=meta["date"],
            path=path,
        )
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: its metadata is damaged ({type(error).__name__}: {error}); {_AGAIN}") from None
    _check_model(file, header)
    own = {name: tensors.pop(name) for name in list(tensors) if name.startswith(_OWN)}
    if own and later:
        raise ModelError(f"{path}: holds predictors and clusters; {_AGAIN}")
    file.arrays = Stored(path, later) if later else own
    file.thresholds = _thresholds(path, tensors, header)
    return file


def _check_model(file: SparsityFile, header: PackedHeader) -> None:
    if file.fingerprint == header.fingerprint:
        return
    name = header.config.get("name") or header.path.name
    hint = "thresholds hold for one conversion only; make some with `sparse-run calibrate`"
    if file.shape != header.shape:
        raise ModelError(f"{file.path}: made for another model ({file.model_name}), not for {name}; {hint}")
    if file.quantisation != header.quantisation:
        raise ModelError(
            f"{file.path}: made for another quantisation of this model ({file.quantisation}; this one is "
            f"{header.quantisation}); {hint}"
        )
    raise ModelError(f"{file.path}: made for other weights of this shape ({file.model_name}), not for {name}; {hint}")


def _thresholds(
    path: Path, tensors: dict[str, NDArray[Any]], header: PackedHeader
) -> dict[str, list[NDArray[np.float32] | None]]:
    import numpy as np

    sites = (*SITES, "G")
    out: dict[str, list[NDArray[np.float32] | None]] = {site: [None] * header.n_layers for site in SITES}
    again = "make the file again with `sparse-run calibrate`"
    for name, values in tensors.items():
        words = name.split(".")
        known = len(words) == 3 and words[0] == "layers" and words[1].isdigit() and words[2] in sites
        if not known or int(words[1]) >= header.n_layers:
            raise ModelError(f"{path}: tensor {name} belongs to no layer and site of this model; {again}")
        site = words[2]
        if values.dtype != np.float32 or values.shape not in ((1,), (header.width(site),)):
            raise ModelError(
                f"{path}: tensor {name} is {values.dtype} {list(values.shape)}, wanted float32 of 1 or "
                f"{header.width(site)}; {again}"
            )
        if not (values >= 0).all():  # NaN is not >= 0
            raise ModelError(f"{path}: tensor {name} holds NaN or negative thresholds; {again}")
        out.setdefault(site, [None] * header.n_layers)[int(words[1])] = values
    return out


def parse_level(text: str) -> float | None:
    """`text` as a level, or None where it is no number. Raises UsageError for a number outside 0..1.

    >>> parse_level("0.5"), parse_level("teal")
    (0.5, None)
    """
    try:
        level = float(text)
    except ValueError:
        return None
    if not math.isfinite(level) or not 0 <= level <= 1:
        raise UsageError(f"a sparsity level of {text} is outside 0..1; 0.4 skips 40% of the inputs")
    return level


def looks_like_path(text: str) -> bool:
    return text.lower().endswith(SUFFIX) or "/" in text or os.sep in text


def find_auto(header: PackedHeader) -> tuple[SparsityFile | None, str]:
    """What `--sparsity auto` means for a model: a file or None, and the sentence that says why."""
    there = names(header.path)
    for name in AUTO_NAMES:
        if name not in there:
            continue
        file = load(path_of(header.path, name), header)
        if file.skips_nothing:
            return None, f"sparsity off: {name} skips nothing: nothing within its budget saves time"
        if file.faster():
            return file, f"sparsity {name}"
        return None, f"sparsity off: {name} was measured no faster than dense decoding on the machine that made it"
    return None, "sparsity off: no file named auto and no 1% preset; make one with `sparse-run calibrate`"


def resolve(choice: str, header: PackedHeader) -> SparsityFile:
    """The file that NAME or FILE means. Raises UsageError where there is none, ModelError where it cannot be used."""
    if looks_like_path(choice):
        return load(os.path.expanduser(choice), header)
    path = path_of(header.path, choice)
    if not path.is_file():
        there = names(header.path)
        have = f"this model has: {', '.join(there)}" if there else "this model has none"
        raise UsageError(f"no sparsity file named {choice!r}; {have}; make one with `sparse-run calibrate`")
    return load(path, header)


def choose(
    choice: str,
    header: PackedHeader,
    model: _core.Model,
    tokenizer: Tokenizer,
    *,
    say: Callable[[str], object] | None = None,
    tick: Callable[[str, float, float], None] | None = None,
) -> SparsityFile | None:
    """What `--sparsity` means: off (None), auto, a LEVEL 0..1 (calibrated now, on text of the model's own, where that has
    not been done yet), a NAME, or a FILE. say: called with what `auto` decided, and before a level is calibrated."""
    if choice == "off":
        return None
    if choice == "auto":
        file, why = find_auto(header)
        if say is not None:
            say(why)
        return file
    level = parse_level(choice)
    if level is None:
        return resolve(choice, header)
    from .predictors.teal.fit import Fit, Options, level_name

    path = path_of(header.path, level_name(level))
    if path.is_file():
        try:
            return load(path, header)
        except ModelError:
            pass  # of an older version, or damaged: it is only a cache, and made again
    if say is not None:
        say(
            f"level {level:g} is not calibrated yet for this model: that is done now, on text of the model's own, and "
            "kept for later runs; started again after Ctrl-C it goes on where it was"
        )
    fit = Fit(model, tokenizer, header, Options(tokens=4096, eval_tokens=1024), tick=tick)
    file = fit.file("uniform", level, measure=False)
    save(file, path)
    return file


__all__ = [
    "SITES",
    "SparsityFile",
    "choose",
    "find_auto",
    "folder",
    "load",
    "names",
    "parse_level",
    "path_of",
    "read_header",
    "resolve",
    "save",
]
