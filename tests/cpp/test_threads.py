"""The thread pool, and what reads the file beside it, under GCC's thread sanitizer: every access of two threads to the same bytes
is ordered by an acquire and a release, not by the luck of a strongly ordered processor. Arm is not one."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).resolve().parents[2]
CPP = ROOT / "cpp"
PROGRAMS = ("thread_pool_test", "flash_test", "neuron_pool_test")
FLAGS = ("-std=c++17", "-O1", "-fsanitize=thread", *(f"-I{p}" for p in (CPP, CPP / "include", ROOT / "tests" / "cpp")))
FOUND = 66  # the sanitizer's own exit status


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=600,
        env={**os.environ, **environment},
    )


class Sanitized:
    """Objects of cpp/base and cpp/flash, and programs linked with them."""

    def __init__(self, cxx: str, folder: Path) -> None:
        self.cxx, self.folder = cxx, folder
        sources = sorted([*(CPP / "base").glob("*.cc"), *(CPP / "flash").glob("*.cc")])
        with ThreadPoolExecutor(2) as pool:
            self.objects = dict(zip((s.name for s in sources), pool.map(self.compiled, sources), strict=True))

    def compiled(self, source: Path) -> Path:
        out = self.folder / f"{source.stem}.o"
        done = run([self.cxx, *FLAGS, "-c", str(source), "-o", str(out)])
        assert done.returncode == 0, done.stderr[-4000:]
        return out

    def program(self, test: str, objects: dict[str, Path], name: str) -> Path:
        out = self.folder / name
        source = ROOT / "tests" / "cpp" / f"{test}.cc"
        done = run([self.cxx, *FLAGS, str(source), *map(str, objects.values()), "-o", str(out), "-lpthread"])
        assert done.returncode == 0, done.stderr[-4000:]
        return out

    @staticmethod
    def run(program: Path, *cases: str) -> subprocess.CompletedProcess[str]:
        options = {"TSAN_OPTIONS": f"exitcode={FOUND} halt_on_error=0"}
        done = run([str(program), *cases], **options)
        if "unexpected memory mapping" in done.stderr:  # the kernel spreads addresses wider than this sanitizer knows
            done = run(["setarch", platform.machine(), "-R", str(program), *cases], **options)
        return done


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory, need: Callable[[str], NoReturn]) -> Sanitized:
    cxx = shutil.which("g++") or shutil.which("clang++")
    folder = tmp_path_factory.mktemp("tsan")
    (folder / "probe.cc").write_text("int main() { return 0; }\n", encoding="utf-8")
    if cxx is None or run([cxx, "-fsanitize=thread", str(folder / "probe.cc"), "-o", str(folder / "probe")]).returncode:
        need("no compiler with a thread sanitizer: install g++ and libtsan")
    return Sanitized(str(cxx), folder)


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_access_is_unordered(program: str, sanitized: Sanitized) -> None:
    done = sanitized.run(sanitized.program(program, sanitized.objects, program))
    assert "WARNING: ThreadSanitizer" not in done.stderr, done.stderr[-6000:]
    assert done.returncode == 0, f"{done.returncode}\n{done.stderr[-6000:]}"


@pytest.mark.parametrize(
    ("old", "new", "case"),
    [
        ("fetch_add(1, std::memory_order_acq_rel)", "fetch_add(1, std::memory_order_relaxed)", "barrier: what is"),
        ("word_.load(std::memory_order_acquire)", "word_.load(std::memory_order_relaxed)", "barrier: what is"),
    ],
    ids=["release of an arrival", "acquire of a wait"],
)
def test_the_sanitizer_sees_an_order_that_is_missing(old: str, new: str, case: str, sanitized: Sanitized) -> None:
    """Were it not so, the test above would prove nothing."""
    text = (CPP / "base" / "thread_pool.cc").read_text(encoding="utf-8")
    assert old in text
    weak = sanitized.folder / f"weak_{old.split('(')[0].split('.')[-1]}.cc"
    weak.write_text(text.replace(old, new), encoding="utf-8")
    objects = {**sanitized.objects, "thread_pool.cc": sanitized.compiled(weak)}
    done = sanitized.run(sanitized.program("thread_pool_test", objects, weak.stem), case)
    assert done.returncode == FOUND and "data race" in done.stderr, done.stderr[-3000:]
