"""Builds the C++ tests and runs each as one test, so that pytest alone runs everything; and looks into the objects: no
instruction of a better processor may reach code that runs on every processor."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from ahead import Work
from cpp_build import SETTINGS, BuildUnavailable, build, build_ahead, core_folder, keep_foreign_build, packaged_core

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = sorted(p.stem for p in (ROOT / "tests" / "cpp").glob("*_test.cc"))
# Device code, run by the emulation of tests/gpu/emulator.
PROGRAMS += sorted(p.stem for p in (ROOT / "tests" / "gpu").glob("*_check.cc"))
ISA_FOLDERS = ("avx2", "avx512")
X86 = platform.machine() in ("x86_64", "AMD64", "amd64")


def ahead(work: Work, items: list[pytest.Item]) -> None:
    build_ahead(work, ROOT)


@pytest.fixture(scope="session")
def build_folder(need: Callable[[str], NoReturn]) -> Path:
    try:
        return build(ROOT)
    except BuildUnavailable as error:
        need(str(error))


@pytest.fixture(scope="session")
def commands(build_folder: Path) -> list[dict[str, str]]:
    """Every compilation of the core that the programs are linked with, and of the programs."""
    folders = {build_folder, core_folder(build_folder)}
    return [entry for folder in folders for entry in json.loads((folder / "compile_commands.json").read_text())]


@pytest.mark.parametrize("program", PROGRAMS)
def test_program_passes(program: str, build_folder: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [str(build_folder / program)],
        check=False,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=600,
        cwd=tmp_path,
    )
    assert done.returncode == 0, f"{program} returned {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}"
    assert re.search(r"\b[1-9]\d* cases, 0 failed", done.stderr), f"{program} ran nothing: {done.stderr!r}"


def test_there_are_programs() -> None:
    assert PROGRAMS


def objects(commands: list[dict[str, str]]) -> list[tuple[Path, Path]]:
    """(source, object) of the core; without the bindings, which are machine code only after they are linked."""
    out = []
    for entry in commands:
        source = Path(entry["file"]).relative_to(ROOT)
        if source.parts[0] in ("cpp", "predictors") and source.parts[1] != "bindings":
            words = entry.get("command", "").split()
            output = entry.get("output") or words[words.index("-o") + 1]
            out.append((source, Path(entry["directory"]) / output))
    return out


def isa_of(source: Path) -> str | None:
    """The instruction set whose folder holds the source, or None for code that runs everywhere."""
    return next((part for part in source.parts if part in ISA_FOLDERS), None)


@pytest.mark.skipif(not X86, reason="flags of x86-64")
def test_only_isa_folders_are_compiled_with_isa_flags(commands: list[dict[str, str]]) -> None:
    assert commands
    seen = set()
    for entry in commands:
        source = Path(entry["file"]).relative_to(ROOT)
        flags = {f for f in entry["command"].split() if re.match(r"-m(?!tune|64|no-)", f)}
        assert "-march=native" not in entry["command"], source
        isa = isa_of(source)
        if isa is None:
            assert not flags, f"{source} is compiled with {sorted(flags)} and would not run on every processor"
        else:
            seen.add(isa)
            assert f"-m{isa}" in flags or f"-m{isa}f" in flags, f"{source} is not compiled for {isa}"
    assert seen == set(ISA_FOLDERS)


@pytest.mark.skipif(not X86, reason="instructions of x86-64")
def test_baseline_objects_hold_no_avx_instruction(
    commands: list[dict[str, str]], need: Callable[[str], NoReturn]
) -> None:
    if shutil.which("objdump") is None:
        need("no objdump: install binutils")
    wrong = []
    for source, path in objects(commands):
        if isa_of(source) is None:
            text = subprocess.run(
                ["objdump", "-d", "--no-show-raw-insn", path], check=False, capture_output=True, text=True
            ).stdout
            assert "<" in text, f"{path} was not disassembled"
            if re.search(r"%[yz]mm\d|%k[1-7]\b|\tv[a-z]+(ps|pd|ss|sd|b|w|d|q)\s+.*%xmm", text):
                wrong.append(str(source))
    assert not wrong, f"compiled for a better processor than the oldest x86-64: {wrong}"


@pytest.mark.skipif(not X86, reason="instructions of x86-64")
def test_isa_objects_export_no_inline_function_that_others_could_pick_up(
    commands: list[dict[str, str]], need: Callable[[str], NoReturn]
) -> None:
    """The linker keeps one copy of an inline function that several objects hold. If that copy came from an object built
    with AVX flags, code for every processor would run it."""
    if shutil.which("nm") is None:
        need("no nm: install binutils")
    held: dict[str, set[str]] = {"baseline": set()}
    for source, path in objects(commands):
        lines = subprocess.run(
            ["nm", "--defined-only", path], check=False, capture_output=True, text=True
        ).stdout.splitlines()
        weak = {line.split()[-1] for line in lines if len(line.split()) == 3 and line.split()[1] in "WVu"}
        held.setdefault(isa_of(source) or "baseline", set()).update(weak)
    sets = list(held.items())
    for i, (isa, symbols) in enumerate(sets):
        for other, theirs in sets[i + 1 :]:
            both = symbols & theirs
            assert not both, f"objects of {isa} and {other} both hold {sorted(both)[:5]}: make them static"


def test_the_package_s_core_is_linked_only_while_it_is_that_of_the_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program linked with an older core would pass or fail for what no longer is."""
    for name in ("CXX", "CXXFLAGS"):
        monkeypatch.delenv(name, raising=False)
    built = tmp_path / "build" / "cp310-cp310-linux_x86_64"
    source = tmp_path / "cpp" / "base" / "a.cc"
    for folder in (built, source.parent):
        folder.mkdir(parents=True)
    cache = "CMAKE_BUILD_TYPE:STRING=Release\nCMAKE_CXX_FLAGS:STRING=\nSPARSE_RUN_CUDA:BOOL=OFF\n"
    library = built / "libsr_core.a"
    for path, text in (
        (tmp_path / "CMakeLists.txt", ""),
        (source, ""),
        (built / "CMakeCache.txt", cache),
        (built / "compile_commands.json", "[]"),
        (library, ""),
    ):
        path.write_text(text)
    old, new = 1_000_000_000, 1_000_000_100
    for path in (tmp_path / "CMakeLists.txt", tmp_path / "cpp", source.parent, source):
        os.utime(path, (old, old))
    os.utime(library, (new, new))
    assert packaged_core(tmp_path) == library
    for path in (tmp_path / "CMakeLists.txt", source.parent, source):  # edited; a file added or removed; edited
        os.utime(path, (new + 1, new + 1))
        assert packaged_core(tmp_path) is None, path
        os.utime(path, (old, old))
    for ours, other in (("CUDA:BOOL=OFF", "CUDA:BOOL=ON"), ("Release", "Debug"), ("FLAGS:STRING=", "FLAGS:STRING=-O0")):
        assert ours in cache
        (built / "CMakeCache.txt").write_text(cache.replace(ours, other))
        assert packaged_core(tmp_path) is None, other
    (built / "CMakeCache.txt").write_text(cache)
    monkeypatch.setenv("CXX", "clang++")
    assert packaged_core(tmp_path) is None
    monkeypatch.delenv("CXX")
    assert packaged_core(tmp_path) == library


def test_a_developer_s_build_folder_is_not_reconfigured(tmp_path: Path) -> None:
    keep_foreign_build(tmp_path / "none yet", tmp_path)
    keep_foreign_build(tmp_path, tmp_path)  # a folder without a build
    lines = [f"{name}:BOOL={value}" for name, value in SETTINGS.items()]
    cache = tmp_path / "CMakeCache.txt"
    cache.write_text("\n".join(["# a comment", *lines, f"CMAKE_HOME_DIRECTORY:INTERNAL={tmp_path}"]))
    keep_foreign_build(tmp_path, tmp_path)  # what the tests made earlier
    with pytest.raises(AssertionError, match="CMAKE_HOME_DIRECTORY is .* name a new folder"):
        keep_foreign_build(tmp_path, tmp_path / "another checkout")
    cache.write_text(cache.read_text().replace("SPARSE_RUN_PYTHON:BOOL=OFF", "SPARSE_RUN_PYTHON:BOOL=ON"))
    with pytest.raises(AssertionError, match="SPARSE_RUN_PYTHON is ON, not OFF"):
        keep_foreign_build(tmp_path, tmp_path)


def test_build_folder_is_not_tracked() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    done = subprocess.run(["git", "-C", ROOT, "ls-files", "build"], check=False, capture_output=True, text=True)
    assert not done.stdout
