"""Shared fixtures: where the test data is, real and tiny models (fetched or converted once a session), a clean
environment, and the command line as a subprocess of the running interpreter.

What cannot be had (no network, no ../shared, no torch) skips with its reason; under SPARSE_RUN_TEST_STRICT=1, which
.ci/run sets, the same is a failure, so that nothing is missing unnoticed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from ahead import Work

# A test run started in the background ignores Ctrl-C, and so would every program it starts; a handler is not inherited.
signal.signal(signal.SIGINT, signal.default_int_handler)


def _terminated(number: int, _frame: object) -> None:
    """SIGTERM ends the session in order: fixtures are undone, and builds that run ahead end with it."""
    pytest.exit("terminated", returncode=128 + number)


signal.signal(signal.SIGTERM, _terminated)

# Taken before the isolation below: fetched models are kept in the user's real cache from run to run.
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparse-run-test-models"


def unavailable(reason: str) -> NoReturn:
    """Skips the test, or fails it where everything is expected to be there."""
    if os.environ.get("SPARSE_RUN_TEST_STRICT") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


_work = Work()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs the cross build comes last: it runs ahead meanwhile."""
    items.sort(key=lambda item: "arm" in getattr(item, "fixturenames", ()))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Starts the long work that the chosen tests will wait for (support/ahead.py)."""
    if session.config.option.collectonly:
        return
    chosen: dict[Any, list[pytest.Item]] = {}
    for item in session.items:
        chosen.setdefault(getattr(item, "module", None), []).append(item)
    for module, items in chosen.items():
        if hasattr(module, "ahead"):
            module.ahead(_work, items)


def pytest_sessionfinish() -> None:
    _work.stop()


@pytest.fixture(scope="session")
def project_root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def need() -> Callable[[str], NoReturn]:
    """`need(reason)`: say that something is missing that this test cannot do without."""
    return unavailable


@pytest.fixture(scope="session", autouse=True)
def clean_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's own models, history and settings are neither read nor written by any test."""
    home = tmp_path_factory.mktemp("xdg")
    saved = dict(os.environ)
    for name in list(os.environ):
        if name.startswith("SPARSE_RUN_") and not name.startswith("SPARSE_RUN_TEST_"):
            del os.environ[name]
    for kind in ("CACHE", "CONFIG", "DATA", "STATE"):
        os.environ[f"XDG_{kind}_HOME"] = str(home / kind.lower())
    for name in ("NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE"):
        os.environ.pop(name, None)
    os.environ["PYTHONUTF8"] = "1"
    yield
    os.environ.clear()
    os.environ.update(saved)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The project's reference data: ../shared beside the checkout, or SPARSE_RUN_TEST_SHARED."""
    path = Path(os.environ.get("SPARSE_RUN_TEST_SHARED") or ROOT.parent / "shared")
    if not (path / "data").is_dir():
        unavailable(f"no test data at {path}; set SPARSE_RUN_TEST_SHARED")
    return path


@pytest.fixture(scope="session")
def kept_dir() -> Path:
    """Where fetched models stay from run to run."""
    return _CACHE


def fetched(shared_dir: Path, name: str) -> Path:
    """A real model, fetched once into the user's cache."""
    script = shared_dir / "models" / "fetch_models.sh"
    try:
        done = subprocess.run(
            ["bash", str(script), str(_CACHE), name], check=False, capture_output=True, text=True, timeout=600
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        unavailable(f"{name} cannot be fetched: {error}")
    if done.returncode:
        unavailable(f"{name} cannot be fetched (offline?): {done.stderr.strip()[-300:]}")
    return Path(done.stdout.split("\n")[0])


@pytest.fixture(scope="session")
def smollm2_gguf(shared_dir: Path) -> Path:
    """SmolLM2-135M-Instruct in Q4_1."""
    return fetched(shared_dir, "smollm2")


@pytest.fixture(scope="session")
def gemma3_gguf(shared_dir: Path) -> Path:
    """Gemma 3 270M, the base model, in Q4_K_M."""
    return fetched(shared_dir, "gemma3")


@pytest.fixture(scope="session")
def gemma3_packed(gemma3_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed directory of Gemma 3 270M."""
    return pack(gemma3_gguf, tmp_path_factory.mktemp("gemma3"))


@pytest.fixture(scope="session")
def smollm2_packed(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed directory of SmolLM2."""
    return pack(smollm2_gguf, tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="session")
def smollm2_neurons(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed directory of SmolLM2 with its FFNs stored by neuron."""
    from sparse_run.convert import convert

    packed = tmp_path_factory.mktemp("smollm2-neurons") / "model"
    convert(smollm2_gguf, packed, layout="neurons")
    return packed


@pytest.fixture(scope="session")
def stories_dir(shared_dir: Path) -> Path:
    """The tiny story model as llama2.c has it: stories260K.bin and tok512.model."""
    return shared_dir / "data" / "models" / "stories260K"


@pytest.fixture(scope="session")
def stories_gguf(stories_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny story model as an F32 GGUF."""
    from llama2c import stories_to_gguf

    return stories_to_gguf(stories_dir, tmp_path_factory.mktemp("stories") / "stories260K.gguf")


@pytest.fixture(scope="session")
def stories_packed(stories_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed directory of the tiny story model."""
    return pack(stories_gguf, tmp_path_factory.mktemp("stories-packed"))


def pack(gguf: Path, folder: Path) -> Path:
    """Converts a GGUF into `folder` and returns the packed directory."""
    from sparse_run.convert import convert_gguf

    out = folder / "packed"
    convert_gguf(gguf, out)
    return out


@pytest.fixture(scope="session")
def convert_to_packed() -> Callable[[Path, Path], Path]:
    """`convert_to_packed(gguf, folder)`: the packed directory of a GGUF."""
    return pack


RunCli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def run_cli() -> RunCli:
    """`run_cli("generate", "-m", path, env={...}, input=text)`: the command line as its own process, UTF-8 text."""

    def run(
        *args: Any,
        env: Mapping[str, str] | None = None,
        input: str | None = None,
        timeout: float = 300,
        cwd: Path | None = None,
        prefix: Sequence[str] = (),
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*prefix, sys.executable, "-m", "sparse_run", *map(str, args)],
            check=False,
            capture_output=True,
            encoding="utf-8",
            env={**os.environ, **(env or {})},
            input=input if input is not None else "",
            timeout=timeout,
            cwd=cwd,
        )

    return run


@pytest.fixture(scope="session")
def run_python() -> Callable[..., str]:
    """`run_python(program, *args)`: what a Python program prints as its own process, where a memory budget or a peak counts
    nothing that other tests have loaded. Fails with its errors."""

    def run(program: str, *args: Any) -> str:
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, args)], check=False, capture_output=True, encoding="utf-8"
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="session")
def torch() -> Any:
    """The module torch, on one thread, where transformers is there too."""
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        unavailable(f"{error.name} is not installed: pip install torch transformers")
    torch.set_num_threads(1)
    return torch


@pytest.fixture(scope="session")
def relu_checkpoint(shared_dir: Path, torch: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ReLU Llama as a Hugging Face directory, trained on the spot (support/relu_model.py)."""
    import relu_model

    text = (shared_dir / "data" / "calibration" / "c4.txt").read_text("utf-8")
    return relu_model.save(relu_model.train(torch, text), tmp_path_factory.mktemp("relu"))


@pytest.fixture(scope="session")
def relu_packed(relu_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed directory of the small ReLU Llama."""
    from sparse_run.convert import convert

    packed = tmp_path_factory.mktemp("relu-packed") / "model"
    convert(relu_checkpoint, packed)
    return packed
