"""--memory-budget as a user runs it: the same answer as in memory, held from outside by a hard limit, announced before it
starts, and refused in one line with the documented exit code where it cannot work."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from sparse_run import errors, load
from sparse_run.memory import parse_size, size_text, summary

RunCli = Callable[..., "subprocess.CompletedProcess[str]"]
PROMPT = ("-p", "The capital of France is", "-n", 8, "--temp", 0, "-t", 2, "-c", 512)


@pytest.fixture(scope="module")
def answer(smollm2_packed: Path) -> str:
    """What the model says without a budget."""
    with load(smollm2_packed, threads=2) as model:
        return model.generate("The capital of France is", max_tokens=8, temperature=0).read()


@pytest.fixture(scope="module")
def floor(smollm2_packed: Path) -> int:
    """The smallest budget, as the refusal names it."""
    done = subprocess.run(
        [sys.executable, "-m", "sparse_run", "generate", "-m", str(smollm2_packed), *map(str, PROMPT)]
        + ["--memory-budget", "1M"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 5, done.stderr
    match = re.search(r"--memory-budget (\d+)M or more", done.stderr)
    assert match, done.stderr
    return int(match[1]) * 10**6


@pytest.fixture(scope="module")
def limited(shared_dir: Path, need: Callable[[str], NoReturn]) -> Callable[[int, list[str]], list[str]]:
    """`limited(bytes, command)`: the command under a hard memory limit, page cache included."""
    script = shared_dir / "peers" / "with_memory_limit.sh"
    probe = subprocess.run(["bash", str(script), "100M", "true"], check=False, capture_output=True, text=True)
    if probe.returncode:
        need(f"no memory limit can be set here: {probe.stderr.strip()}")
    return lambda size, command: ["bash", str(script), str(size), *command]


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "sparse_run", *map(str, words)]


def test_a_generation_is_the_same_at_every_budget(
    smollm2_packed: Path, answer: str, floor: int, run_cli: RunCli
) -> None:
    streamed = []
    for extra in (1, 30, 60, 150):
        budget = floor + extra * 10**6
        done = run_cli("generate", "-m", smollm2_packed, *PROMPT, "--memory-budget", budget, "--json", "--stats")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["text"] == answer
        memory = found["memory"]
        parts = ("process_bytes", "working_bytes", "context_bytes", "resident_bytes", "ring_bytes")
        assert sum(memory[part] for part in parts) <= memory["budget_bytes"] == budget
        assert memory["n_ctx"] == 512
        streamed.append(memory["streamed_bytes"])
        if memory["streamed_bytes"]:
            assert memory["passes"] >= 8
            # What the ring held at the start was read before.
            assert memory["read_bytes_per_pass"] >= memory["streamed_bytes"] - memory["ring_bytes"] / 8
            assert memory["hits"] + memory["misses"] > 0 < memory["queue_depth"]
            assert "read from disk for each token" in done.stderr
            assert "tokens/s" in done.stderr
            assert "from disk in" in done.stderr  # --stats
    assert streamed == sorted(streamed, reverse=True)
    # Even next to the floor: what the context and a long prompt will need holds weights until then.
    assert streamed[0] > 30e6 and streamed[-1] == 0


def test_a_hard_limit_of_the_budget_and_5_percent_holds(
    smollm2_packed: Path, answer: str, floor: int, limited: Callable[[int, list[str]], list[str]]
) -> None:
    for extra in (2, 40, 100):
        budget = floor + extra * 10**6
        words = command("generate", "-m", smollm2_packed, *PROMPT, "--memory-budget", budget, "--json", "-q")
        done = subprocess.run(limited(int(budget * 1.05), words), check=False, capture_output=True, text=True)
        assert done.returncode == 0, f"{extra}: {done.stderr}"
        assert json.loads(done.stdout)["text"] == answer


def test_the_resident_size_seen_from_outside_stays_within_the_budget(
    smollm2_packed: Path, floor: int, run_python: Callable[..., str]
) -> None:
    """A long prompt and an answer that fill the context, watched through the system's own peak."""
    budget = floor + 25 * 10**6
    code = f"""
from sparse_run import load
model = load({str(smollm2_packed)!r}, threads=2, ctx_size=512, memory_budget={budget})
session = model.session()
session.generate(list(range(1000, 1480)), max_tokens=30, temperature=0, ignore_eos=True).read()
print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])
"""
    if not Path("/proc/self/status").is_file():
        pytest.skip("this system does not tell the peak")
    assert int(run_python(code)) * 1024 <= budget


def test_chat_bench_and_eval_take_a_budget(
    smollm2_packed: Path, floor: int, run_cli: RunCli, tmp_path: Path
) -> None:
    budget = ("--memory-budget", floor + 40 * 10**6)
    chat = ("chat", "-m", smollm2_packed, "-p", "Say hi.", "-n", 6, "--temp", 0, "-c", 512)
    limited, free = run_cli(*chat, *budget, "--stats"), run_cli(*chat)
    assert limited.returncode == free.returncode == 0, limited.stderr
    assert limited.stdout == free.stdout
    assert "memory budget" in limited.stderr and "from disk in" in limited.stderr

    bench = ("bench", "-m", smollm2_packed, "--prompt", 16, "--gen", 2, "--reps", 1, "--json")
    limited, free = run_cli(*bench, *budget), run_cli(*bench)
    assert limited.returncode == free.returncode == 0, limited.stderr
    one, other = json.loads(limited.stdout), json.loads(free.stdout)
    assert one["token_hash"] == other["token_hash"]
    assert one["memory"]["passes"] == 2 and one["memory"]["streamed_bytes"] > 0
    assert other["memory"] is None
    table = run_cli(*bench[:-1], *budget)
    assert "budget   memory budget" in table.stdout

    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a disk that was slower than memory. " * 40, "utf-8")
    scored = ("eval", "-m", smollm2_packed, "--text", text, "--ctx", 128, "--chunks", 2, "--json")
    limited, free = run_cli(*scored, "--memory-budget", floor + 60 * 10**6), run_cli(*scored)
    assert limited.returncode == free.returncode == 0, limited.stderr
    assert json.loads(limited.stdout)["perplexity"] == json.loads(free.stdout)["perplexity"]


@pytest.mark.parametrize(
    ("budget", "code", "part"),
    [
        ("lots", 2, "is no size"),
        ("0", 2, "is no size"),
        ("-5M", 2, "is no size"),
        ("10M", 5, "is below this model's floor of"),
        ("900T", 5, "that this machine, or its container, has"),
    ],
)
def test_an_impossible_budget_is_refused_in_one_line(
    smollm2_packed: Path, run_cli: RunCli, budget: str, code: int, part: str
) -> None:
    for words in (("generate", "-p", "x"), ("chat", "-p", "x"), ("bench",)):
        done = run_cli(*words, "-m", smollm2_packed, "--memory-budget", budget)
        assert done.returncode == code, done.stderr
        assert part in done.stderr
        told = [line for line in done.stderr.splitlines() if not line.startswith("loading")]
        assert len(told) == 1 and told[0].startswith("sparse-run: error: ")
        assert not done.stdout


def test_a_damaged_or_unreadable_file_is_named(stories_packed: Path, run_cli: RunCli, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in stories_packed.iterdir():
        if path.is_file():
            (broken / path.name).write_bytes(path.read_bytes())
    weights = broken / "weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])  # the index points outside
    done = run_cli("generate", "-m", broken, "-p", "x", "--memory-budget", "200M")
    assert done.returncode == 4, done.stderr
    assert "weights.safetensors" in done.stderr and "outside the file" in done.stderr
    header = int.from_bytes(whole[:8], "little")
    shifted = (header - 1).to_bytes(8, "little") + whole[8 : 8 + header - 1] + whole[8 + header :]
    weights.write_bytes(shifted)  # units no longer begin at multiples of 4096
    done = run_cli("generate", "-m", broken, "-p", "x", "--memory-budget", "200M")
    assert done.returncode == 4, done.stderr
    assert "multiple of 4096" in done.stderr or "damaged" in done.stderr
    weights.unlink()
    done = run_cli("generate", "-m", broken, "-p", "x", "--memory-budget", "200M")
    assert done.returncode == 4, done.stderr
    weights.write_bytes(whole)


def test_a_killed_process_leaves_nothing_that_matters(smollm2_packed: Path, answer: str, floor: int) -> None:
    before = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in smollm2_packed.iterdir())
    words = command("generate", "-m", smollm2_packed, *PROMPT, "--memory-budget", floor + 20 * 10**6)
    for wait in (0.5, 1.5):
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert before == sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in smollm2_packed.iterdir())
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.rstrip("\n") == answer.rstrip("\n")


PYTHON_API = """
import sys
from sparse_run import errors, load

packed, answer = sys.argv[1:]


def refused(kind, action):
    try:
        action()
    except kind as error:
        return str(error)
    raise AssertionError("was not refused")


with load(packed, threads=2) as model:
    assert "memory" not in model.stats()
budget = 260 * 10**6
with load(packed, threads=2, ctx_size=256, memory_budget=budget) as model:
    assert model.ctx_size == 256
    found = model.generate("The capital of France is", max_tokens=8, temperature=0).read()
    assert found == answer, found
    memory = model.stats()["memory"]
    assert memory["budget_bytes"] == budget, memory
    assert "ctx_size" in refused(errors.BudgetError, lambda: model.session(ctx_size=8192))
with load(packed, threads=2, memory_budget="400MB") as model:
    assert 256 <= model.ctx_size <= 2048, model.ctx_size  # by itself no more than an eighth of the budget
    assert model.stats()["memory"]["n_ctx"] == model.ctx_size
for wrong in ("much", 0, -3, "5 apples"):
    refused(errors.UsageError, lambda: load(packed, memory_budget=wrong))
print("checked")
"""


def test_python_api_reports_and_refuses(smollm2_packed: Path, answer: str, run_python: Callable[..., str]) -> None:
    assert run_python(PYTHON_API, smollm2_packed, answer) == "checked\n"


def test_sizes_are_read_as_people_write_them() -> None:
    for text, size in (
        ("700M", 700_000_000),
        ("700mb", 700_000_000),
        ("1.5G", 1_500_000_000),
        ("2GiB", 2 << 30),
        ("64 KiB", 65536),
        ("12345", 12345),
        (12345, 12345),
    ):
        assert parse_size(text) == size
    for wrong in ("", "M", "7X", "7MM", "1e9", "0", "-1", "99999999T", "7 M B"):
        with pytest.raises(errors.UsageError):
            parse_size(wrong)
    assert size_text(523_000_000) == "523.0 MB"
    assert size_text(1_117_000_000) == "1.12 GB"


def test_the_summary_follows_from_its_counters() -> None:
    memory = {
        "resident_bytes": 600,
        "streamed_bytes": 400,
        "disk_bytes_per_s": 800.0,
        "passes": 4,
        "read_bytes": 1600,
        "read_seconds": 2.0,
        "wait_seconds": 1.0,
    }
    found = summary(memory)
    assert found["hit_rate"] == 0.6
    assert found["expected_tokens_per_s"] == pytest.approx(2.0)
    assert found["read_bytes_per_pass"] == 400
    assert found["read_bytes_per_s"] == 800
    assert found["wait_seconds_per_pass"] == 0.25
