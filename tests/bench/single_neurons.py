#!/usr/bin/env python3
"""Decoding under a memory budget where something says which neurons a token needs: against the same model, method and tokens
with all weights in memory.

    throttled_disk.sh up /tmp/disk 2700M 1100000000
    make_random_llama.py r.gguf --shape 1.9b --type q4_0
    single_neurons.py r.gguf --packed /tmp/disk/packed

PACKED is made where it is absent, with a file of single neurons in the order they have (weights are random: no order is
better), and gets ReLU. Methods:

  set        GRIFFIN: the tenth of each layer's neurons that a prompt used most, fixed while its answer is decoded
  predicted  a predictor of random weights that names a tenth of the neurons at every token. Its thresholds differ by neuron, so
             that of random inputs 26% of the neurons would make 80% of what is named, as published for OPT (PowerInfer). The
             stream of random weights changes little from token to token, and what is named with it: the hit rate is higher
             than text and a trained predictor would have it. It shows what a hit rate costs, nothing about a real model's
  exact      no set: neurons that are exactly 0 (FATReLU at the 90% quantile of the gates) are skipped. Gate rows are all
             needed, and held and streamed first; of the other neurons those are read that are left and missing

Each run is a process of its own, under a hard limit of the budget plus 5% (with_memory_limit.sh, needs root); runs in memory and
under the budget take turns. One JSON object to standard output, a table to standard error.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from compare_llamacpp import ROOT, RunFailed, exit_code, machine, run_json, say
from exact_zeros import gate_quantile, set_activation
from numpy.typing import NDArray

METHODS = ("set", "predicted", "exact")
PROMPT, CTX, DENSITY, RANK = 64, 256, 0.1, 128
HOT, HOT_SHARE = 0.26, 0.8  # of the neurons; of what is named


def prepare(gguf: Path, packed: Path, threads: int) -> None:
    """The packed model with single neurons, ReLU, and the threshold of method exact in a file beside it."""
    from sparse_run.convert import convert
    from sparse_run.convert.neuron_file import NEURON_FILE, write_neuron_file

    if not packed.is_dir():
        say("converting")
        convert(gguf, packed, layout="neurons")
    if not (packed / NEURON_FILE).is_file():
        write_neuron_file(packed, None)
    note = packed / "threshold.txt"
    if not note.is_file():
        set_activation(packed, activation="relu", activation_threshold=0)
        ids = np.random.default_rng(0).integers(0, 1000, 32).astype(np.int32)
        note.write_text(str(gate_quantile(packed, 1 - DENSITY, ids, threads)))


def random_predictor(config: dict[str, Any], rank: int, share: float) -> dict[str, NDArray[Any]]:
    """Scores of random products are Gaussian: the threshold is a quantile."""
    rng = np.random.default_rng(1)
    n_embd, n_ff, arrays = config["n_embd"], config["n_ff"], {}
    quantile = statistics.NormalDist().inv_cdf(1 - share)
    for layer in range(config["n_layers"]):
        a, b = (rng.integers(-127, 128, shape).astype(np.int8) for shape in ((rank, n_embd), (n_ff, rank)))
        std = 127 / np.sqrt(3)
        made = {
            "a": a,
            "a_scale": np.full(rank, 1 / (std * np.sqrt(n_embd)), np.float32),
            "b": b,
            "b_scale": np.full(n_ff, 1 / (std * np.sqrt(rank)), np.float32),
            "threshold": np.full(n_ff, quantile, np.float32),
        }
        arrays |= {f"predictor.{layer}.neurons.{key}": value for key, value in made.items()}
    return arrays


def save_predictor(packed: Path) -> Path:
    """The sparsity file of method predicted."""
    from sparse_run import sparsity
    from sparse_run.packed_header import read_header

    header = read_header(packed)
    file = sparsity.SparsityFile(
        method="dejavu",
        thresholds={},
        levels={},
        dense_tokens=0,
        model_name=str(header.config.get("name", "")),
        fingerprint=header.fingerprint,
        shape=header.shape,
        quantisation=header.quantisation,
        arrays=skewed_predictor(header.config),
    )
    return sparsity.save(file, sparsity.path_of(packed, "bench-predictor"))


def skewed_predictor(config: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """Thresholds of two kinds, by the share of tokens that name a hot and a cold neuron."""
    arrays = random_predictor(config, RANK, DENSITY)
    normal = statistics.NormalDist()
    at, hot, cold = (
        normal.inv_cdf(1 - p) for p in (DENSITY, DENSITY * HOT_SHARE / HOT, DENSITY * (1 - HOT_SHARE) / (1 - HOT))
    )
    rng = np.random.default_rng(2)
    for name, values in arrays.items():
        if name.endswith("threshold"):
            is_hot = rng.permutation(len(values)) < HOT * len(values)
            arrays[name] = (values * np.where(is_hot, hot / at, cold / at)).astype(np.float32)
    return arrays


def child(args: argparse.Namespace) -> None:
    """One run; its result as JSON to standard output."""
    from sparse_run import _core, sparsity
    from sparse_run.bench.memory import peak_rss_bytes
    from sparse_run.memory import summary
    from sparse_run.model import tokenizer_within
    from sparse_run.neurons import needs
    from sparse_run.packed_header import read_header
    from sparse_run.predictors.coreinfer import selection
    from sparse_run.skipping import bind
    from sparse_run.tokenizer import Tokenizer

    # Counts, as it does where text is generated.
    tokenizer = tokenizer_within(args.budget, args.packed) if args.budget else Tokenizer.load(args.packed)
    config = json.loads((args.packed / "config.json").read_text())
    file = None
    if args.method == "predicted":
        file = sparsity.load(sparsity.path_of(args.packed, "bench-predictor"), read_header(args.packed))
    n_layers, n_ff = config["n_layers"], config["n_ff"]
    extra = {"set": n_layers * n_ff * 40 + 256 * n_ff, "exact": 0}.get(args.method, 0)
    if file is not None:
        extra = needs(file, config, args.packed).extra_bytes
    share = {"set": DENSITY, "predicted": 1.0, "exact": 0.0}[args.method]
    core = _core.Model(
        str(args.packed),
        args.threads,
        memory_budget=args.budget,
        n_ctx=CTX if args.budget else 0,
        extra_bytes=extra if args.budget else 0,
        neuron_share=share if args.budget else 0.0,
        by_gate=bool(args.budget) and args.method == "exact",
        aside_bytes=tokenizer.peak_bytes if args.budget else 0,
    )
    if args.budget:
        tokenizer.attach(core.set_aside)
    session = _core.Session(core, CTX)
    ids = np.random.default_rng(3).integers(0, config["n_vocab"], PROMPT).astype(np.int32)
    if args.method == "set":
        session.collect("griffin")
    start = time.perf_counter()
    session.eval(ids)
    prompt_seconds = time.perf_counter() - start
    if args.method == "set":
        choice = selection.Choice(density=DENSITY)
        session.set_neurons(selection.choose(session.statistic(), choice))
        session.collect(None)
    elif file is not None:
        session.set_predictor(bind(file, core).predictor)
    sampler = _core.Sampler(temperature=0.8, seed=0)
    start = time.perf_counter()
    session.step(sampler)
    first = time.perf_counter() - start
    for _ in range(args.warm):
        session.step(sampler)
    before, seconds = core.memory(), []
    for _ in range(args.gen):
        start = time.perf_counter()
        session.step(sampler)
        seconds.append(time.perf_counter() - start)
    after = core.memory()
    counters = ("passes", "read_bytes", "reads", "neuron_hits", "neuron_misses", "wait_seconds", "read_seconds")
    memory = summary({**after, **{key: after[key] - before[key] for key in counters}})
    result = {
        "decode": args.gen / sum(seconds),
        "decode_by_median": 1 / statistics.median(seconds),
        "first_token_seconds": first,
        "prompt": PROMPT / prompt_seconds,
        "peak_rss_bytes": peak_rss_bytes(),
        "density": session.density(),
        "token_hash": hashlib.sha256(np.asarray(session.tokens, "<i4").tobytes()).hexdigest()[:16],
        "memory": memory,
        "tokenizer": type(tokenizer).__name__,
    }
    print(json.dumps(result))


def measure(args: argparse.Namespace, method: str, budget: int) -> dict[str, Any]:
    me = [sys.executable, __file__, str(args.model), "--packed", str(args.packed), "--child", "--method", method]
    sizes = ["--threads", str(args.threads), "--gen", str(args.gen), "--warm", str(args.warm)]
    threshold = float((args.packed / "threshold.txt").read_text()) if method == "exact" else 0.0
    set_activation(args.packed, activation="relu", activation_threshold=threshold)
    if method == "predicted":
        save_predictor(args.packed)
    runs: dict[str, list[dict[str, Any]]] = {"resident": [], "budget": []}
    for _ in range(args.runs):
        runs["resident"].append(run_json([*me, *sizes], ["decode"]))
        limit = ["bash", str(args.limit_script), str(int(budget * 1.05))]
        runs["budget"].append(run_json([*limit, *me, *sizes, "--budget", str(budget)], ["decode"]))
    hashes = {run["token_hash"] for kind in runs.values() for run in kind}
    if len(hashes) != 1:
        raise RunFailed(f"{method}: runs gave different tokens")
    ratios = [b["decode"] / r["decode"] for r, b in zip(runs["resident"], runs["budget"], strict=True)]
    resident, limited = (statistics.median(run["decode"] for run in runs[kind]) for kind in ("resident", "budget"))
    last = runs["budget"][-1]["memory"]
    peak = max(run["peak_rss_bytes"] for run in runs["budget"])
    if peak > budget:
        raise RunFailed(f"{method}: the process took {peak} bytes, the budget is {budget}")
    hits = last["neuron_hit_rate"]
    first = statistics.median(run["first_token_seconds"] for run in runs["budget"])
    say(
        f"{method:<10} {resident:>7.2f} tok/s in memory, {limited:>7.2f} under {budget / 1e6:.0f} MB: "
        f"{statistics.median(ratios):.0%} ({min(ratios):.0%}-{max(ratios):.0%}); {last['read_bytes_per_pass'] / 1e6:.1f} MB a token, "
        + ("" if hits is None else f"hit rate {hits:.1%}, {last['neuron_slots']} slots, ")
        + f"first token {first:.2f} s, peak {peak / 1e6:.0f} MB"
    )
    return {"method": method, "budget_bytes": budget, "ratio": statistics.median(ratios), "ratios": ratios, **runs}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("--packed", type=Path, required=True, help="its packed directory; made where it is absent")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--percent", type=float, default=45, help="the budget, of the GGUF file")
    peers = ROOT.parent / "shared" / "peers"
    parser.add_argument("--limit-script", type=Path, default=peers / "with_memory_limit.sh")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gen", type=int, default=48)
    parser.add_argument("--warm", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return 0

    def all_methods() -> None:
        prepare(args.model, args.packed, args.threads)
        size = args.model.stat().st_size
        results = [measure(args, method, int(size * args.percent / 100)) for method in args.methods]
        head = {"schema": 1, "model": args.model.name, "file_bytes": size, "machine": machine(), "threads": args.threads}
        print(json.dumps({**head, "percent": args.percent, "methods": results}))

    return exit_code(all_methods)


if __name__ == "__main__":
    sys.exit(main())
