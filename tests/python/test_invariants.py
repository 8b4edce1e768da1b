"""What must hold end to end whatever the machine: the same tokens for any number of threads and any instruction set, the
same logits however a text is cut into evaluations, no conversion twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference_numpy import log_softmax

PROMPT_LENGTH, STEPS = 150, 24  # STEPS also stands in CHILD

# Run in a process of its own, because an instruction set is chosen once a process: logits of a prompt and of some steps.
CHILD = """
import sys
import numpy as np
from sparse_run import _core
packed, out, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = _core.Model(packed, threads)
tokens = np.load(out + ".tokens.npy")
session = _core.Session(model, len(tokens) + 64)
rows = [session.eval_all(tokens)]
sampler = _core.Sampler(temperature=0.0)
chosen = []
for _ in range(24):
    chosen.append(session.step(sampler))
    rows.append(np.array(session.logits())[None])
np.savez(out, logits=np.concatenate(rows), chosen=chosen, isa=model.isa)
"""


def prompt_tokens(packed: Path) -> np.ndarray:
    n_vocab = json.loads((packed / "config.json").read_text())["n_vocab"]
    return np.random.default_rng(3).integers(0, n_vocab, PROMPT_LENGTH).astype(np.int32)


def run_child(packed: Path, tokens: np.ndarray, out: Path, threads: int, isa: str | None = None) -> Any:
    np.save(f"{out}.tokens.npy", tokens)
    env = dict(os.environ)
    if isa:
        env["SPARSE_RUN_FORCE_ISA"] = isa
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(packed), str(out), str(threads)],
        check=False, capture_output=True, text=True, env=env, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return np.load(f"{out}.npz")


@pytest.fixture(scope="module", params=["stories", "smollm2"])
def packed(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(f"{request.param}_packed")
    return path


def test_any_number_of_threads_gives_the_same_bits(packed: Path) -> None:
    from sparse_run import _core

    tokens = prompt_tokens(packed)
    results = []
    for threads in (1, 2, 3):
        model = _core.Model(str(packed), threads)
        assert model.threads == threads
        session = _core.Session(model, PROMPT_LENGTH + STEPS)
        rows = [session.eval_all(tokens)]
        greedy, drawn = _core.Sampler(temperature=0.0), _core.Sampler(temperature=0.9, seed=11)
        chosen = []
        for i in range(STEPS):
            chosen.append(session.step(greedy if i % 2 else drawn))
            rows.append(np.array(session.logits())[None])
        results.append((np.concatenate(rows), chosen))
        model.close()
    for logits, chosen in results[1:]:
        assert chosen == results[0][1]
        assert np.array_equal(logits, results[0][0])


GOLDEN = {"stories": "stories260K.json", "smollm2": "smollm2.json"}


@pytest.mark.parametrize("name", ["stories", "smollm2"])
def test_every_instruction_set_gives_the_same_text(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Integer sums are the same on all; the order of float sums is not, so logits differ by rounding, on the golden prompts
    too little for another token."""
    from sparse_run import _core

    packed: Path = request.getfixturevalue(f"{name}_packed")
    entry = json.loads((Path(__file__).parents[1] / "golden" / GOLDEN[name]).read_text(encoding="utf-8"))[0]
    tokens = np.asarray(entry["prompt_tokens"], dtype=np.int32)
    isas = [isa["name"] for isa in _core.isa_list() if isa["supported"]]
    assert "generic" in isas
    results = {}
    for isa in isas:
        results[isa] = run_child(packed, tokens, tmp_path / isa, 2, isa)
        assert str(results[isa]["isa"]) == isa
        assert results[isa]["chosen"].tolist() == entry["tokens"][:STEPS], isa
    oracle = log_softmax(results["generic"]["logits"])
    for isa in isas:
        divergence = (np.exp(oracle) * (oracle - log_softmax(results[isa]["logits"]))).sum(axis=1)
        print(f"{isa}: KL divergence from generic, mean {divergence.mean():.1e}, max {divergence.max():.1e}")
        assert divergence.mean() < 0.005, isa


@pytest.mark.parametrize(
    "isa", ["sse9", "neon" if sys.platform != "darwin" and os.uname().machine == "x86_64" else "avx2"]
)
def test_an_instruction_set_that_cannot_be_honoured_fails_loudly(
    isa: str, stories_packed: Path, run_cli: Callable[..., Any]
) -> None:
    done = run_cli("generate", "-m", stories_packed, "-p", "Once", "-n", 2, env={"SPARSE_RUN_FORCE_ISA": isa})
    assert done.returncode != 0
    assert not done.stdout
    assert "SPARSE_RUN_FORCE_ISA" in done.stderr and isa in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_prefill_in_any_pieces_equals_decode(packed: Path) -> None:
    """A whole prompt at once, in uneven pieces, and one token at a time: the last logits have the same bits."""
    from sparse_run import _core

    tokens = prompt_tokens(packed)
    model = _core.Model(str(packed), 2)
    finals = []
    for pieces in ([PROMPT_LENGTH], [1, 63, 64, 22], [37] * 4 + [2], [1] * PROMPT_LENGTH):
        session = _core.Session(model, PROMPT_LENGTH)
        at = 0
        for n in pieces:
            session.eval(tokens[at : at + n])
            at += n
        assert session.n_past == PROMPT_LENGTH
        assert session.tokens == tokens.tolist()
        finals.append(np.array(session.logits()))
    everything = _core.Session(model, PROMPT_LENGTH).eval_all(tokens)[-1]
    model.close()
    for other in (*finals[1:], everything):
        assert np.array_equal(other, finals[0]), f"max difference {np.abs(other - finals[0]).max():.2e}"


def test_truncating_and_going_on_equals_never_having_left(packed: Path) -> None:
    from sparse_run import _core

    tokens = prompt_tokens(packed)
    model = _core.Model(str(packed), 2)
    session = _core.Session(model, PROMPT_LENGTH)
    session.eval(tokens[:100])
    expected = np.array(session.logits())
    session.eval(tokens[100:])
    session.truncate(64)
    session.eval(tokens[64:100])
    actual = np.array(session.logits())
    model.close()
    assert np.array_equal(actual, expected)


def test_two_sessions_in_two_threads_do_not_disturb_each_other(packed: Path) -> None:
    import threading

    from sparse_run import _core

    tokens = prompt_tokens(packed)
    model = _core.Model(str(packed), 2)

    def work(seed: int) -> list[int]:
        session = _core.Session(model, PROMPT_LENGTH + STEPS)
        session.eval(np.roll(tokens, seed))
        sampler = _core.Sampler(temperature=0.0)
        return [session.step(sampler) for _ in range(STEPS)]

    alone = [work(i) for i in range(3)]
    together: list[list[int]] = [[], [], []]

    def run(i: int) -> None:
        together[i] = work(i)

    workers = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    model.close()
    assert together == alone


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Inode, size and date of every file: what a second conversion would change."""
    found = {str(p.relative_to(folder)): p.stat() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: (s.st_ino, s.st_size, s.st_mtime_ns) for name, s in found.items()}


def test_a_second_start_converts_nothing_and_another_file_does(
    stories_gguf: Path, run_cli: Callable[..., Any], tmp_path: Path
) -> None:
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(stories_gguf.read_bytes())
    words = ("generate", "-m", gguf, "-p", "Once upon a time", "-n", 8, "--temp", 0, "--json")

    first = run_cli(*words, env=env)
    assert first.returncode == 0, first.stderr
    packed = tmp_path / "cache" / "sparse-run" / "packed"
    made = snapshot(packed)
    assert any(name.endswith("weights.safetensors") for name in made)

    second = run_cli(*words, env=env)
    assert second.returncode == 0, second.stderr
    assert snapshot(packed) == made
    assert json.loads(second.stdout)["tokens"] == json.loads(first.stdout)["tokens"]
    assert len(second.stderr.splitlines()) <= len(first.stderr.splitlines())

    data = bytearray(gguf.read_bytes())
    data[-4:] = np.float32(0.5).tobytes()  # the last weight
    gguf.write_bytes(bytes(data))
    third = run_cli(*words, env=env)
    assert third.returncode == 0, third.stderr
    assert snapshot(packed) != made


def test_nothing_is_written_into_a_packed_model(stories_packed: Path, run_cli: Callable[..., Any]) -> None:
    before = snapshot(stories_packed)
    done = run_cli("generate", "-m", stories_packed, "-p", "Once", "-n", 4, "--temp", 0)
    assert done.returncode == 0, done.stderr
    assert snapshot(stories_packed) == before
