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
from cpp_build import BuildUnavailable, build

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = sorted(p.stem for p in (ROOT / "tests" / "cpp").glob("*_test.cc"))
# Device code, run by the emulation of tests/gpu/emulator.
PROGRAMS += sorted(p.stem for p in (ROOT / "tests" / "gpu").glob("*_check.cc"))
ISA_FOLDERS = ("avx2", "avx512")
X86 = platform.machine() in ("x86_64", "AMD64", "amd64")


@pytest.fixture(scope="session")
def build_folder(need: Callable[[str], NoReturn]) -> Path:
    try:
        return build(ROOT)
    except BuildUnavailable as error:
        need(str(error))


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


def objects(folder: Path) -> dict[Path, Path]:
    """Object files of the core by source, from compile_commands.json."""
    out = {}
    for entry in json.loads((folder / "compile_commands.json").read_text()):
        source = Path(entry["file"])
        if source.is_relative_to(ROOT / "cpp") or source.is_relative_to(ROOT / "predictors"):
            words = entry.get("command", "").split()
            output = entry.get("output") or words[words.index("-o") + 1]
            out[source.relative_to(ROOT)] = Path(entry["directory"]) / output
    return out


def isa_of(source: Path) -> str | None:
    """The instruction set whose folder holds the source, or None for code that runs everywhere."""
    return next((part for part in source.parts if part in ISA_FOLDERS), None)


@pytest.mark.skipif(not X86, reason="flags of x86-64")
def test_only_isa_folders_are_compiled_with_isa_flags(build_folder: Path) -> None:
    commands = json.loads((build_folder / "compile_commands.json").read_text())
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
def test_baseline_objects_hold_no_avx_instruction(build_folder: Path, need: Callable[[str], NoReturn]) -> None:
    if shutil.which("objdump") is None:
        need("no objdump: install binutils")
    wrong = []
    for source, path in objects(build_folder).items():
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
    build_folder: Path, need: Callable[[str], NoReturn]
) -> None:
    """The linker keeps one copy of an inline function that several objects hold. If that copy came from an object built
    with AVX flags, code for every processor would run it."""
    if shutil.which("nm") is None:
        need("no nm: install binutils")
    held: dict[str, set[str]] = {"baseline": set()}
    for source, path in objects(build_folder).items():
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


def test_build_folder_is_not_tracked() -> None:
    if not os.path.isdir(ROOT / ".git"):
        pytest.skip("not a git checkout")
    done = subprocess.run(["git", "-C", ROOT, "ls-files", "build"], check=False, capture_output=True, text=True)
    assert not done.stdout
