#!/usr/bin/env python3
"""The speed table of the root README, in one go: every row is measured now, on this machine, and printed as Markdown.

    speed_table.py --peer-python /path/to/python --models FOLDER --text wikitext-2.test.raw --work FOLDER

FOLDER of --models holds SmolLM2-135M-Instruct.Q4_1.gguf and gemma-3-270m-q4_k_m.gguf (shared/models/fetch_models.sh);
random models of 1B and 3B shape are made in --work where they are not there yet (2.5 GB). Rows are made by the programs
beside this one (compare_llamacpp.py, startup.py) and by `sparse-run bench --sparsity`; `--only` takes some of them. About
12 minutes on two cores. A row that fails ends the run with its error; rows before it have been printed by then.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compare_llamacpp import exit_code, machine, run_json, say

HERE = Path(__file__).resolve().parent
SMOL, GEMMA = "SmolLM2-135M-Instruct.Q4_1.gguf", "gemma-3-270m-q4_k_m.gguf"


class Table:
    """Measures rows and prints each when it is there."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    def compared(self, model: Path, *words: str, isa: str | None = None) -> dict[str, Any]:
        if isa:
            os.environ["SPARSE_RUN_FORCE_ISA"] = isa
        try:
            peer = ["--peer-python", self.args.peer_python, "--threads", str(self.args.threads)]
            return run_json([sys.executable, str(HERE / "compare_llamacpp.py"), str(model), *peer, *words], [])
        finally:
            os.environ.pop("SPARSE_RUN_FORCE_ISA", None)

    def random(self, shape: str, kind: str) -> Path:
        path: Path = self.args.work / f"llama-{shape}-{kind}.gguf"
        if not path.exists():
            say(f"making {path}")
            partly = path.with_suffix(".partly")
            words = [str(HERE / "make_random_llama.py"), str(partly), "--shape", shape, "--type", kind]
            subprocess.run([sys.executable, *words], check=True, stdout=sys.stderr)
            partly.rename(path)
        return path

    def pairs(self, name: str, model: Path, *words: str, prompt: bool = True, isa: str | None = None) -> None:
        result = self.compared(model, "--pairs", str(self.args.pairs), *words, isa=isa)
        for what in ("decode", "prompt") if prompt else ("decode",):
            ratios = [p[f"{what}_ratio"] for p in result["pairs"]]
            middle = result["median"]
            title = "decode" if what == "decode" else f"prompt of {result['prompt']}"
            row(
                f"{name} ({result['isa']}): {title}, tokens/s",
                f"{middle[what]:.4g}",
                f"{middle[f'peer_{what}']:.4g}",
                f"{middle[f'{what}_ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            )
        shares = [p["stream_share"] for p in result["pairs"]]
        row(
            f"{name} ({result['isa']}): share of the read rate",
            f"{statistics.median(shares):.0%} ({min(shares):.0%} to {max(shares):.0%})",
        )

    def sparse(self, name: str, model: Path, level: str) -> None:
        """Of a random model: its thresholds need few tokens, in chunks about as long as what is decoded here."""
        program = [sys.executable, "-m", "sparse_run"]
        common = ["-m", str(model), "--threads", str(self.args.threads)]
        few = ["--text", str(self.args.text), "--tokens", "512", "--eval-tokens", "256", "--ctx", "128"]
        subprocess.run(
            [*program, "calibrate", *common, *few, "--level", level, "--name", f"table-{level}"],
            stdout=subprocess.DEVNULL,
            check=True,
        )
        words = ["--prompt", "16", "--gen", "32", "--reps", str(self.args.pairs), "--sparsity", f"table-{level}"]
        command = [*program, "bench", *common, *words]
        r = run_json([*command, "--json"], ["decode_dense_median", "decode_sparse_median", "sparse_ratio"])
        rates = zip(r["decode_dense_tokens_per_s"], r["decode_sparse_tokens_per_s"], strict=True)
        ratios = [skipping / dense for dense, skipping in rates]
        row(
            f"{name}, TEAL at {float(level):.0%}, {r['density']['body']:.0%} of the layers' bytes read: decode, tokens/s",
            f"{r['decode_sparse_median']:.4g}",
            f"(own dense: {r['decode_dense_median']:.4g})",
            f"{r['sparse_ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        )

    def rows(self) -> dict[str, Callable[[], None]]:
        """Name of a row, what measures it."""
        smol, gemma = self.args.models / SMOL, self.args.models / GEMMA

        def perplexity(name: str, model: Path) -> None:
            r = self.compared(model, "--ppl", str(self.args.text))
            title = f"{name}: perplexity, {r['tokens_scored']} tokens, ctx {r['ctx']}"
            row(title, f"{r['perplexity']:.3f}", f"{r['peer_perplexity']:.3f}", f"{r['relative_difference']:+.2%}")

        def startup() -> None:
            words = [str(HERE / "startup.py"), str(smol), "--threads", str(self.args.threads)]
            r = run_json([sys.executable, *words], ["first_token_median"])
            row("SmolLM2, packed: start of the process to first token, s", f"{r['first_token_median']:.2f}")
            over = r["peak_over_weights_bytes"] / 1e6
            row("SmolLM2, packed: peak memory above the weights' size, MB", f"{over:.0f}")

        short = ("--prompt", "64", "--gen", "32")
        return {
            "smol": lambda: self.pairs("SmolLM2-135M-Instruct Q4_1", smol),
            "smol-avx2": lambda: self.pairs("SmolLM2-135M-Instruct Q4_1", smol, isa="avx2"),
            "smol-ppl": lambda: perplexity("SmolLM2-135M-Instruct Q4_1", smol),
            "1b-q4_1": lambda: self.pairs(
                "Llama of 1B shape, random Q4_1", self.random("1b", "q4_1"), *short, prompt=False
            ),
            "1b-q4_0": lambda: self.pairs(
                "Llama of 1B shape, random Q4_0", self.random("1b", "q4_0"), *short, prompt=False
            ),
            "gemma": lambda: self.pairs("Gemma-3-270M Q4_K_M", gemma),
            "1b-50": lambda: self.sparse("Llama of 1B shape, random Q4_0", self.random("1b", "q4_0"), "0.5"),
            "3b-50": lambda: self.sparse("Llama of 3B shape, random Q4_0", self.random("3b", "q4_0"), "0.5"),
            "startup": startup,
        }


def row(name: str, ours: str, peer: str = "", ratio: str = "") -> None:
    print(f"| {name} | {ours} | {peer} | {ratio} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="an interpreter that has llama-cpp-python")
    parser.add_argument("--models", type=Path, required=True, help=f"folder of {SMOL} and {GEMMA}")
    parser.add_argument("--text", type=Path, required=True, help="WikiText-2's test text")
    parser.add_argument("--work", type=Path, required=True, help="where random models are made")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--only", metavar="ROW,ROW", help="names of rows; all without it")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    rows = Table(args).rows()
    names = args.only.split(",") if args.only else list(rows)
    for name in names:
        if name not in rows:
            parser.error(f"no row {name!r}; rows: {', '.join(rows)}")
    for path in (args.models / SMOL, args.models / GEMMA, args.text):
        if not path.is_file():
            parser.error(f"{path} does not exist")
    print(
        f"{machine()}, {args.threads} threads, {args.pairs} pairs\n\n| | sparse-run | llama.cpp | ratio |\n|---|---|---|---|"
    )

    def measure() -> None:
        for name in names:
            say(f"-- {name}")
            rows[name]()

    return exit_code(measure)


if __name__ == "__main__":
    sys.exit(main())
