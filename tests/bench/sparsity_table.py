"""Quality and speed of every method on real models: one row for each method, variant and level or perplexity budget.

    python tests/bench/sparsity_table.py -m MODEL --calibrate c4.txt --text wikitext-2.test.raw --json MODEL.json
    python tests/bench/sparsity_table.py -m MODEL ... --json MODEL.json --speed        on a quiet machine
    python tests/bench/sparsity_table.py --json A.json --json B.json --markdown RESULTS.md

Thresholds come from one text, the figures from another: perplexity with the standard error of its increase (paired, token
by token), KL divergence, agreement, bytes, and with --speed decoding rates, dense and sparse in turns. Methods are the
folders of predictors/; one that the model's layout or activation does not allow is left out, and said so on stderr. Every row
is written as soon as it is measured, and what the file already has is not measured again: the command may be stopped and
started at will (--for SECONDS stops it by itself). Quality does not depend on the machine's load.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from sparse_run import _core, registry, sparsity
from sparse_run.bench.sparse import bench_sparse
from sparse_run.cli.common import Work
from sparse_run.errors import UsageError
from sparse_run.eval import compare_all
from sparse_run.predictors.common import methods
from sparse_run.predictors.common.calibration import Calibration, bytes_per_token
from sparse_run.skipping import bind
from sparse_run.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
_TOGETHER = 6  # rows that share a dense run; they are written together
_COLUMNS = (
    "method",
    "level",
    "bytes",
    "kept by site",
    "perplexity",
    "increase",
    "against uniform",
    "KL",
    "KL p99",
    "top-1",
    "tokens/s",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("-m", "--model")
    parser.add_argument("-t", "--threads", type=int, default=0)
    parser.add_argument("--calibrate", help="text for thresholds, levels and budgets")
    parser.add_argument("--text", help="text for the figures")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--eval-tokens", type=int, default=6144)
    parser.add_argument("--chunks", type=int, default=20, help="chunks of 512 tokens that are evaluated")
    parser.add_argument("--levels", default="0.25,0.4,0.5,0.6")
    parser.add_argument(
        "--budgets", default="1,5", help="perplexity budgets in percent, for the first variant of a method"
    )
    parser.add_argument("--methods", help="names of methods or METHOD:VARIANT, by default all")
    parser.add_argument("--json", action="append", required=True, dest="tables", metavar="FILE")
    parser.add_argument("--markdown", metavar="FILE")
    parser.add_argument(
        "--speed", action="store_true", help="measure the rates of rows that have none, instead of quality"
    )
    parser.add_argument("--for", type=float, default=1e9, dest="seconds", metavar="SECONDS")
    args = parser.parse_args()
    if args.markdown:
        Path(args.markdown).write_text(markdown([json.loads(Path(t).read_text("utf-8")) for t in args.tables]), "utf-8")
        return
    if not args.model or not args.calibrate or not args.text or len(args.tables) != 1:
        parser.error("give -m, --calibrate, --text and one --json, or --markdown")
    Table(args).fill()


class Table:
    """One model's table: JSON {"schema", "model", "settings", "dense", "rows"}, which `sparse-run plot --table` draws."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.path = args, Path(args.tables[0])
        self.stop = time.monotonic() + args.seconds
        self.packed = registry.resolve(args.model)
        self.header = sparsity.read_header(self.packed)
        self.tokenizer = Tokenizer.load(self.packed)
        settings = {key: getattr(args, key) for key in ("tokens", "eval_tokens", "chunks")} | {
            "calibrated_on": Path(args.calibrate).name,
            "text": Path(args.text).name,
        }
        self.data: dict[str, Any] = {
            "schema": 1,
            "model": str(self.header.config.get("name") or self.packed.name),
            "quantisation": self.header.quantisation,
            "layout": self.header.parts["M"][0][0].layout["layout"],
            "settings": settings,
            "dense": {},
            "rows": [],
        }
        if self.path.is_file():
            self.data = json.loads(self.path.read_text("utf-8"))
            if self.data["settings"] != settings:
                raise SystemExit(
                    f"{self.path} was made with other settings: {self.data['settings']}; give another --json"
                )
        self.data["command"] = "python tests/bench/sparsity_table.py " + " ".join(
            Path(word).name if "/" in word else word for word in sys.argv[1:] if not word.startswith("--for=")
        )

    def save(self) -> None:
        self.data["commit"] = subprocess.run(
            ["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
        ).stdout.strip()
        temporary = self.path.with_suffix(".part")
        temporary.write_text(json.dumps(self.data, indent=1), "utf-8")
        temporary.replace(self.path)

    def fill(self) -> None:
        self.core = _core.Model(str(self.packed), self.args.threads)
        try:
            if self.args.speed:
                self.fill_speed()
            else:
                self.fill_quality()
        finally:
            self.core.close()

    def wanted(self) -> list[tuple[str, str]]:
        """(method, variant) pairs."""
        out = []
        for name in methods.calibrated():
            out += [(name, variant) for variant in methods.fit_class(name).ALLOCATIONS]
        only = self.args.methods.split(",") if self.args.methods else None
        return [pair for pair in out if only is None or pair[0] in only or ":".join(pair) in only]

    def fit(self, method: str, work: Work) -> Calibration:
        options = methods.options(method, tokens=self.args.tokens, eval_tokens=self.args.eval_tokens)
        text = Path(self.args.calibrate).read_text("utf-8")
        return methods.fit_class(method)(self.core, self.tokenizer, self.header, options, text=text, tick=work)

    def fill_quality(self) -> None:
        text = Path(self.args.text).read_text("utf-8")[: self.args.chunks * 512 * 12]
        self.ids = self.tokenizer.encode(text, parse_special=False)
        jobs: list[tuple[str, str, float | None, float | None]] = []
        for level in map(float, filter(None, self.args.levels.split(","))):
            jobs += [(method, variant, level, None) for method, variant in self.wanted()]
        for percent in map(float, filter(None, self.args.budgets.split(","))):
            jobs += [(m, v, None, percent / 100) for m, v in self.wanted() if v == methods.fit_class(m).ALLOCATIONS[0]]
        fits: dict[str, Calibration | None] = {}
        done = {(row["method"], row["allocation"], row["asked_level"], row["budget"]) for row in self.data["rows"]}
        jobs = [job for job in jobs if job not in done]
        with Work() as work:
            for begin in range(0, len(jobs), _TOGETHER):
                if time.monotonic() > self.stop:
                    return
                batch: list[tuple[dict[str, Any], sparsity.SparsityFile]] = []
                for method, variant, level, budget in jobs[begin : begin + _TOGETHER]:
                    try:
                        if method not in fits:
                            fits[method] = self.fit(method, work)
                        fit = fits[method]
                        if fit is not None:
                            batch.append(self.prepared(fit, variant, level, budget))
                    except UsageError as error:
                        print(f"{method} {variant}: {error}", file=sys.stderr)
                        fits[method] = None
                self.measure(batch)

    def prepared(
        self, fit: Calibration, variant: str, level: float | None, budget: float | None
    ) -> tuple[dict[str, Any], sparsity.SparsityFile]:
        """A row without its figures, and the file whose figures they will be."""
        found = level if level is not None else fit.search(variant, budget or 0.0)
        file = fit.file(variant, found, measure=False)
        sparsity.save(file, sparsity.path_of(self.packed, fit.name_of(variant, level, budget)))
        row = {
            "method": fit.METHOD,
            "allocation": variant,
            "name": file.name,
            "asked_level": level,
            "budget": budget,
            "level": found,
            "held_out_increase": fit.increase(variant, found) if budget is not None and found else None,
            "levels": file.levels,
        }
        return row, file

    def measure(self, batch: list[tuple[dict[str, Any], sparsity.SparsityFile]]) -> None:
        if not batch:
            return
        bos = self.tokenizer.bos_id if self.tokenizer.add_bos else None
        n_vocab = int(self.header.config["n_vocab"])
        plans = [bind(file, self.core) for _, file in batch]
        results = compare_all(self.core, self.ids, plans, n_vocab=n_vocab, chunks=self.args.chunks, bos=bos)
        for (row, _), r in zip(batch, results, strict=True):
            print(
                f"{row['name']}: {r.perplexity:.3f}, {r.perplexity_increase:+.2%} +- {r.perplexity_increase_stderr:.2%}, "
                f"KL {r.kl_mean:.4f}",
                flush=True,
            )
            self.data["rows"].append(
                row
                | {
                    "perplexity": r.perplexity,
                    "increase": r.perplexity_increase,
                    "increase_stderr": r.perplexity_increase_stderr,
                    "kl_mean": r.kl_mean,
                    "kl_p99": r.kl_p99,
                    "top1_agreement": r.top1_agreement,
                    "density": r.density,
                    "tokens_scored": r.tokens_scored,
                    "token_nll": [round(float(x), 4) for x in r.token_nll],
                    "bytes_per_token": bytes_per_token(self.core, self.header, r.density.get("body", 1.0)),
                }
            )
        self.data["dense"]["perplexity"] = results[0].perplexity_dense
        self.data["dense"]["bytes_per_token"] = self.core.bytes_per_token
        self.save()

    def fill_speed(self) -> None:
        opening = self.tokenizer.encode("The history of the city begins", parse_special=False)
        for row in self.data["rows"]:
            if "tokens_per_s" in row or time.monotonic() > self.stop:
                continue
            file = sparsity.load(sparsity.path_of(self.packed, row["name"]), self.header)
            r = bench_sparse(self.core, file, opening, gen=48, reps=5)
            row["tokens_per_s"], row["tokens_per_s_dense"] = r.decode_sparse_median, r.decode_dense_median
            row["speed_ratio"], row["threads"], row["isa"] = r.sparse_ratio, self.core.threads, self.core.isa
            rates = [other["tokens_per_s_dense"] for other in self.data["rows"] if "tokens_per_s_dense" in other]
            self.data["dense"]["tokens_per_s"] = sorted(rates)[len(rates) // 2]
            self.save()
            print(f"{row['name']}: {r.sparse_ratio:.2f}x", flush=True)


def markdown(tables: list[dict[str, Any]]) -> str:
    """The tables as a page."""
    cpu = _core.cpu_info()
    out = [
        "# Sparsity, measured",
        "",
        f"By `tests/bench/sparsity_table.py`; {cpu['physical_cores']} cores of {cpu['brand']}.",
        "",
        "- Level: share of the inputs (of the neurons, for methods that skip neurons) that is skipped, by calibration. Presets",
        "  are searched on held-out text of the calibration's kind (its increase in brackets), and measured on the other text.",
        "- Bytes: what a decoded token reads of the layers' matrices.",
        "- +-: standard error of the increase of perplexity, from the differences token by token. Against uniform: likewise, of",
        "  the perplexity over that of uniform levels on the same tokens.",
        "- tokens/s: decoding, sparse (against dense, in turns, medians).",
    ]
    for table in tables:
        s, dense = table["settings"], table["dense"]
        out += [
            "",
            f"## {table['model']} ({table['quantisation']}; FFN stored as {table['layout']})",
            "",
            f"    {table['command']}",
            "",
            f"Commit {table.get('commit', '?')}. Calibrated on {s['tokens']} tokens, half of {s['calibrated_on']} and half",
            f"the model's own; figures from {s['chunks']} chunks of 512 tokens of {s['text']}. Dense: perplexity",
            f"{dense.get('perplexity', 0):.3f}, {dense.get('bytes_per_token', 0) / 1e6:.1f} MB a token"
            + (f", {dense['tokens_per_s']:.0f} tokens/s." if "tokens_per_s" in dense else "."),
            "",
            "| " + " | ".join(_COLUMNS) + " |",
            "|" + "---|" * len(_COLUMNS),
        ]
        rows = sorted(table["rows"], key=lambda r: (r["budget"] is not None, r["asked_level"] or r["budget"] or 0))
        uniform = {r["asked_level"]: r for r in rows if r["allocation"] == "uniform"}
        out += [_line(row, uniform.get(row["asked_level"])) for row in rows]
    return "\n".join(out) + "\n"


def _line(row: dict[str, Any], uniform: dict[str, Any] | None) -> str:
    method = row["method"] if row["allocation"] == row["method"] else f"{row['method']} {row['allocation']}"
    level = f"{row['level']:.0%}"
    if row["budget"] is not None:
        method = f"**{method}, preset {row['budget']:.1%}**"
        held = row["held_out_increase"]
        level = f"{row['level']:.1%}" + (f" [{held:+.1%}]" if held is not None else "")
    d = row["density"]
    sites = " ".join(f"{site} {share:.0%}" for site, share in d.items() if site != "body")
    rate = f"{row['tokens_per_s']:.0f} ({row['speed_ratio']:.2f}x)" if "tokens_per_s" in row else ""
    cells = (
        method,
        level,
        f"{d.get('body', 1.0):.1%}",
        sites,
        f"{row['perplexity']:.3f}",
        f"{row['increase']:+.1%} +- {row['increase_stderr']:.1%}",
        _against(row, uniform),
        f"{row['kl_mean']:.4f}",
        f"{row['kl_p99']:.2f}",
        f"{row['top1_agreement']:.1%}",
        rate,
    )
    return "| " + " | ".join(cells) + " |"


def _against(row: dict[str, Any], uniform: dict[str, Any] | None) -> str:
    """The perplexity over that of uniform levels, less one, with its standard error, token by token."""
    if uniform is None or uniform is row or len(uniform["token_nll"]) != len(row["token_nll"]):
        return ""
    differences = [a - b for a, b in zip(row["token_nll"], uniform["token_nll"], strict=True)]
    factor = math.exp(statistics.fmean(differences))
    return f"{factor - 1:+.1%} +- {factor * statistics.pstdev(differences) / len(differences) ** 0.5:.1%}"


if __name__ == "__main__":
    main()
