"""Builds the C++ tests with CMake, once, into a folder that later runs reuse; also for another processor. The core itself is
taken from where `pip install .` compiled it, where that is of these sources: it is most of the work."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path

from ahead import Work

SETTINGS = {
    "CMAKE_BUILD_TYPE": "Release",
    "SPARSE_RUN_TESTS": "ON",
    "SPARSE_RUN_PYTHON": "OFF",
    "SPARSE_RUN_WERROR": "ON",
    "CMAKE_EXPORT_COMPILE_COMMANDS": "ON",
}
_ahead: dict[Path | None, Future[Path]] = {}  # builds that were started, by toolchain
Run = Callable[[list[str]], "subprocess.CompletedProcess[str]"]


class BuildUnavailable(Exception):
    """There is no CMake or no C++ compiler; the text says what to install."""


def tool(name: str) -> str | None:
    """A program beside the running interpreter (where pip puts it) or on the PATH."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.is_file() else shutil.which(name)


def packaged_core(root: Path) -> Path | None:
    """The core's static library that `pip install .` left in build/, in a folder with compile_commands.json, if it is
    younger than every source (folders count: files may have gone) and compiled as the tests' build would compile it."""
    if os.environ.get("CXX") or os.environ.get("CXXFLAGS"):
        return None
    sources = [root / "CMakeLists.txt", root / "cpp", *(root / "cpp").rglob("*"), *root.glob("predictors/*/select.cc")]
    wanted = {"CMAKE_BUILD_TYPE:STRING=Release", "CMAKE_CXX_FLAGS:STRING=", "SPARSE_RUN_CUDA:BOOL=OFF"}
    newest = max(path.stat().st_mtime for path in sources)
    for library in (root / "build").glob("*/libsr_core.a"):
        cache = library.with_name("CMakeCache.txt")
        settings = cache.read_text("utf-8", "replace").splitlines() if cache.is_file() else []
        described = library.with_name("compile_commands.json").is_file()
        if described and wanted <= set(settings) and library.stat().st_mtime > newest:
            return library
    return None


def build(root: Path, toolchain: Path | None = None) -> Path:
    """Configures and builds everything without Python; returns the folder with the test programs. A CMake toolchain file
    makes it a build for another processor, in a folder of its own. One that was started ahead is waited for."""
    return _ahead[toolchain].result() if toolchain in _ahead else _build(root, toolchain, _captured)


def build_ahead(work: Work, root: Path, toolchain: Path | None = None) -> Future[Path]:
    """Starts `build` unless it was started, after those that were: a build fills the machine by itself."""
    if toolchain not in _ahead:
        earlier = list(_ahead.values())

        def piece() -> Path:
            wait(earlier)
            return _build(root, toolchain, work.run)

        _ahead[toolchain] = work.submit(piece)
    return _ahead[toolchain]


def keep_foreign_build(folder: Path, root: Path) -> None:
    """Fails where the folder holds a build that was configured for something else: a developer's own, which would be
    reconfigured."""
    cache = folder / "CMakeCache.txt"
    if not cache.is_file():
        return
    lines = (line.partition("=") for line in cache.read_text("utf-8", "replace").splitlines())
    found = {name.partition(":")[0]: value for name, _, value in lines}
    wanted = {**SETTINGS, "CMAKE_HOME_DIRECTORY": str(root)}
    other = [f"{name} is {found.get(name)}, not {value}" for name, value in wanted.items() if found.get(name) != value]
    assert not other, (
        f"SPARSE_RUN_TEST_BUILD: {folder} holds a build of another kind ({other[0]}), which the tests would "
        "reconfigure; name a new folder"
    )


def core_folder(folder: Path) -> Path:
    """The folder whose compile_commands.json names the objects of the core that the programs of a build are linked with."""
    for line in (folder / "CMakeCache.txt").read_text("utf-8").splitlines():
        if line.startswith("SPARSE_RUN_CORE:FILEPATH=/"):
            return Path(line.split("=", 1)[1]).parent
    return folder


def _build(root: Path, toolchain: Path | None, run: Run) -> Path:
    cmake = tool("cmake")
    if cmake is None:
        raise BuildUnavailable("no cmake: pip install '.[test]'")
    if not (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        raise BuildUnavailable("no C++ compiler: install g++ or clang++")
    folder = Path(os.environ.get("SPARSE_RUN_TEST_BUILD") or root / "build" / "cpp-tests")
    if toolchain is not None:
        folder = folder.with_name(f"{folder.name}-{toolchain.stem}")
    if os.environ.get("SPARSE_RUN_TEST_BUILD"):
        keep_foreign_build(folder, root)
    command = [cmake, "-S", str(root), "-B", str(folder), *(f"-D{name}={value}" for name, value in SETTINGS.items())]
    if toolchain is not None:
        command.append(f"-DCMAKE_TOOLCHAIN_FILE={toolchain}")
    else:
        command.append(f"-DSPARSE_RUN_CORE={packaged_core(root) or ''}")  # empty: compile it here
    ninja = tool("ninja")
    if ninja and not (folder / "CMakeCache.txt").exists():
        command += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    for step in (command, [cmake, "--build", str(folder), "--parallel", str(min(2, os.cpu_count() or 1))]):
        done = run(step)
        if done.returncode:
            lines = (done.stdout + done.stderr).splitlines()
            errors = [line for line in lines if "error" in line.lower()]
            raise AssertionError(f"{' '.join(step)} failed:\n" + "\n".join((errors[:30] or lines)[-60:]))
    return folder


def _captured(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, capture_output=True, text=True)
