"""Prompt and decode speed: random token ids, one value a repetition, so that another engine can be measured the same way.

The protocol: a warm-up of 16 tokens; each prompt repetition evaluates the whole prompt into an empty cache; decode
starts after 16 tokens and evaluates given tokens one at a time, on and on through all repetitions.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Error, UsageError
from .memory import major_faults, peak_rss_bytes, reset_peak_rss

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

WARM_UP = 16
HASHED = 32  # greedy tokens that the hash covers


@dataclass(frozen=True)
class BenchResult:
    """What one benchmark found; rates are tokens per second, one a repetition; GB are 10**9 bytes."""

    model: str
    threads: int
    isa: str
    device: str
    """The GPU's name, or "cpu"."""
    prompt: int
    gen: int
    reps: int
    prompt_tokens_per_s: list[float]
    decode_tokens_per_s: list[float]
    prompt_median: float
    decode_median: float
    bytes_per_token: int
    """Weight bytes that decoding one token reads."""
    gb_per_s: float
    """`bytes_per_token` times the median decode rate."""
    stream_gb_per_s: float
    """The machine's own read rate with the same threads, median, measured right after."""
    weight_bytes: int
    kv_bytes: int
    """Of the keys and values cached at the end of decoding."""
    peak_rss_bytes: int
    """Peak resident size from loading to the last decoded token, mapped weights included."""
    major_faults: int
    load_seconds: float
    token_hash: str
    """Of 32 greedy tokens: changes only when the computation does."""
    memory: dict[str, Any] | None = None
    """Under a memory budget: what it was divided into, and what reading weights cost while decoding."""
    device_memory: dict[str, Any] | None = None
    """What a GPU holds of the model."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def bench(
    path: str | Path,
    *,
    threads: int | None = None,
    device: str = "cpu",
    prompt: int = 256,
    gen: int = 64,
    reps: int = 5,
    memory_budget: int | None = None,
    device_memory: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> BenchResult:
    """Measures a packed model.

    Args:
        path: packed model directory.
        threads: computing threads; None takes the default of this machine.
        device: "cpu", "cuda" or "auto".
        prompt: tokens of the prompt. gen: tokens decoded in a repetition. reps: repetitions of both.
        memory_budget: bytes that this process may take; weights that do not fit are read for each token.
        device_memory: bytes of the GPU's memory that may be taken, 0 is what is free; the CPU computes what does not fit.
        progress: called as progress(what, done, total) between measurements.

    Raises:
        UsageError: a number is below 1. ModelError: the model cannot be read.

    >>> bench("packed/", threads=2, reps=1).decode_median  # doctest: +SKIP
    123.4
    """
    from .. import _core

    for name, value in (("prompt", prompt), ("gen", gen), ("reps", reps)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}")

    steps = 2 * reps + 3
    done = 0

    def tick(what: str) -> None:
        nonlocal done
        if progress is not None:
            progress(what, done, steps)
        done += 1

    tick("loading")
    reset_peak_rss()
    faults = major_faults()
    start = time.perf_counter()
    n_ctx = prompt + gen * reps + 64
    # A budget covers what a conversation needs besides weights; none of it is used here.
    held = _held_while_generating(memory_budget, Path(path)) if memory_budget else None
    given = _tokens_of_another_process(prompt, Path(path)) if memory_budget else None
    model = _core.Model(
        str(path),
        threads or 0,
        memory_budget=memory_budget or 0,
        n_ctx=n_ctx if memory_budget or device != "cpu" else 0,
        device=device,
        device_memory=device_memory,
        aside_bytes=held.peak_bytes if held is not None else 0,
    )
    used_device = model.device
    on_device = model.device_memory() if used_device != "cpu" else None
    try:
        load_seconds = time.perf_counter() - start
        config = json.loads(model.config_json)
        ids = given or random_tokens(prompt, int(config["n_vocab"]))
        warm = ids[:WARM_UP]
        session = _core.Session(model, n_ctx)
        session.eval(warm)

        prompt_rates, decode_rates = [], []
        for _ in range(reps):
            tick("prompt")
            session.truncate(0)
            start = time.perf_counter()
            session.eval(ids)
            prompt_rates.append(prompt / (time.perf_counter() - start))
        session.truncate(0)
        session.eval(warm)
        single = [ids[i % prompt : i % prompt + 1] for i in range(gen)]
        before = model.memory()
        for _ in range(reps):
            tick("decode")
            start = time.perf_counter()
            for one in single:
                session.eval(one)
            decode_rates.append(gen / (time.perf_counter() - start))
        memory = decoding_memory(before, model.memory()) if memory_budget else None
        peak, faults, kv_bytes = peak_rss_bytes(), major_faults() - faults, session.kv_bytes

        if memory_budget:
            from ..model import NUMPY_BYTES

            model.set_aside(NUMPY_BYTES, for_good=True)
        import numpy as np

        if not np.isfinite(session.logits()).all():
            raise Error(
                f"{path}: the model's logits are not finite numbers; convert it again with `sparse-run convert`"
            )
        tick("token hash")
        token_hash = greedy_hash(session, warm)
        tick("memory read rate")
        # Within the budget, too: a buffer larger than the caches is enough.
        megabytes = max(16, min(512, (memory_budget or 2**34) // 8_000_000))
        used_threads, isa, weight_bytes, token_bytes = model.threads, model.isa, model.weight_bytes, model.bytes_per_token
        if memory_budget:
            del session, held
            model.close()
        stream = statistics.median(_core.stream_gb_per_s(used_threads, megabytes))
        tick("done")
        decode_median = statistics.median(decode_rates)
        return BenchResult(
            model=str(config.get("name") or Path(path).name),
            threads=used_threads,
            isa=isa,
            device=used_device,
            prompt=prompt,
            gen=gen,
            reps=reps,
            prompt_tokens_per_s=prompt_rates,
            decode_tokens_per_s=decode_rates,
            prompt_median=statistics.median(prompt_rates),
            decode_median=decode_median,
            bytes_per_token=token_bytes,
            gb_per_s=token_bytes * decode_median / 1e9,
            stream_gb_per_s=stream,
            weight_bytes=weight_bytes,
            kv_bytes=kv_bytes,
            peak_rss_bytes=peak,
            major_faults=faults,
            load_seconds=load_seconds,
            token_hash=token_hash,
            memory=memory,
            device_memory=on_device,
        )
    finally:
        model.close()


COUNTERS = (
    *("passes", "read_bytes", "reads", "hits", "misses", "read_seconds", "wait_seconds"),
    *("neuron_tokens", "neuron_hits", "neuron_misses"),
)
"""What a budget's `memory()` counts on."""


def decoding_memory(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The summary of a budget (`sparse_run.memory`), its counters those between two looks at it."""
    from ..memory import summary

    return summary({**after, **{key: after[key] - before[key] for key in COUNTERS}})


def _held_while_generating(memory_budget: int, path: Path) -> Tokenizer:
    """What `sparse-run generate` keeps in memory besides the model."""
    import jinja2  # noqa: F401

    from ..model import tokenizer_within

    return tokenizer_within(memory_budget, path)


def _tokens_of_another_process(count: int, path: Path) -> list[int]:
    """`random_tokens` without NumPy in this process, which generating text does without."""
    import subprocess

    n_vocab = int(json.loads((path / "config.json").read_text("utf-8"))["n_vocab"])
    code = (
        "import sys; from sparse_run.bench.speed import random_tokens; print(*random_tokens(*map(int, sys.argv[1:])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(count), str(n_vocab)], check=False, capture_output=True, text=True
    )
    if done.returncode:
        raise Error(f"no random tokens: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'a process failed'}")
    return [int(word) for word in done.stdout.split()]


def random_tokens(count: int, n_vocab: int) -> Any:
    """The token ids that are evaluated, int32 [count]; the same for every engine."""
    import numpy as np

    low = 100 if n_vocab > 101 else 0
    return np.random.default_rng(0).integers(low, min(20000, n_vocab), count).astype(np.int32)


def greedy_hash(session: Any, warm: Any) -> str:
    """Sixteen hexadecimal digits of the tokens that follow `warm` greedily."""
    import numpy as np

    from .. import _core

    session.truncate(0)
    session.eval(warm)
    sampler = _core.Sampler(temperature=0.0)
    tokens = [session.step(sampler) for _ in range(min(HASHED, session.n_ctx - len(warm)))]
    return hashlib.sha256(np.asarray(tokens, dtype="<i4").tobytes()).hexdigest()[:16]
