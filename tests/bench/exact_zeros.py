#!/usr/bin/env python3
"""What exact zeros bring: decode speed of a model whose gates are 0 for 90% of the neurons, against its own dense paths.

    make_random_llama.py r1b.gguf --shape 1b --type q4_0 --gate-rank 128
    exact_zeros.py r1b.gguf --work DIR                        converts, sets the activation, measures
    exact_zeros.py r1b.gguf --work DIR --predict 0.15         the same with a predictor that names 15% of the neurons

The model is one of random weights: it gets a FATReLU whose threshold is the wanted quantile of its own gates, so its zeros
are spread over the neurons at random, anew for every token, and no order of neurons or habit of a text helps. The variants
take turns, each decoding the same tokens: dense with gate and up in panels, dense with records of neurons, exact skipping
in both. The predictor is the best approximation of the gates by matrices of its rank, with the wanted quantile of its own
scores as threshold. Of gates made with a rank (`--gate-rank`) it finds most neurons that are not 0, as trained predictors do
in naturally sparse models, and `recall` says how many; of gates drawn weight by weight it finds few, so down reads almost
nothing and the speed means nothing. With `+ exact`, up rows and columns of down are read only of neurons that are named and
not 0.

Ratios are of rates in the same round, against whichever dense variant has the higher median; `by_bytes` is what the bytes
that were read allow. One JSON object to standard output.
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


def low_rank_predictor(
    gguf: Path, packed: Path, rank: int, bits: int, share: float, ids: NDArray[np.int32], threads: int
) -> dict[str, NDArray[Any]]:
    """The gates' nearest matrices of this rank, and the quantile of their scores that names this share."""
    import gguf as gguf_package
    from sparse_run import _core
    from sparse_run.predictors.dejavu import predictor as low_rank
    from sparse_run.predictors.dejavu.traces import normalised

    tensors = {t.name: t for t in gguf_package.GGUFReader(gguf).tensors}
    model = _core.Model(str(packed), threads)
    session = _core.Session(model, len(ids))
    x, rng, arrays = session.embed(ids), np.random.default_rng(1), {}
    for layer in range(json.loads(model.config_json)["n_layers"]):
        tensor = tensors[f"blk.{layer}.ffn_gate.weight"]
        gates = gguf_package.quants.dequantize(tensor.data, tensor.tensor_type)
        gates = gates * tensors[f"blk.{layer}.ffn_norm.weight"].data
        # Subspace iteration: the span of the largest singular vectors.
        basis = rng.standard_normal((gates.shape[1], rank), dtype=np.float32)
        for _ in range(2):
            basis = np.linalg.qr(gates.T @ (gates @ basis))[0]
        made = low_rank.make(basis.T, gates @ basis, np.zeros(len(gates), np.float32), bits)
        made.threshold[:] = np.quantile(made.logits(normalised(x)), 1 - share)
        arrays |= made.arrays(f"predictor.{layer}.neurons")
        x, _ = session.run_layer(layer, 0, x)
    model.close()
    return arrays


def predictor_arrays(args: argparse.Namespace, packed: Path) -> dict[str, NDArray[Any]]:
    """Made once, kept beside the conversions."""
    kept = args.work / f"{args.gguf.stem}-predictor-{args.rank}-{args.bits}-{args.predict}-{args.zeros}.npz"
    if not kept.exists():
        print(f"making {kept}", file=sys.stderr)
        ids = np.random.default_rng(3).integers(0, 1000, 4 * PROMPT).astype(np.int32)
        made = low_rank_predictor(args.gguf, packed, args.rank, args.bits, args.predict, ids, args.threads)
        np.savez(kept, **made)
    with np.load(kept) as arrays:
        return dict(arrays)


def head_bytes(gguf: Path) -> int:
    """What every token reads outside the layers."""
    import gguf as gguf_package

    sizes = {t.name: int(t.n_bytes) for t in gguf_package.GGUFReader(gguf).tensors}
    return sizes.get("output.weight", sizes["token_embd.weight"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder of the two conversions")
    parser.add_argument("--zeros", type=float, default=0.9, help="share of gates that are 0, above 0.5")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--gen", type=int, default=24, help="tokens of a variant and round")
    parser.add_argument("--predict", type=float, default=0, help="share of the neurons that a predictor names; 0: none")
    parser.add_argument("--rank", type=int, default=128, help="of the predictor")
    parser.add_argument("--bits", type=int, default=8, choices=(4, 8), help="of a predictor's weight")
    parser.add_argument("--prepare", action="store_true", help="only convert")
    args = parser.parse_args()
    from sparse_run import _core

    paths = prepare(args.gguf, args.work, args.zeros, args.threads)
    arrays = predictor_arrays(args, paths["neurons"]) if args.predict else {}
    if args.prepare:
        return
    models = {layout: _core.Model(str(path), args.threads) for layout, path in paths.items()}
    n_ctx = PROMPT + args.gen * args.rounds
    sessions: dict[str, _core.Session] = {}
    for layout, model in models.items():
        for exact in (False, True):
            sessions[f"{layout}, {'exact' if exact else 'dense'}"] = session = _core.Session(model, n_ctx)
            session.set_exact(exact)
    if args.predict:
        predictor = _core.Predictor(models["neurons"], arrays, dense_tokens=0)
        for exact in (False, True):
            name = "neurons, predicted" + (" + exact" if exact else "")
            sessions[name] = session = _core.Session(models["neurons"], n_ctx)
            session.set_predictor(predictor)
            session.set_exact(exact)
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
    report: dict[str, Any] = {
        "schema": 1,
        "model": args.gguf.name,
        "isa": models["neurons"].isa,
        "threads": args.threads,
    }
    whole, head = models["neurons"].bytes_per_token, head_bytes(args.gguf)
    for name, session in sessions.items():
        density = session.density()
        ratios = [x / d for x, d in zip(rates[name], dense, strict=True)]
        report[name] = {
            "tokens_per_s": round(statistics.median(rates[name]), 2),
            "against_dense": round(statistics.median(ratios), 3),
            "lowest": round(min(ratios), 3),
            "highest": round(max(ratios), 3),
            "by_bytes": round(whole / (head + density.get("body", 1) * (whole - head)), 3),
            "density": {key: round(value, 4) for key, value in density.items()},
        }
    if args.predict:
        session.set_predictor(predictor, measure=True)
        session.truncate(0)
        session.eval(ids[:PROMPT])
        report["recall"] = round(session.density()["recall"], 4)
        report["predictor_bytes"] = predictor.nbytes
    report["bytes_per_token"] = whole
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
