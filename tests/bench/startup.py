#!/usr/bin/env python3
"""From the start of the process to the first piece of text of a packed model, and the peak memory of that process.

    startup.py MODEL --reps 7 --threads 2

Runs `sparse-run generate -n 2 --temp 0` as a user would and takes the time until the first byte of the answer arrives on
its standard output. MODEL is a packed directory, or anything that -m takes: it is then converted by a first run that does
not count. Prints one JSON object; exits with 1 where a run fails, counting none.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from compare_llamacpp import RunFailed, exit_code, run_json


def command(model: str, threads: int, prompt: str) -> list[str]:
    return [
        sys.executable, "-m", "sparse_run", "generate", "-m", model, "-p", prompt, "-n", "2", "--temp", "0",
        "--threads", str(threads), "-q",
    ]  # fmt: skip


def weighing(model: str) -> list[str]:
    """The shortest run that tells how large the weights are."""
    small = ["--prompt", "1", "--gen", "1", "--reps", "1", "--json"]
    return [sys.executable, "-m", "sparse_run", "bench", "-m", model, *small]


def measure(words: list[str]) -> tuple[float, float, int]:
    """(seconds to the first byte, seconds to the end, peak resident bytes) of one run."""
    start = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    first = os.read(process.stdout.fileno(), 1)
    to_first = time.perf_counter() - start
    process.stdout.read()
    errors = process.stderr.read().decode(errors="replace")
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    total = time.perf_counter() - start
    if process.returncode or not first:
        raise RunFailed(f"{' '.join(words)}\n  returned {process.returncode}: {errors.strip()[-2000:]}")
    return to_first, total, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--reps", type=int, default=7)
    parser.add_argument("-p", "--prompt", default="Once upon a time")
    args = parser.parse_args()
    words = command(args.model, args.threads, args.prompt)

    def report() -> None:
        measure(words)  # converts where that is needed; the files are then in the page cache
        runs = [measure(words) for _ in range(max(1, args.reps))]
        size = int(run_json(weighing(args.model), ["weight_bytes"])["weight_bytes"])
        first, total, peak = ([run[i] for run in runs] for i in range(3))
        result = {
            "schema": 1,
            "model": args.model,
            "threads": args.threads,
            "first_token_seconds": first,
            "first_token_median": statistics.median(first),
            "total_median": statistics.median(total),
            "weight_bytes": size,
            "peak_rss_bytes": max(peak),
            "peak_over_weights_bytes": max(peak) - size,
        }
        print(json.dumps(result))

    return exit_code(report)


if __name__ == "__main__":
    sys.exit(main())
