"""The CUDA backend where there is no GPU: the device code compiles with nvcc, and what a build without CUDA says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from cpp_build import BuildUnavailable, build

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "cpp" / "kernels" / "cuda").glob("*.cu"))
HOST_SOURCES = sorted([*(ROOT / "cpp" / "cuda").glob("*.cc"), *(ROOT / "tests" / "gpu").glob("*.cc")])


def nvcc() -> str | None:
    default = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(default) if default.is_file() else None)


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_device_code_compiles_with_nvcc_for_the_oldest_gpu(source: Path, tmp_path: Path) -> None:
    compiler = nvcc()
    if compiler is None:
        pytest.skip("no nvcc: install the CUDA toolkit (12 or newer); the emulated checks run without it")
    done = subprocess.run(
        [
            compiler, "-std=c++17", "-arch=sm_75", "--fmad=false", "-Werror", "all-warnings", "-Xptxas", "-v",
            f"-I{ROOT / 'cpp'}", f"-I{ROOT / 'cpp' / 'include'}", "-c", str(source), "-o", str(tmp_path / "out.o"),
        ],
        check=False,
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", done.stderr)]
    assert spilled, "ptxas reported nothing"
    assert max(spilled) <= 64, f"registers are spilled to memory:\n{done.stderr[-3000:]}"
    shared = [int(n) for n in re.findall(r"(\d+) bytes smem", done.stderr)]
    assert all(n <= 48 << 10 for n in shared)


@pytest.mark.parametrize("source", HOST_SOURCES, ids=lambda p: p.stem)
def test_host_code_compiles_against_the_toolkit(source: Path) -> None:
    compiler, cxx = nvcc(), shutil.which("c++") or shutil.which("g++")
    if compiler is None or cxx is None:
        pytest.skip("no nvcc: install the CUDA toolkit (12 or newer); the emulated checks run without it")
    roots = [Path(compiler).resolve().parents[1], Path("/usr/local/cuda")]
    headers = next((root / "include" for root in roots if (root / "include" / "cuda_runtime.h").is_file()), None)
    if headers is None:
        pytest.skip("nvcc is there, but not the toolkit's headers beside it")
    folders = [ROOT / "cpp", ROOT / "cpp" / "include", ROOT / "tests" / "cpp", ROOT / "tests" / "gpu", headers]
    done = subprocess.run(
        [
            cxx, "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-DSR_HAVE_CUDA",
            *(f"-I{folder}" for folder in folders), str(source),
        ],
        check=False,
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def test_there_is_device_code_and_each_file_is_emulated() -> None:
    emulated = {p.stem for p in (ROOT / "tests" / "gpu" / "emulator").glob("*.cc")} - {"sr_cuda_emulator"}
    assert {p.stem for p in SOURCES} == emulated


def without_cuda() -> str:
    from sparse_run import _core

    problem = _core.gpu_problem()
    if "no CUDA" not in problem:
        pytest.skip("this build has CUDA")
    return problem


@pytest.mark.parametrize("command", ["generate", "bench", "eval", "chat"])
def test_a_build_without_cuda_says_so_in_one_line(
    command: str, stories_gguf: Path, tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    without_cuda()
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time " * 50, encoding="utf-8")
    more = {"generate": ["-p", "x"], "bench": [], "eval": ["--text", str(text), "--ctx", "16"], "chat": ["-p", "x"]}
    result = run_cli(command, "-m", str(stories_gguf), "--device", "cuda", "-q", *more[command])
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and "this build has no CUDA" in lines[0] and "--device cpu" in lines[0], result.stderr
    assert not result.stdout


def test_auto_is_the_cpu_where_there_is_no_gpu(stories_packed: Path) -> None:
    from sparse_run import Model
    from sparse_run.errors import UsageError

    without_cuda()
    with Model.load(stories_packed, device="auto") as model:
        assert model.device == "cpu"
    with pytest.raises(UsageError, match="unknown device 'tpu'"):
        Model.load(stories_packed, device="tpu")
    with pytest.raises(UsageError, match="no CUDA"):
        Model.load(stories_packed, device="cuda")


@pytest.mark.parametrize("command", ["generate", "bench", "eval", "chat"])
def test_a_device_memory_budget_wants_a_gpu_and_a_size(
    command: str, stories_gguf: Path, tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time " * 50, encoding="utf-8")
    more = {"generate": ["-p", "x"], "bench": [], "eval": ["--text", str(text), "--ctx", "16"], "chat": ["-p", "x"]}
    for options, line in (
        (["--device-memory", "1G"], "--device-memory is for a GPU; add --device cuda"),
        (["--device", "cuda", "--device-memory", "much"], "a device memory budget of 'much' is no size"),
    ):
        result = run_cli(command, "-m", str(stories_gguf), "-q", *options, *more[command])
        assert result.returncode == 2, result.stderr
        assert line in result.stderr and "Traceback" not in result.stderr
        assert not result.stdout


def test_device_memory_through_python(stories_packed: Path) -> None:
    from sparse_run import Model
    from sparse_run.errors import UsageError

    without_cuda()
    with pytest.raises(UsageError, match="a device memory budget is for a GPU"):
        Model.load(stories_packed, device_memory="1G")
    with pytest.raises(UsageError, match="'none' is no size"):
        Model.load(stories_packed, device="cuda", device_memory="none")
    with Model.load(stories_packed, device="auto", device_memory="1G") as model:  # no GPU, so nothing of it is taken
        assert model.device == "cpu"
        assert "device_memory" not in model.stats()


def test_the_script_for_a_gpu_works_to_its_end_where_it_is_rehearsed(
    stories_packed: Path, tmp_path: Path, need: Callable[[str], NoReturn]
) -> None:
    """Every part of it but what needs a GPU: builds, checks, stories, benchmark and PyTorch, emulated and small."""
    try:
        folder = build(ROOT)
    except BuildUnavailable as error:
        need(str(error))
    environment = {
        **os.environ,
        "SPARSE_RUN_TEST_BUILD": str(folder),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    script = ["bash", str(ROOT / "tests" / "gpu" / "run.sh"), "--rehearse", "--results", str(tmp_path)]
    done = subprocess.run(
        [*script, "--story", str(stories_packed), "--scratch", str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    for wanted in (
        "4 of 4 tokens; device emulated GPU",
        "copy rate (target 75%)",
        "dense (target 1.5x)",
        "undivided",
        "(target 2x)",
        "PyTorch",
        "all of it passed",
    ):
        assert wanted in done.stdout, done.stdout[-6000:]
    assert [p.read_text(encoding="utf-8") for p in tmp_path.glob("*-emulated.txt")] == [done.stdout]
    assert not list(tmp_path.glob("sparse-run-bench-*"))  # the bench took its models away

    done = subprocess.run([*script, "--only", "paint"], check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "no part 'paint'" in done.stderr
