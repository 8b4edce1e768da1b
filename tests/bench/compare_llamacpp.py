#!/usr/bin/env python3
"""This engine and llama.cpp in turn, A B A B, on the same GGUF file and threads; ratios pair by pair.

    compare_llamacpp.py MODEL.gguf --peer-python /path/to/python --threads 2 --pairs 5
    compare_llamacpp.py MODEL.gguf --peer-python /path/to/python --ppl TEXT --chunks 20

The peer's interpreter needs `pip install llama-cpp-python`; shared/peers/llamacpp_bench.py runs it. Each run is a process
of its own. A run that fails ends everything with its error and status 1: nothing is computed from what is left.
The result is one JSON object on standard output, the table goes to standard error.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class RunFailed(Exception):
    """A measured process failed or printed something else than its JSON."""


def run_json(command: list[str], keys: list[str]) -> dict[str, Any]:
    """Runs a command and returns the JSON object it prints; all `keys` must be there and be positive numbers."""
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    what = " ".join(command)
    if done.returncode:
        raise RunFailed(f"{what}\n  returned {done.returncode}: {done.stderr.strip()[-2000:]}")
    try:
        result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        raise RunFailed(f"{what}\n  printed no JSON: {done.stdout[-500:]!r}") from None
    for key in keys:
        value = result.get(key)
        if not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise RunFailed(f"{what}\n  {key} is {value!r}")
    return result


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def exit_code(measure: Callable[[], object]) -> int:
    """Runs the measurement that a program is for, and returns its exit code: where it fails, one line says why."""
    try:
        measure()
    except (RunFailed, OSError, subprocess.CalledProcessError) as error:
        say(f"no result: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted: no result")
        return 130
    return 0


def ours(args: argparse.Namespace, *words: str) -> list[str]:
    return [sys.executable, "-m", "sparse_run", *words, "-m", str(args.model), "--threads", str(args.threads), "--json"]


def theirs(args: argparse.Namespace, *words: str) -> list[str]:
    return [args.peer_python, str(args.peer_script), *words, "--threads", str(args.threads)]


def compare_speed(args: argparse.Namespace) -> dict[str, Any]:
    sizes = ["--prompt", str(args.prompt), "--gen", str(args.gen), "--reps", str(args.reps)]
    a = ours(args, "bench", *sizes)
    b = theirs(args, "speed", str(args.model), *sizes)
    keys = ["prompt_median", "decode_median"]
    say("warm-up: converting where that is needed, and reading the files once")
    run_json(ours(args, "bench", "--prompt", "16", "--gen", "4", "--reps", "1"), keys)
    run_json(theirs(args, "speed", str(args.model), "--prompt", "16", "--gen", "4", "--reps", "1"), keys)

    say(f"{'pair':>4} {'decode tok/s':>21} {'ratio':>6}   {'prompt tok/s':>21} {'ratio':>6}   {'GB/s of stream':>18}")
    pairs = []
    for i in range(args.pairs):
        x, y = run_json(a, [*keys, "gb_per_s", "stream_gb_per_s"]), run_json(b, keys)
        pair = {
            "decode": x["decode_median"],
            "peer_decode": y["decode_median"],
            "decode_ratio": x["decode_median"] / y["decode_median"],
            "prompt": x["prompt_median"],
            "peer_prompt": y["prompt_median"],
            "prompt_ratio": x["prompt_median"] / y["prompt_median"],
            "gb_per_s": x["gb_per_s"],
            "stream_gb_per_s": x["stream_gb_per_s"],
            "stream_share": x["gb_per_s"] / x["stream_gb_per_s"],
            "peak_rss_bytes": x["peak_rss_bytes"],
            "token_hash": x["token_hash"],
        }
        pairs.append(pair)
        say(
            f"{i + 1:>4} {pair['decode']:>9.1f} : {pair['peer_decode']:<9.1f} {pair['decode_ratio']:>6.2f}   "
            f"{pair['prompt']:>9.1f} : {pair['peer_prompt']:<9.1f} {pair['prompt_ratio']:>6.2f}   "
            f"{pair['gb_per_s']:>5.1f} of {pair['stream_gb_per_s']:<5.1f} {pair['stream_share']:>4.0%}"
        )
    medians = {
        key: statistics.median(p[key] for p in pairs)
        for key in ("decode", "peer_decode", "decode_ratio", "prompt", "peer_prompt", "prompt_ratio", "stream_share")
    }
    say(
        f"median of {len(pairs)} pairs: decode {medians['decode_ratio']:.2f}x, prompt {medians['prompt_ratio']:.2f}x, "
        f"{medians['stream_share']:.0%} of the machine's read rate"
    )
    return {
        "prompt": args.prompt,
        "gen": args.gen,
        "reps": args.reps,
        "isa": x["isa"],
        "bytes_per_token": x["bytes_per_token"],
        "pairs": pairs,
        "median": medians,
    }


def compare_perplexity(args: argparse.Namespace) -> dict[str, Any]:
    words = ["--text", str(args.ppl), "--ctx", str(args.ctx), "--chunks", str(args.chunks)]
    keys = ["perplexity", "tokens_scored"]
    x = run_json(ours(args, "eval", *words), keys)
    y = run_json(theirs(args, "ppl", str(args.model), *words), keys)
    if x["tokens_scored"] != y["tokens_scored"]:
        raise RunFailed(f"we scored {x['tokens_scored']} tokens, llama.cpp {y['tokens_scored']}: not comparable")
    difference = x["perplexity"] / y["perplexity"] - 1
    say(f"perplexity {x['perplexity']:.4f}, llama.cpp {y['perplexity']:.4f}, {difference:+.3%}")
    return {
        "perplexity": x["perplexity"],
        "peer_perplexity": y["perplexity"],
        "relative_difference": difference,
        "tokens_scored": x["tokens_scored"],
        "ctx": args.ctx,
    }


def machine() -> str:
    """The processor's name, for whoever reads the numbers later."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} logical processors"
    except OSError:
        pass
    return f"{os.cpu_count()} logical processors"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("--peer-python", required=True, help="an interpreter that has llama-cpp-python")
    parser.add_argument(
        "--peer-script",
        type=Path,
        default=ROOT.parent / "shared" / "peers" / "llamacpp_bench.py",
        help="llama.cpp's runner",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--gen", type=int, default=64)
    parser.add_argument("--reps", type=int, default=3, help="repetitions within a run; its median counts")
    parser.add_argument("--ppl", type=Path, metavar="TEXT", help="compare perplexity on this text instead of speed")
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=20)
    args = parser.parse_args()
    for path in (args.model, args.peer_script):
        if not path.is_file():
            parser.error(f"{path} does not exist")
    if args.pairs < 1:
        parser.error("--pairs must be at least 1")

    def measure() -> None:
        result = compare_perplexity(args) if args.ppl else compare_speed(args)
        head = {"schema": 1, "model": args.model.name, "machine": machine(), "threads": args.threads}
        print(json.dumps({**head, **result}))

    return exit_code(measure)


if __name__ == "__main__":
    sys.exit(main())
