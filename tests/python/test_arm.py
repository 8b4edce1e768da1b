"""The core on 64-bit Arm: cross-compiled, and run under an emulator of processors with and without the newer instructions.

Every C++ test runs on an emulated processor that has all of them, so each variant of the NEON kernels is held to `generic`;
a program that tells the tiny model's story runs on three processors, each of which must choose its own variant.
"""

from __future__ import annotations

import functools
import json
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NoReturn

import pytest
from ahead import Work
from cpp_build import BuildUnavailable, build, build_ahead

ROOT = Path(__file__).resolve().parents[2]
TOOLCHAIN = ROOT / "tests" / "cpp" / "aarch64.cmake"
# These hold the process to a budget, and the emulator's own memory, which grows as it translates, is in it.
BUDGETED = {"budget_test", "neuron_store_test"}
PROGRAMS = sorted({p.stem for p in (ROOT / "tests" / "cpp").glob("*_test.cc")} - BUDGETED)
STORIES: list[dict[str, Any]] = json.loads((ROOT / "tests" / "golden" / "stories260K.json").read_text(encoding="utf-8"))
# Emulated processors and the variant that each must choose.
PROCESSORS = {"max": "neon_i8mm", "neoverse-n1": "neon_dotprod", "cortex-a53": "neon"}
# Instructions that the ARMv8.0 base lacks, by the variant that may hold them.
NEWER = {"neon": (), "neon_dotprod": ("sdot", "udot"), "neon_i8mm": ("sdot", "udot", "usdot", "smmla")}

pytestmark = pytest.mark.skipif(
    platform.machine() in ("aarch64", "arm64"), reason="an Arm machine runs the C++ tests themselves (test_programs.py)"
)


def missing() -> str:
    """What to install first, or nothing."""
    for tool, package in (("aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu"), ("qemu-aarch64", "qemu-user")):
        if shutil.which(tool) is None:
            return f"no {tool}: install {package}"
    return ""


@pytest.fixture(scope="module")
def arm(need: Callable[[str], NoReturn]) -> Path:
    """The folder of the cross build."""
    if missing():
        need(missing())
    try:
        return build(ROOT, TOOLCHAIN)
    except BuildUnavailable as error:
        need(str(error))


def emulated(
    processor: str, *command: str | Path, env: dict[str, str] | None = None, options: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    settings = [word for name, value in (env or {}).items() for word in ("-E", f"{name}={value}")]
    return subprocess.run(
        ["qemu-aarch64", "-cpu", processor, *options, *settings, *map(str, command)],
        check=False,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=900,
    )


_runs: dict[tuple[str, str], Future[subprocess.CompletedProcess[str]]] = {}


def ahead(work: Work, items: list[pytest.Item]) -> None:
    """Both builds, then every chosen program: emulated they take long, and most of it is the work of one thread."""
    if missing() or platform.machine() in ("aarch64", "arm64"):
        return
    build_ahead(work, ROOT)
    folder = build_ahead(work, ROOT, TOOLCHAIN)

    def run(processor: str, program: str) -> subprocess.CompletedProcess[str]:
        return work.run(["qemu-aarch64", "-cpu", processor, str(folder.result() / program)], timeout=1800)

    for item in items:
        if isinstance(item, pytest.Function) and item.function is test_program_passes:
            wanted = (item.callspec.params["processor"], item.callspec.params["program"])
            _runs[wanted] = work.submit(functools.partial(run, *wanted))


@pytest.mark.parametrize(
    ("processor", "program"),
    [*(("max", program) for program in PROGRAMS), ("cortex-a53", "kernels_test"), ("cortex-a53", "rows_test")],
)
def test_program_passes(processor: str, program: str, arm: Path) -> None:
    done = _runs[processor, program].result()
    assert done.returncode == 0, f"{program} returned {done.returncode}\n{done.stderr[-6000:]}"
    assert re.search(r"\b[1-9]\d* cases, 0 failed", done.stderr), f"{program} ran nothing: {done.stderr!r}"


@pytest.mark.parametrize("page", [16384, 65536])
def test_memory_is_right_where_pages_are_larger(page: int, arm: Path) -> None:
    for program, *cases in (
        ("aligned_buffer_test",),
        ("packed_model_test",),
        ("decoder_test", "session: truncating", "session: memory of the cache"),
    ):
        done = emulated("max", arm / program, *cases, options=("-p", str(page)))
        assert done.returncode == 0, done.stderr[-6000:]


def story(
    run: Callable[..., subprocess.CompletedProcess[str]],
    folder: Path,
    model: Path,
    entry: dict[str, Any],
    **options: Any,
) -> tuple[list[int], str]:
    """Greedy ids and the instruction set that computed them."""
    prompt = [str(token) for token in entry["prompt_tokens"]]
    done = run(folder / "generate_story", model, str(len(entry["tokens"])), "2", *prompt, **options)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()], done.stderr.split()[1]


@pytest.mark.parametrize("processor", PROCESSORS)
def test_story_is_the_stored_one_on_each_processor_with_its_best_kernels(
    processor: str, arm: Path, stories_packed: Path
) -> None:
    def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
        return emulated(processor, *command)

    for entry in STORIES:
        ids, isa = story(run, arm, stories_packed, entry)
        assert ids == entry["tokens"]
        assert isa == PROCESSORS[processor]


def test_quantised_model_chooses_the_tokens_that_it_chooses_here(
    arm: Path, tmp_path: Path, convert_to_packed: Callable[[Path, Path], Path]
) -> None:
    """All bit widths in one random model; scales, minima and groups of 32 and 16 with them."""
    from llama_gguf import LlamaShape
    from mixed_gguf import write_mixed

    shape = LlamaShape(n_layers=2, n_embd=256, n_heads=4, n_kv_heads=2, head_dim=64, n_ff=512, n_vocab=320, tied=False)
    types = {"": "Q4_1", "attn_q": "Q5_0", "ffn_up": "Q6_K", "ffn_down": "Q4_0", "token_embd": "Q8_0", "output": "Q8_0"}
    write_mixed(tmp_path / "mixed.gguf", shape, types)
    packed = convert_to_packed(tmp_path / "mixed.gguf", tmp_path)
    # Several prompts, because a random model soon repeats itself.
    entries = [
        {"prompt_tokens": [(7 * i * j + 3 * i + 5) % 320 for j in range(8)], "tokens": [0] * 4} for i in range(8)
    ]

    def native(*command: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*map(str, command)], check=False, capture_output=True, text=True, timeout=300)

    here = build(ROOT)
    expected = [story(native, here, packed, entry)[0] for entry in entries]
    assert len({token for ids in expected for token in ids}) > 10, "a model that repeats itself compares nothing"
    for processor, best in PROCESSORS.items():

        def run(*command: str | Path, on: str = processor) -> subprocess.CompletedProcess[str]:
            return emulated(on, *command)

        assert [story(run, arm, packed, entry) for entry in entries] == [(ids, best) for ids in expected]


def test_forced_variant_that_the_processor_lacks_is_refused(arm: Path, stories_packed: Path) -> None:
    command = [arm / "generate_story", stories_packed, "1", "1", "1"]
    done = emulated("cortex-a53", *command, env={"SPARSE_RUN_FORCE_ISA": "neon_dotprod"})
    assert done.returncode == 1
    assert "SPARSE_RUN_FORCE_ISA=neon_dotprod" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    done = emulated("max", *command, env={"SPARSE_RUN_FORCE_ISA": "neon"})
    assert done.returncode == 0
    assert done.stderr.split()[1] == "neon"


def compiled(arm: Path) -> list[tuple[str, Path, Path]]:
    """(variant, or "" for code that runs on every processor; source; object) of the core."""
    out = []
    for entry in json.loads((arm / "compile_commands.json").read_text()):
        source = Path(entry["file"])
        if not source.is_relative_to(ROOT / "cpp"):
            continue
        words = entry["command"].split()
        found = [word.split("=")[1] for word in words if word.startswith("-DSR_NEON=")]
        target = entry.get("output") or words[words.index("-o") + 1]
        out.append((found[0] if found else "", source.relative_to(ROOT), Path(entry["directory"]) / target))
    return out


def test_each_variant_holds_its_own_instructions_and_no_newer_ones(arm: Path) -> None:
    seen: dict[str, set[str]] = {}
    for variant, source, path in compiled(arm):
        done = subprocess.run(
            ["aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", path], check=False, capture_output=True, text=True
        )
        assert "<" in done.stdout, f"{path} was not disassembled"
        newer = set(
            re.findall(r"\t(sdot|udot|usdot|sudot|smmla|usmmla|ummla|bfmmla|cas\w*|ldadd\w*|swp\w*)\s", done.stdout)
        )
        allowed = NEWER[variant or "neon"]
        assert newer <= set(allowed), f"{source} ({variant or 'every processor'}) holds {sorted(newer - set(allowed))}"
        seen.setdefault(variant, set()).update(newer)
    assert "sdot" in seen["neon_dotprod"]
    assert {"usdot", "smmla"} <= seen["neon_i8mm"]
    assert set(seen) == {"", *NEWER}


def test_variants_share_no_inline_function(arm: Path) -> None:
    """The linker keeps one copy of an inline function that several objects hold; it must not be one for a better
    processor."""
    held: dict[str, set[str]] = {}
    for variant, _, path in compiled(arm):
        lines = subprocess.run(
            ["aarch64-linux-gnu-nm", "--defined-only", path], check=False, capture_output=True, text=True
        ).stdout.splitlines()
        weak = {line.split()[-1] for line in lines if len(line.split()) == 3 and line.split()[1] in "WVu"}
        held.setdefault(variant, set()).update(weak)
    for variant, symbols in held.items():
        for other, theirs in held.items():
            both = symbols & theirs if variant < other else set()
            assert not both, f"objects of {variant!r} and {other!r} both hold {sorted(both)[:5]}: make them static"
