#!/usr/bin/env python3
"""What exact zeros bring: decode speed of a model whose gates are 0 for 90% of the neurons, against its own dense paths.

    make_random_llama.py r1b.gguf --shape 1b --type q4_0
    exact_zeros.py r1b.gguf --work DIR                        converts, sets the activation, measures
    exact_zeros.py r1b.gguf --work DIR --predict 0.2          the same with a predictor that names 20% of the neurons

The model is one of random weights: it gets a FATReLU whose threshold is the wanted quantile of its own gates, so its zeros
are spread over the neurons at random, anew for every token, and no order of neurons or habit of a text helps. The variants
take turns, each decoding the same tokens: dense with gate and up in panels, dense with records of neurons, exact skipping
in both. A predictor of random weights costs what a trained one of its rank does; which neurons it names is chance, so exact
zeros among them are not skipped there (of a trained one's, most are not 0): all three rows of what it names are read, a
little more than a trained one of this density would have read. It shows speed and nothing else.

Ratios are of rates in the same round, against whichever dense variant has the higher median. One JSON object to standard
output.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PROMPT = 32


def set_activation(packed: Path, **values: Any) -> None:
    path = packed / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **values}, indent=1))


def gate_quantile(packed: Path, zeros: float, ids: NDArray[np.int32], threads: int) -> float:
    """The quantile of all layers' gates, taken behind a ReLU: right for more than half of zeros."""
    from sparse_run import _core

    model = _core.Model(str(packed), threads)
    session = _core.Session(model, len(ids))
    x, found = session.embed(ids), []
    for layer in range(json.loads(model.config_json)["n_layers"]):
        x, taps = session.run_layer(layer, 0, x, taps=True)
        found.append(np.quantile(taps["G"], zeros))
    model.close()
    return float(np.mean(found))


def prepare(gguf: Path, work: Path, zeros: float, threads: int) -> dict[str, Path]:
    """Both conversions, made once, with the activation for this share of zeros."""
    from sparse_run.convert import convert

    out = {layout: work / f"{gguf.stem}-{layout}" for layout in ("panels", "neurons")}
    for layout, path in out.items():
        if not path.exists():
            print(f"converting to {path}", file=sys.stderr)
            convert(gguf, path, layout=layout)  # type: ignore[arg-type]
        set_activation(path, activation="relu", activation_threshold=0)
    ids = np.random.default_rng(0).integers(0, 1000, PROMPT).astype(np.int32)
    at = gate_quantile(out["neurons"], zeros, ids, threads)
    for path in out.values():
        set_activation(path, activation_threshold=at)
    return out


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder of the two conversions")
    parser.add_argument("--zeros", type=float, default=0.9, help="share of gates that are 0, above 0.5")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--gen", type=int, default=24, help="tokens of a variant and round")
    parser.add_argument("--predict", type=float, default=0, help="share of the neurons that a predictor names; 0: none")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--prepare", action="store_true", help="only convert")
    args = parser.parse_args()
    from sparse_run import _core

    paths = prepare(args.gguf, args.work, args.zeros, args.threads)
    if args.prepare:
        return
    models = {layout: _core.Model(str(path), args.threads) for layout, path in paths.items()}
    config = json.loads(models["neurons"].config_json)
    n_ctx = PROMPT + args.gen * args.rounds
    sessions: dict[str, _core.Session] = {}
    for layout, model in models.items():
        for exact in (False, True):
            sessions[f"{layout}, {'exact' if exact else 'dense'}"] = session = _core.Session(model, n_ctx)
            session.set_exact(exact)
    if args.predict:
        sessions["neurons, predicted"] = session = _core.Session(models["neurons"], n_ctx)
        predictor = _core.Predictor(models["neurons"], random_predictor(config, args.rank, args.predict), dense_tokens=0)
        session.set_predictor(predictor)
        session.set_exact(False)
    ids = np.random.default_rng(2).integers(0, 1000, n_ctx).astype(np.int32)
    for session in sessions.values():
        session.eval(ids[:PROMPT])
        session.density()
    rates: dict[str, list[float]] = {name: [] for name in sessions}
    names = list(sessions)
    for r in range(args.rounds):
        # Who begins changes, so that nobody always finds the machine as the same other left it.
        for name in names[r % len(names) :] + names[: r % len(names)]:
            start = time.perf_counter()
            for i in range(args.gen):
                at = PROMPT + r * args.gen + i
                sessions[name].eval(ids[at : at + 1])
            rates[name].append(args.gen / (time.perf_counter() - start))
    dense = max((rates["panels, dense"], rates["neurons, dense"]), key=statistics.median)
    report: dict[str, Any] = {"schema": 1, "model": args.gguf.name, "isa": models["neurons"].isa, "threads": args.threads}
    for name, session in sessions.items():
        ratios = [x / d for x, d in zip(rates[name], dense, strict=True)]
        report[name] = {
            "tokens_per_s": round(statistics.median(rates[name]), 2),
            "against_dense": round(statistics.median(ratios), 3),
            "lowest": round(min(ratios), 3),
            "highest": round(max(ratios), 3),
            "density": {key: round(value, 4) for key, value in session.density().items()},
        }
    if args.predict:
        report["predictor_bytes"] = predictor.nbytes
    report["bytes_per_token"] = models["neurons"].bytes_per_token
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
