"""The CUDA backend where there is no GPU: the device code compiles with nvcc, and what a build without CUDA says."""

from __future__ import annotations

import json
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
    assert max(spilled) <= 80, f"registers are spilled to memory:\n{done.stderr[-3000:]}"
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
    emulated = {p.stem for p in (ROOT / "tests" / "gpu" / "emulator").glob("*.cc")} - {"sr_cuda_emulator", "sr_cuda_runtime"}
    assert {p.stem for p in SOURCES} == emulated


def test_every_kernel_waits_before_it_touches_what_others_write() -> None:
    """after_previous() comes first; only the product with one vector asks for weights before it, and reads nothing."""
    kernels = {}
    for source in SOURCES:
        text = source.read_text(encoding="utf-8")
        for found in re.finditer(r"__global__ void __launch_bounds__\([^)]*\)\s*(\w+)\(.*?\) \{\n(.*?)\n\}\n", text, re.DOTALL):
            kernels[found[1]] = found[2]
        assert text.count("__global__") == sum(name + "(" in text for name in kernels), source
    assert len(kernels) > 15
    for name, body in kernels.items():
        before, waits, _ = body.partition("after_previous();")
        assert waits, f"{name} never calls after_previous"
        lines = [line.strip() for line in before.splitlines() if not line.strip().startswith("SR_SHARED")]
        if name != "gemv_kernel":
            assert lines == [""] or not lines, f"{name} does something before after_previous: {lines}"
        assert not re.search(r"a\.(x|y|step|partial|tickets)\b", before), name


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


@pytest.fixture(scope="module")
def tell(stories_packed: Path, need: Callable[[str], NoReturn]) -> Callable[..., Any]:
    """Eight golden tokens by a program that runs on the emulated GPU, under environment variables."""
    try:
        folder = build(ROOT)
    except BuildUnavailable as error:
        need(str(error))
    story = json.loads((ROOT / "tests" / "golden" / "stories260K.json").read_text(encoding="utf-8"))[0]

    def run(**environment: str) -> Any:
        command = [str(folder / "generate_story_emulated"), str(stories_packed), "8", "2"]
        done = subprocess.run(
            [*command, *map(str, story["prompt_tokens"])],
            check=False,
            capture_output=True,
            text=True,
            env={**os.environ, "SPARSE_RUN_STORY_DEVICE": "cuda", **environment},
        )
        done.golden = " ".join(map(str, story["tokens"][:8])) + "\n"  # type: ignore[attr-defined]
        return done

    return run


def test_a_model_that_does_not_fit_tells_the_same_story(tell: Callable[..., Any]) -> None:
    whole = tell()
    assert whole.stdout == whole.golden and "100% of the neurons" in whole.stderr, whole.stderr
    small = tell(SPARSE_RUN_STORY_DEVICE_MEMORY="1")
    found = re.search(r"together (\d+) MB; give at least that \(--device-memory\)", small.stderr)
    assert small.returncode == 1 and found, small.stderr
    fits = int(found[1]) * 1_000_000
    refused, shares = fits - 1_000_000, set()
    while fits - refused > 8000:  # down to the floor, where all neurons are on the CPU
        middle = (fits + refused) // 2
        part = tell(SPARSE_RUN_STORY_DEVICE_MEMORY=str(middle))
        if part.returncode:
            assert "is too small on emulated GPU" in part.stderr
            refused = middle
            continue
        assert part.stdout == whole.golden, f"{middle} bytes: {part.stderr}"
        fits = middle
    for more in (0, 100_000, 300_000):
        part = tell(SPARSE_RUN_STORY_DEVICE_MEMORY=str(fits + more))
        assert part.stdout == whole.golden, f"{fits + more} bytes: {part.stderr}"
        shares.add(int(part.stderr.split(", ")[1].split("%")[0]))
    assert min(shares) == 0 and len(shares) > 2, shares


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ({"SR_EMU_DEVICES": "0"}, "no NVIDIA GPU was found: use --device cpu"),
        ({"SR_EMU_MEMORY": "1000000"}, "not enough GPU memory for this model (1 MB to be had on emulated GPU)"),
        ({"SR_EMU_LAUNCHES": "50"}, "the GPU failed ("),
        ({"SR_EMU_COPIES": "7"}, "the GPU failed ("),
    ],
    ids=["no GPU", "no memory", "a launch", "a copy"],
)
def test_what_a_failing_gpu_says_is_one_line(fault: dict[str, str], line: str, tell: Callable[..., Any]) -> None:
    done = tell(**fault)
    said = [text for text in done.stderr.splitlines() if not text.startswith("device ")]
    assert done.returncode == 1 and len(said) == 1, done.stderr
    assert line in said[0] and "--device cpu" in said[0]
    assert tell().stdout == done.golden  # the next start is sound


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
        "4 of 4 tokens; device emulated GPU, 100% of the neurons",
        "copy rate (target 75%)",
        "dense (target 1.5x)",
        "undivided",
        "kernels that start early: dense",
        "without graphs: dense",
        "(target 2x)",
        "PyTorch",
        "decoding a token: ",
        "all of it passed",
    ):
        assert wanted in done.stdout, done.stdout[-6000:]
    assert [p.read_text(encoding="utf-8") for p in tmp_path.glob("*-emulated.txt")] == [done.stdout]
    assert "DIFFER" not in done.stdout
    assert not list(tmp_path.glob("sparse-run-bench-*"))  # the bench took its models away

    done = subprocess.run([*script, "--only", "paint"], check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "no part 'paint'" in done.stderr


def test_the_benchmark_goes_on_where_a_second_model_has_no_room(tmp_path: Path, need: Callable[[str], NoReturn]) -> None:
    try:
        folder = build(ROOT)
    except BuildUnavailable as error:
        need(str(error))
    command, small = [str(folder / "gpu_bench"), "0", str(tmp_path)], {**os.environ, "SR_EMU_MEMORY": "6000000"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=small)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert done.stdout.count(": no room on the GPU for a second model beside the first, not measured\n") == 4, done.stdout
    assert "(target 2x)" in done.stdout and "DIFFER" not in done.stdout


@pytest.mark.parametrize(
    ("sanitizer", "line", "status"),
    [
        ("echo 'Error: Device not supported.'; seq 200000; exit 9", "is refused by this device: not run", 0),
        ("sleep 60", "compute-sanitizer hangs here: not run", 0),
        ("exit 0", "all of it passed", 0),
        ('case "$*" in *racecheck*stream) exit 9 ;; esac', "FAILED: timeout", 1),
    ],
    ids=["refused", "hangs", "finds nothing", "finds a race"],
)
def test_the_script_for_a_gpu_tells_a_refused_sanitizer_from_what_it_finds(
    sanitizer: str, line: str, status: int, tmp_path: Path
) -> None:
    programs = {"nvidia-smi": "echo 'Fake GPU, 1.2'", "nvcc": "echo 'release 13.0'", "compute-sanitizer": sanitizer}
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", str(ROOT / "tests" / "gpu" / "run.sh"), "--only", "sanitize", "--results", str(tmp_path / "results")],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path, "SPARSE_RUN_STEP_LIMIT": "2", "SPARSE_RUN_TEST_BUILD": str(tmp_path), "CUDACXX": ""},
    )
    assert done.returncode == status, done.stdout[-3000:] + done.stderr
    assert line in done.stdout, done.stdout[-3000:]


def fake_smi(folder: Path, prints: str) -> str:
    """A PATH on which nvidia-smi prints that, and nothing of CUDA is found."""
    smi = folder / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho '{prints}'\n", encoding="utf-8")
    smi.chmod(0o755)
    return os.pathsep.join([str(folder), "/usr/bin", "/bin"])


def test_doctor_says_what_a_gpu_lacks(run_cli: Callable[..., Any], tmp_path: Path) -> None:
    without_cuda()
    path = fake_smi(tmp_path, "NVIDIA H100 80GB HBM3, 580.159.04")
    done = run_cli("doctor", "--json", env={"PATH": path})
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    gpu = report["gpu"]
    assert gpu["system_gpu"] == "NVIDIA H100 80GB HBM3" and gpu["driver"] == "580.159.04"
    assert not gpu["usable"] and not gpu["built"] and "no CUDA" in gpu["problem"]
    hint = next(text for text in report["hints"] if "H100" in text)
    assert "-DSPARSE_RUN_CUDA=ON" in hint and "toolkit" in hint
    done = run_cli("doctor", env={"PATH": fake_smi(tmp_path, "No devices were found")})
    line = next(text for text in done.stdout.splitlines() if text.startswith("gpu "))
    assert "this build has no CUDA; no NVIDIA GPU on this machine" in line and "H100" not in done.stdout


def test_doctor_describes_a_gpu_that_can_be_used() -> None:
    from sparse_run.cli.doctor import _gpu_text

    have = {
        "built": True, "system_gpu": "X", "toolkit": "13.0", "architectures": "75-real 80-real 90", "driver": "580.1",
        "driver_cuda": "13.1", "name": "X", "capability": "8.6", "code": "8.0", "free_bytes": 7.5e9, "memory_bytes": 8e9,
    }  # fmt: skip
    assert _gpu_text(have) == (
        "X, compute capability 8.6, 7.5 GB free of 8.0 GB; driver 580.1 (CUDA 13.1); CUDA 13.0, code for "
        "75-real 80-real 90; runs code for 8.0"
    )
    assert "NO CODE FOR IT" in _gpu_text({**have, "code": None})
    assert _gpu_text({**have, "name": None, "driver_cuda": None}).startswith("none; no driver; CUDA 13.0")
