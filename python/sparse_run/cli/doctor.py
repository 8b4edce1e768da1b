"""`sparse-run doctor`: what this machine and this installation offer, and what stands in the way."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import click

from .common import colour, json_option, print_json, verbosity_options

REQUIRED = ("click", "jinja2", "numpy", "safetensors", "sentencepiece", "tokenizers")
# extra -> (package whose presence tells, what it is for)
OPTIONAL = {
    "hf": ("huggingface-hub", "pull any Hugging Face repository"),
    "plot": ("matplotlib", "plots"),
    "train": ("torch", "training predictors"),
    "test": ("pytest", "running the tests"),
    "reference": ("transformers", "comparing logits in the tests"),
}
# Where the project's tests run each instruction set: on such a processor, or only under an emulator (qemu), which proves
# the results but says nothing about speed.
TESTED = {
    "generic": "hardware",
    "avx2": "hardware",
    "avx512": "hardware",
    "neon": "emulator",
    "neon_dotprod": "emulator",
    "neon_i8mm": "emulator",
}
LOW_MEMORY = 500_000_000
LOW_DISK = 1_000_000_000


@click.command("doctor")
@json_option
@verbosity_options
def command(as_json: bool, quiet: bool, verbose: int) -> None:
    """Check this machine and this installation.

    Shows processor, instruction sets, cores, memory, GPU, read rates of memory and disk, folders and packages, and exits
    with 3 where something prevents running.

    \b
    sparse-run doctor
    sparse-run doctor --json
    """
    from ..errors import CheckFailed

    report: dict[str, Any] = {}
    problems: list[str] = []  # prevent running
    hints: list[str] = []  # do not
    report["processor"] = _processor(problems, hints)
    report["memory"] = _memory(report["processor"], hints)
    report["gpu"] = _gpu(report["processor"], hints)
    report["folders"] = _folders(problems, hints)
    report["packages"] = _packages(problems)
    report["extras"] = _extras()
    report["problems"], report["hints"] = problems, hints
    if as_json:
        print_json(report)
    else:
        _show(report)
    if problems:
        raise CheckFailed(f"{len(problems)} problem{'s' if len(problems) > 1 else ''}: {problems[0]}")


def _processor(problems: list[str], hints: list[str]) -> dict[str, Any]:
    """Processor, instruction sets and cores; what the core itself says, and what the system says beside it."""
    import platform

    from ..bench.machine import affinity_cores, cgroup_cores
    from ..errors import Error

    out: dict[str, Any] = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "logical_cores": os.cpu_count(),
        "affinity_cores": affinity_cores(),
        "cgroup_cores": cgroup_cores(),
        "force_isa": os.environ.get("SPARSE_RUN_FORCE_ISA") or None,
    }
    try:
        from .. import _core
    except ImportError as error:
        problems.append(
            f"the compiled core cannot be loaded ({error}); install again with: pip install --force-reinstall ."
        )
        return out
    out["version"] = _core.__version__
    try:
        out.update(_core.cpu_info())
        out["isas"] = [{**isa, "tested": TESTED.get(isa["name"], "no")} for isa in _core.isa_list()]
    except Error as error:
        problems.append(str(error))
        return out
    chosen = next((isa["name"] for isa in out["isas"] if isa["selected"]), None)
    out["isa"] = chosen
    if chosen is None:
        problems.append("no instruction set could be selected; unset SPARSE_RUN_FORCE_ISA")
    elif out["force_isa"]:
        hints.append(f"SPARSE_RUN_FORCE_ISA={out['force_isa']} is set: other instruction sets are not used")
    elif chosen == "generic":
        hints.append("only the generic kernels run on this processor; they are slow")
    return out


def _memory(processor: dict[str, Any], hints: list[str]) -> dict[str, Any]:
    """Free memory and the rate at which it can be read."""
    from ..bench.machine import memory_bytes

    total, available = memory_bytes()
    out: dict[str, Any] = {"total_bytes": total, "available_bytes": available, "stream_gb_per_s": None}
    if available is not None and available < LOW_MEMORY:
        hints.append(f"only {available / 1e6:.0f} MB of memory are free")
    elif processor.get("isa"):
        import statistics

        from .. import _core

        megabytes = 512 if available is None or available > 2_000_000_000 else 128
        rates = _core.stream_gb_per_s(_core.default_threads(), megabytes, 3)
        out["stream_gb_per_s"] = statistics.median(rates)
        out["threads"] = _core.default_threads()
    return out


def _gpu(processor: dict[str, Any], hints: list[str]) -> dict[str, Any]:
    """The GPU: whether `--device cuda` can be used, with what; what the system has (nvidia-smi, nvcc) beside it."""
    import subprocess

    out: dict[str, Any] = {"usable": False, "problem": None, "built": False, "driver": None, "system_gpu": None}
    out["nvcc"] = shutil.which("nvcc")
    smi = shutil.which("nvidia-smi")
    if smi:
        query = [smi, "--query-gpu=name,driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(query, check=False, capture_output=True, text=True, timeout=20)
            if done.returncode == 0 and "," in done.stdout:
                out["system_gpu"], out["driver"] = (
                    part.strip() for part in done.stdout.splitlines()[0].rsplit(",", 1)
                )
        except (OSError, subprocess.TimeoutExpired):
            pass
    if "version" not in processor:  # the core could not be loaded
        return out
    from .. import _core

    out.update(_core.gpu_info())
    out["problem"] = _core.gpu_problem() or None
    out["usable"] = out["problem"] is None
    if out["usable"]:
        return out
    if out["built"]:
        hints.append(f"GPU: {out['problem']}")
    elif out["system_gpu"]:
        toolkit = "" if out["nvcc"] else " (install the CUDA toolkit, 12 or newer, first)"
        hints.append(
            f"{out['system_gpu']} is there, but this build has no CUDA: install from source with CMAKE_ARGS="
            f"-DSPARSE_RUN_CUDA=ON pip install .{toolkit}"
        )
    return out


def _gpu_text(gpu: dict[str, Any]) -> str:
    """One line of the report."""
    if not gpu["built"]:
        return f"this build has no CUDA; {gpu['system_gpu'] or 'no NVIDIA GPU'} on this machine"
    have = f"CUDA {gpu['toolkit'] or '?'}, code for {gpu['architectures'] or 'unknown GPUs'}"
    driver = f"driver {gpu['driver'] or '?'} (CUDA {gpu['driver_cuda']})" if gpu["driver_cuda"] else "no driver"
    if not gpu["name"]:
        return f"none; {driver}; {have}"
    code = f"runs code for {gpu['code']}" if gpu["code"] else "NO CODE FOR IT"
    return (
        f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['free_bytes'] / 1e9:.1f} GB free of "
        f"{gpu['memory_bytes'] / 1e9:.1f} GB; {driver}; {have}; {code}"
    )


def _folders(problems: list[str], hints: list[str]) -> dict[str, Any]:
    """Where files are kept, whether they can be written there, free space, and the disk's read rate."""
    from .. import registry
    from ..bench.machine import disk_read_rate

    out: dict[str, Any] = {}
    for name, path, variable in (
        ("packed", registry.packed_dir(), "XDG_CACHE_HOME"),
        ("models", registry.models_dir(), "XDG_DATA_HOME"),
    ):
        entry: dict[str, Any] = {"path": str(path), "exists": path.is_dir(), "writable": False}
        out[name] = entry
        try:
            existing = _nearest_existing(path)
            entry["writable"] = os.access(existing, os.W_OK | os.X_OK) and existing.is_dir()
            entry["free_bytes"] = shutil.disk_usage(existing).free
        except OSError as error:
            entry["error"] = error.strerror
        if not entry["writable"]:
            problems.append(f"{path} cannot be written; check its permissions or set {variable} to another folder")
        elif entry["free_bytes"] < LOW_DISK:
            hints.append(f"{path} has only {entry['free_bytes'] / 1e6:.0f} MB left; set {variable} to a larger disk")
    packed = out["packed"]
    packed["read_gb_per_s"] = packed["read_direct"] = None
    if packed["writable"]:
        try:
            packed["read_gb_per_s"], packed["read_direct"] = disk_read_rate(_nearest_existing(registry.packed_dir()))
        except OSError as error:
            hints.append(f"the disk's read rate could not be measured in {packed['path']}: {error.strerror}")
    return out


def _nearest_existing(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages(problems: list[str]) -> dict[str, str | None]:
    out = {name: _version(name) for name in REQUIRED}
    missing = [name for name, version in out.items() if version is None]
    if missing:
        problems.append(
            f"packages are missing: {', '.join(missing)}; install them with: pip install {' '.join(missing)}"
        )
    return out


def _extras() -> dict[str, dict[str, Any]]:
    return {
        extra: {
            "package": package,
            "version": _version(package),
            "purpose": purpose,
            "install": f"pip install 'sparse-run[{extra}]'",
        }
        for extra, (package, purpose) in OPTIONAL.items()
    }


def _show(report: dict[str, Any]) -> None:
    p, m = report["processor"], report["memory"]

    def line(name: str, text: str) -> None:
        click.echo(f"{name:<12}{text}")

    def gigabytes(count: int | None) -> str:
        return "?" if count is None else f"{count / 1e9:.1f} GB"

    line("sparse-run", f"{p.get('version', '?')}, Python {p['python']}, {sys.platform} {p['machine']}")
    line("processor", str(p.get("brand", "?")))
    for isa in p.get("isas", []):
        state = "selected" if isa["selected"] else "supported" if isa["supported"] else "not on this processor"
        tested = {"hardware": "tested on such processors", "emulator": "tested under an emulator only"}
        line("", f"{isa['name']:<13} {state}; {tested.get(isa['tested'], 'not tested')}")
    cores = [f"{p.get('physical_cores', '?')} physical", f"{p['logical_cores']} logical"]
    if p["affinity_cores"] is not None:
        cores.append(f"{p['affinity_cores']} in the affinity mask")
    cores.append(f"{p['cgroup_cores']:g} by cgroup quota" if p["cgroup_cores"] is not None else "no cgroup quota")
    line("cores", f"{', '.join(cores)}; {p.get('default_threads', '?')} threads by default")
    stream = f"; read at {m['stream_gb_per_s']:.1f} GB/s by {m['threads']} threads" if m["stream_gb_per_s"] else ""
    line("memory", f"{gigabytes(m['available_bytes'])} free of {gigabytes(m['total_bytes'])}{stream}")
    line("gpu", _gpu_text(report["gpu"]))
    for name, entry in report["folders"].items():
        state = "" if entry["writable"] else ", NOT WRITABLE"
        free = f", {gigabytes(entry.get('free_bytes'))} free" if entry.get("free_bytes") is not None else ""
        rate = ""
        if entry.get("read_gb_per_s"):
            rate = (
                f", read at {entry['read_gb_per_s']:.2f} GB/s{'' if entry['read_direct'] else ' (through the cache)'}"
            )
        line(name, f"{entry['path']}{free}{rate}{state}")
    line("packages", ", ".join(f"{name} {version or 'MISSING'}" for name, version in report["packages"].items()))
    for extra, entry in report["extras"].items():
        have = f"{entry['package']} {entry['version']}" if entry["version"] else f"not installed: {entry['install']}"
        line(f"[{extra}]", f"{entry['purpose']}: {have}")
    bold, plain = ("\x1b[1m", "\x1b[0m") if colour(sys.stdout) else ("", "")
    for hint in report["hints"]:
        line("hint", hint)
    for problem in report["problems"]:
        line("problem", f"{bold}{problem}{plain}")
    if not report["problems"]:
        line("verdict", "ready")
