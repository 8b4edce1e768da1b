"""The CUDA backend where there is no GPU: the device code compiles with nvcc, and what a build without CUDA says."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "cpp" / "kernels" / "cuda").glob("*.cu"))


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


def test_the_script_for_a_gpu_is_sound() -> None:
    subprocess.run(["bash", "-n", str(ROOT / "tests" / "gpu" / "run.sh")], check=True)
