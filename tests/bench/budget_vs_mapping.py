#!/usr/bin/env python3
"""A model larger than memory: this engine under --memory-budget and llama.cpp's mapping, each under the same hard limit.

    budget_vs_mapping.py MODEL.gguf --packed PACKED --peer-python PEER --budgets 90 63 45

For every budget, in per cent of the file, both run in turns in a memory cgroup of the budget plus 5% (--limit 1.05; page
cache included), with the file's pages dropped before. With --limit 1 both have exactly the budget, which is stricter than
what --memory-budget promises. Beside the speeds stand bytes read per token, the share of the weights that was resident,
and the disk's rate against direct sequential reads of the same file by four readers, taken right before. Needs root, for
the cgroup; the peer's interpreter needs llama-cpp-python. PACKED should lie on the disk that MODEL lies on.
The result is one JSON object on standard output, the table goes to standard error.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from compare_llamacpp import ROOT, RunFailed, exit_code, machine, run_json, say

READERS, UNIT = 4, 1 << 20


def drop_pages(path: Path) -> None:
    """Takes a file out of the page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def direct_rate(path: Path, seconds: float = 1.5) -> float:
    """Bytes a second of direct sequential reads, units of 1 MiB handed to four readers in order."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    units = os.fstat(fd).st_size // UNIT
    lock, at, total = threading.Lock(), 0, 0
    start = time.perf_counter()

    def read() -> None:
        nonlocal at, total
        buffer = mmap.mmap(-1, UNIT)
        while time.perf_counter() - start < seconds:
            with lock:
                unit, at = at % units, at + 1
            count = os.preadv(fd, [buffer], unit * UNIT)
            with lock:
                total += count

    threads = [threading.Thread(target=read) for _ in range(READERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rate = total / (time.perf_counter() - start)
    os.close(fd)
    return rate


def limited(args: argparse.Namespace, budget: int, command: list[str]) -> list[str]:
    return ["bash", str(args.limit_script), str(int(budget * args.limit)), *command]


def measure_peer(args: argparse.Namespace, budget: int) -> tuple[str, float | None]:
    """What became of one run of the peer, and its tokens a second."""
    drop_pages(args.model)
    small = ["--prompt", str(args.peer_prompt), "--gen", str(args.peer_gen), "--reps", "1"]
    peer = [args.peer_python, str(args.peer_script), "speed", str(args.model), *small, "--threads", str(args.threads)]
    try:
        done = subprocess.run(
            limited(args, budget, peer), check=False, capture_output=True, text=True, timeout=args.peer_timeout
        )
    except subprocess.TimeoutExpired:
        return f"no result in {args.peer_timeout:.0f} s", None
    if done.returncode:
        return f"returned {done.returncode}", None
    return "ran", float(json.loads(done.stdout.strip().splitlines()[-1])["decode_median"])


def measure(args: argparse.Namespace, percent: float, size: int, weights: Path) -> dict[str, Any]:
    budget = int(size * percent / 100)
    sizes = ["--prompt", str(args.prompt), "--gen", str(args.gen), "--reps", "1"]
    ours, peers, result = [], [], {"percent": percent, "budget_bytes": budget, "limit_bytes": int(budget * args.limit)}
    told = "not asked"
    bench = [sys.executable, "-m", "sparse_run", "bench", "-m", str(args.packed), "--memory-budget", str(budget)]
    for number in range(args.runs):
        drop_pages(weights)
        rate = direct_rate(weights)
        command = limited(args, budget, [*bench, "--threads", str(args.threads), *sizes, "--json", "-q"])
        run = run_json(command, ["decode_median"])
        memory = run["memory"]
        read_rate = memory["read_bytes_per_pass"] * run["decode_median"]
        ours.append(
            {
                "decode": run["decode_median"],
                "prompt": run["prompt_median"],
                "read_bytes_per_token": memory["read_bytes_per_pass"],
                "resident_share": memory["hit_rate"],
                "read_rate": read_rate,
                "direct_rate": rate,
                "read_share": read_rate / rate,
                "queue_depth": memory["queue_depth"],
                "peak_rss_bytes": run["peak_rss_bytes"],
                "token_hash": run["token_hash"],
            }
        )
        if args.peer_python and number < args.peer_runs:
            told, peer_rate = measure_peer(args, budget)
            if peer_rate is not None:
                peers.append(peer_rate)
    result["runs"] = ours
    for key in ("decode", "prompt", "read_bytes_per_token", "resident_share", "read_share", "peak_rss_bytes"):
        result[key] = statistics.median(run[key] for run in ours)
    if result["peak_rss_bytes"] > budget:
        raise RunFailed(f"at {percent}% the process took {result['peak_rss_bytes']} bytes, the budget is {budget}")

    result["peer"], result["peer_runs"] = told, peers
    result["peer_decode"] = statistics.median(peers) if peers else None
    result["ratio"] = result["decode"] / result["peer_decode"] if peers else None
    versus = f"{result['peer_decode']:.3f} ({result['ratio']:.1f}x)" if result["ratio"] else result["peer"]
    say(
        f"{percent:>5.0f}% {budget / 1e6:>7.0f} MB  {result['decode']:>7.2f} tok/s  llama.cpp {versus:<22} "
        f"{result['read_bytes_per_token'] / 1e6:>7.1f} MB a token, {result['resident_share']:.0%} resident, "
        f"{result['read_share']:.0%} of direct reads, peak {result['peak_rss_bytes'] / 1e6:.0f} MB"
    )
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("--packed", type=Path, required=True, help="its packed directory; made where it is absent")
    parser.add_argument("--peer-python", help="an interpreter that has llama-cpp-python; without it only this engine runs")
    peers = ROOT.parent / "shared" / "peers"
    parser.add_argument("--peer-script", type=Path, default=peers / "llamacpp_bench.py")
    parser.add_argument("--limit-script", type=Path, default=peers / "with_memory_limit.sh")
    parser.add_argument("--budgets", type=float, nargs="+", default=[90, 63, 45], help="per cent of the GGUF file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--gen", type=int, default=12)
    parser.add_argument("--runs", type=int, default=3, help="of this engine; medians count")
    parser.add_argument("--limit", type=float, default=1.05, help="hard limit of both, as a multiple of the budget")
    parser.add_argument("--peer-runs", type=int, default=3, help="of these runs, followed by one of the peer each")
    parser.add_argument("--peer-prompt", type=int, default=2)
    parser.add_argument("--peer-gen", type=int, default=2, help="few: a token may take the peer half a minute")
    parser.add_argument("--peer-timeout", type=float, default=600)
    args = parser.parse_args()
    for path in (args.model, args.limit_script):
        if not path.is_file():
            parser.error(f"{path} does not exist")

    def all_budgets() -> None:
        if not args.packed.is_dir():
            say("converting")
            convert = [sys.executable, "-m", "sparse_run", "convert", str(args.model), str(args.packed), "-q"]
            subprocess.run(convert, check=True, stdout=subprocess.DEVNULL)
        size, weights = args.model.stat().st_size, args.packed / "weights.safetensors"
        results = [measure(args, percent, size, weights) for percent in args.budgets]
        head = {"schema": 1, "model": args.model.name, "file_bytes": size, "machine": machine(), "threads": args.threads}
        print(json.dumps({**head, "budgets": results}))

    return exit_code(all_budgets)


if __name__ == "__main__":
    sys.exit(main())
