"""Builds the C++ core and its tests with CMake, once, into a folder that later runs reuse; also for another processor."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path


class BuildUnavailable(Exception):
    """There is no CMake or no C++ compiler; the text says what to install."""


def tool(name: str) -> str | None:
    """A program beside the running interpreter (where pip puts it) or on the PATH."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.is_file() else shutil.which(name)


def configure(root: Path, toolchain: Path | None = None) -> Path:
    """Configures the build without Python and returns its folder; compile_commands.json is in it. A CMake toolchain file
    makes it one for another processor, in a folder of its own."""
    cmake = tool("cmake")
    if cmake is None:
        raise BuildUnavailable("no cmake: pip install '.[test]'")
    if not (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        raise BuildUnavailable("no C++ compiler: install g++ or clang++")
    folder = Path(os.environ.get("SPARSE_RUN_TEST_BUILD") or root / "build" / "cpp-tests")
    if toolchain is not None:
        folder = folder.with_name(f"{folder.name}-{toolchain.stem}")
    command = [
        cmake, "-S", str(root), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release", "-DSPARSE_RUN_TESTS=ON",
        "-DSPARSE_RUN_PYTHON=OFF", "-DSPARSE_RUN_WERROR=ON", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
    ]  # fmt: skip
    if toolchain is not None:
        command.append(f"-DCMAKE_TOOLCHAIN_FILE={toolchain}")
    ninja = tool("ninja")
    if ninja and not (folder / "CMakeCache.txt").exists():
        command += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    _run(command)
    return folder


def build(root: Path, toolchain: Path | None = None) -> Path:
    """Configures and builds everything; returns the folder with objects and test programs."""
    folder = configure(root, toolchain)
    _run([str(tool("cmake")), "--build", str(folder), "--parallel", str(min(2, os.cpu_count() or 1))])
    return folder


def _run(command: list[str]) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stdout + done.stderr).splitlines()
        errors = [line for line in lines if "error" in line.lower()]
        raise AssertionError(f"{' '.join(command)} failed:\n" + "\n".join((errors[:30] or lines)[-60:]))
