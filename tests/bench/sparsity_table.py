"""Quality and speed of every method on real models: one row for each method, variant and level or perplexity budget.

    python tests/bench/sparsity_table.py -m A.gguf -m B.gguf --calibrate c4.txt --text wikitext-2.test.raw -o measured
    python tests/bench/sparsity_table.py ... -o measured --speed        on a quiet machine, after the first

Writes measured/MODEL.json (what `sparse-run plot --table` draws) and measured/RESULTS.md. Thresholds come from one text, the
figures from another: perplexity with the standard error of its increase (paired, token by token), KL divergence, agreement,
bytes; with --choice accuracies; with --speed decoding rates, dense and sparse in turns. Methods are the folders of
predictors/; each is measured in the layout that it needs, and one that a model does not allow is left out, and said so.

All rows of a layout share one dense pass, chunk after chunk. Conversions and what was measured are kept in measured/.work, the
latter by the thresholds that it was measured with: the command may be stopped and started at will (--for SECONDS stops it by
itself), goes on with more chunks or rows, and gives a table of the chunks that all rows have. Quality does not depend on the
machine's load.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sparse_run import _core, registry, sparsity
from sparse_run.bench.sparse import bench_sparse
from sparse_run.cli.common import Work
from sparse_run.convert import convert
from sparse_run.convert.layout import LayoutChoice
from sparse_run.errors import UsageError
from sparse_run.eval.choice import read_questions, score
from sparse_run.eval.perplexity import cut_chunks
from sparse_run.eval.sparse import Comparison, Scores, joined
from sparse_run.predictors.common import methods
from sparse_run.predictors.common.calibration import Calibration, bytes_per_token
from sparse_run.skipping import bind
from sparse_run.tokenizer import Tokenizer
from sparsity_markdown import markdown

ROOT = Path(__file__).resolve().parents[2]
CTX = 512
BLOCK = 20  # questions that are kept together
WINA = ("0.4", "0.5")  # levels at which the score |x| ||W|| is measured beside |x|


class Stop(Exception):
    """The time that --for gave is over."""


@dataclass(frozen=True)
class Job:
    """A row to be: a level 0..1 or a budget, 0.01 for one percent."""

    method: str
    allocation: str
    level: float | None = None
    budget: float | None = None
    score: str | None = None


@dataclass
class Row:
    job: Job
    layout: str
    file: sparsity.SparsityFile
    level: float
    stamp: str
    """Of what decides the figures: the model, the thresholds or sets, and the positions that stay dense."""
    held_out: tuple[float, float] | None = None
    """A preset's increase of perplexity on the text that it was searched on, and its standard error."""


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("-m", "--model", action="append", required=True, dest="models")
    parser.add_argument("-o", "--out", required=True, metavar="DIR")
    parser.add_argument("-t", "--threads", type=int, default=0)
    parser.add_argument("--calibrate", required=True, metavar="FILE", help="text for thresholds, levels and budgets")
    parser.add_argument("--text", required=True, metavar="FILE", help="text for the figures")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--eval-tokens", type=int, default=6144)
    parser.add_argument("--chunks", type=int, default=20, help=f"chunks of {CTX} tokens that are evaluated")
    parser.add_argument("--levels", default="0.25,0.4,0.5,0.6")
    parser.add_argument(
        "--budgets",
        default="1,5,0.5:teal,2:teal",
        metavar="P[:METHOD[:VARIANT]],...",
        help="presets, in percent of perplexity, for the first wanted variant of every method or of one",
    )
    parser.add_argument("--methods", help="names of methods or METHOD:VARIANT, by default all")
    parser.add_argument("--choice", metavar="DIR", help="folder of multiple-choice tasks, TASK.jsonl")
    parser.add_argument("--tasks", default="piqa,arc_easy,winogrande,openbook_qa")
    parser.add_argument("--questions", type=int, default=200, help="of each task")
    parser.add_argument("--speed", action="store_true", help="measure rates, of rows that have none, and nothing else")
    parser.add_argument("--for", type=float, default=1e9, dest="seconds", metavar="SECONDS")
    return parser.parse_args(arguments)


def main() -> None:
    args = parsed()
    stop = time.monotonic() + args.seconds
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for source in args.models:
        table = Table(args, source, stop)
        try:
            table.fill()
        except Stop:
            break
        finally:
            table.save()
    tables = [json.loads(path.read_text("utf-8")) for path in sorted(out.glob("*.json"))]
    (out / "RESULTS.md").write_text(markdown(tables), "utf-8")


def slug_of(source: Path) -> str:
    return source.name.removesuffix(".gguf")


class Layout:
    """A model in one layout of its FFN, and the calibrations of the methods that want this layout."""

    def __init__(self, args: argparse.Namespace, source: Path, name: LayoutChoice, store: Path) -> None:
        self.args, self.name = args, name
        self.other: Layout | None = None
        """The same weights in another layout, which make the same text."""
        self.path = store / f"{slug_of(source)}.{name}"
        if not (self.path / "weights.safetensors").is_file():
            convert(source, self.path, layout=name, existing="overwrite")
        self.header = sparsity.read_header(self.path)
        self.tokenizer = Tokenizer.load(self.path)
        self.fits: dict[tuple[str, str | None], Calibration] = {}

    @cached_property
    def core(self) -> _core.Model:
        return _core.Model(str(self.path), self.args.threads)

    def fit(self, job: Job, work: Work) -> Calibration:
        """Raises UsageError where the method does not go with the layout."""
        key = (job.method, job.score)
        if key not in self.fits:
            args = self.args
            options = methods.options(job.method, tokens=args.tokens, eval_tokens=args.eval_tokens, score=job.score)
            text = Path(args.calibrate).read_text("utf-8")
            kind = methods.fit_class(job.method)
            fit = kind(self.core, self.tokenizer, self.header, options, text=text, tick=work)
            if self.other is not None:
                fit.share_text(self.other.header)
            self.fits[key] = fit
        return self.fits[key]


class Table:
    """One model's table."""

    def __init__(self, args: argparse.Namespace, source: str, stop: float) -> None:
        self.args, self.stop = args, stop
        path = registry.find(source)
        self.store = Path(args.out) / ".work"
        self.store.mkdir(parents=True, exist_ok=True)
        names: tuple[LayoutChoice, ...] = ("panels", "neurons")
        self.layouts: dict[str, Layout] = {name: Layout(args, path, name, self.store) for name in names}
        first = self.layouts["panels"]
        self.layouts["neurons"].other = first
        self.model = str(first.header.config.get("name") or path.name)
        self.slug = slug_of(path)
        self.path = Path(args.out) / f"{self.slug}.json"
        text = Path(args.text).read_text("utf-8")[: args.chunks * CTX * 12]
        ids = first.tokenizer.encode(text, parse_special=False)
        bos = first.tokenizer.bos_id if first.tokenizer.add_bos else None
        self.chunks = cut_chunks(ids, ctx=CTX, chunks=args.chunks, bos=bos)
        self.rows: list[Row] = []

    # What is wanted

    def jobs(self) -> Iterator[Job]:
        """Rows of the table: levels first, which take no search."""
        wanted: dict[str, list[str]] = {}
        only = self.args.methods.split(",") if self.args.methods else None
        for name in methods.calibrated():
            for variant in methods.fit_class(name).ALLOCATIONS:
                if only is None or name in only or f"{name}:{variant}" in only:
                    wanted.setdefault(name, []).append(variant)
        levels = list(filter(None, self.args.levels.split(",")))
        for name, variants in wanted.items():
            for variant in variants:
                yield from (Job(name, variant, level=float(level)) for level in levels)
        if "uniform" in wanted.get("teal", ()):
            yield from (Job("teal", "uniform", level=float(level), score="wina") for level in WINA if level in levels)
        for budget in filter(None, self.args.budgets.split(",")):
            percent, *of = budget.split(":")
            for name, variants in wanted.items():
                if not of or of[0] == name:
                    yield Job(name, of[1] if len(of) > 1 else variants[0], budget=float(percent) / 100)

    def row(self, job: Job, work: Work) -> Row | None:
        """A row without figures, in the first layout that the method allows; None where none does."""
        reason = ""
        for layout in self.layouts.values():
            try:
                fit = layout.fit(job, work)
            except UsageError as error:
                reason = str(error)
                continue
            try:
                level = job.level if job.level is not None else fit.search(job.allocation, job.budget or 0.0)
                file = fit.file(job.allocation, level, measure=False)
            except UsageError as error:
                reason = str(error)
                break
            sparsity.save(file, sparsity.path_of(layout.path, fit.name_of(job.allocation, job.level, job.budget)))
            made = [layout.header.fingerprint, file.method, job.allocation, file.dense_tokens, file.levels]
            stamp = _hash(*made, fit.stamp(job.allocation, level))
            held = fit.increase_error(job.allocation, level) if job.budget is not None and level else None
            return Row(job, layout.name, file, level, stamp, held)
        print(f"{self.model}, {job.method} {job.allocation}: {reason}", file=sys.stderr)
        return None

    # Work

    def fill(self) -> None:
        with Work() as work:
            levels = [job for job in self.jobs() if job.budget is None]
            budgets = [job for job in self.jobs() if job.budget is not None]
            for some in (levels, budgets):  # a search takes long: what needs none is measured first
                for job in some:
                    self.check_time()
                    row = self.row(job, work)
                    if row is not None:
                        self.rows.append(row)
                if not self.args.speed:
                    self.score_texts()
                    self.save()
        if self.args.speed:
            self.measure_speed()
        elif self.args.choice:
            self.score_tasks()

    def check_time(self) -> None:
        if time.monotonic() > self.stop:
            raise Stop

    def kept(self, what: str, *key: Any) -> Path:
        return self.store / f"{what}-{_hash(*key)[:24]}.json"

    def scores_path(self, row: Row, chunk: int) -> Path:
        return self.kept("scores", row.stamp, chunk, self.chunks[chunk].tobytes().hex())

    def score_texts(self) -> None:
        for layout in self.layouts.values():
            for c, ids in enumerate(self.chunks):
                rows = [r for r in self.rows if r.layout == layout.name and not self.scores_path(r, c).exists()]
                if not rows:
                    continue
                self.check_time()
                plans = [bind(row.file, layout.core) for row in rows]
                runs = Comparison(layout.core, plans, n_vocab=int(layout.header.config["n_vocab"]), ctx=CTX)
                start = time.monotonic()
                for row, scores, density in zip(rows, runs.chunk(ids, c), runs.densities(), strict=True):
                    _write(self.scores_path(row, c), _packed(scores) | {"density": density, "commit": commit()})
                print(f"{self.slug}: chunk {c + 1} of {len(self.chunks)}, {len(rows)} rows in {layout.name}, "
                      f"{time.monotonic() - start:.0f} s", flush=True)  # fmt: skip

    def score_tasks(self) -> None:
        presets = [r for r in self.rows if r.job.method == "teal" and r.job.budget in (0.01, 0.05)]
        for task in self.args.tasks.split(","):
            questions = read_questions(Path(self.args.choice) / f"{task}.jsonl", task, self.args.questions)
            for begin in range(0, len(questions), BLOCK):
                part = questions[begin : begin + BLOCK]
                for row in [None, *presets]:
                    path = self.task_path(task, begin, row)
                    if path.exists():
                        continue
                    self.check_time()
                    layout = self.layouts[row.layout if row else "panels"]
                    n_ctx = min(1024, int(layout.header.config["n_ctx_train"]))
                    plan = bind(row.file, layout.core) if row else None
                    found = score(layout.core, layout.tokenizer, part, task=task, n_ctx=n_ctx, plan=plan)
                    right = [int(c == q.gold) for c, q in zip(found.choices, part, strict=True)]
                    _write(path, {"right": right})
                print(f"{self.slug}: {task}, {begin + len(part)} questions", flush=True)

    def task_path(self, task: str, begin: int, row: Row | None) -> Path:
        stamp = row.stamp if row else self.layouts["panels"].header.fingerprint
        return self.kept("task", stamp, task, begin)

    def measure_speed(self) -> None:
        """Presets first, then levels; rows of one layout in turn."""
        order = sorted(self.rows, key=lambda r: (r.job.budget is None, r.layout, r.job.allocation != "global"))
        for row in order:
            path = self.kept("speed", row.stamp)
            if path.exists():
                continue
            self.check_time()
            layout = self.layouts[row.layout]
            opening = layout.tokenizer.encode("The history of the city begins", parse_special=False)
            r = bench_sparse(layout.core, row.file, opening, gen=32, reps=7)
            ratios = [a / b for a, b in zip(r.decode_sparse_tokens_per_s, r.decode_dense_tokens_per_s, strict=True)]
            _write(
                path,
                {
                    "tokens_per_s": r.decode_sparse_median,
                    "tokens_per_s_dense": r.decode_dense_median,
                    "speed_ratio": r.sparse_ratio,
                    "speed_range": [min(ratios), max(ratios)],
                    "threads": layout.core.threads,
                    "isa": layout.core.isa,
                    "speed_commit": commit(),
                },
            )
            print(f"{row.file.name}: {r.sparse_ratio:.2f}x", flush=True)

    # Result

    def complete(self) -> int:
        """The number of chunks that all rows have."""
        for c in range(len(self.chunks)):
            if not all(self.scores_path(row, c).exists() for row in self.rows):
                return c
        return len(self.chunks)

    def save(self) -> None:
        n = self.complete() if self.rows else 0
        if not n:
            return
        args = self.args
        rows, dense, commits = [], {}, set()
        perplexity: float | None = None  # layouts differ in the last digits: their sums are taken in another order
        for row in self.rows:
            parts = [json.loads(self.scores_path(row, c).read_text("utf-8")) for c in range(n)]
            commits |= {part["commit"] for part in parts}
            density = {k: statistics.fmean(p["density"].get(k, 1.0) for p in parts) for k in parts[0]["density"]}
            r = joined([_unpacked(part) for part in parts], density, ctx=CTX)
            layout = self.layouts[row.layout]
            entry = {
                "method": row.job.method,
                "allocation": row.job.allocation,
                "score": row.job.score or "abs",
                "layout": row.layout,
                "name": row.file.name,
                "asked_level": row.job.level,
                "budget": row.job.budget,
                "level": row.level,
                "levels": row.file.levels,
                "perplexity": r.perplexity,
                "perplexity_dense": r.perplexity_dense,
                "increase": r.perplexity_increase,
                "increase_stderr": r.perplexity_increase_stderr,
                "kl_mean": r.kl_mean,
                "kl_p99": r.kl_p99,
                "top1_agreement": r.top1_agreement,
                "density": density,
                "tokens_scored": r.tokens_scored,
                "bytes_per_token": bytes_per_token(layout.core, layout.header, density.get("body", 1.0)),
            }
            if row.held_out is not None:
                entry["held_out_increase"], entry["held_out_stderr"] = row.held_out
            speed = self.kept("speed", row.stamp)
            if speed.exists():
                entry |= json.loads(speed.read_text("utf-8"))
                dense.setdefault(row.layout, []).append(entry["tokens_per_s_dense"])
            entry["tasks"] = self.tasks(row)
            rows.append((entry, r.token_nll))
            if row.layout == "panels" or perplexity is None:
                perplexity = r.perplexity_dense
        for entry, nll in rows:
            if entry["method"] == "teal" and entry["asked_level"] is not None:
                for other, base in rows:
                    same = other["asked_level"] == entry["asked_level"] and other["method"] == "teal"
                    if same and other["score"] == "abs" and other is not entry:
                        entry.setdefault("against", {})[other["allocation"]] = _paired(nll, base)
        first = self.layouts["panels"]
        data = {
            "schema": 1,
            "model": self.model,
            "quantisation": first.header.quantisation,
            "settings": {
                "tokens": args.tokens,
                "eval_tokens": args.eval_tokens,
                "chunks": n,
                "calibrated_on": Path(args.calibrate).name,
                "text": Path(args.text).name,
                "questions": args.questions,
            },
            "cpu": _core.cpu_info()["brand"],
            "command": "python tests/bench/sparsity_table.py " + " ".join(_words(sys.argv[1:])),
            "commits": sorted(commits),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "dense": {
                "perplexity": perplexity,
                "bytes_per_token": first.core.bytes_per_token,
                "tasks": self.tasks(None),
                **{"tokens_per_s" + ("" if k == "panels" else f"_{k}"): statistics.median(v) for k, v in dense.items()},
            },
            "rows": [entry for entry, _ in rows],
        }
        _write(self.path, data, indent=1)

    def tasks(self, row: Row | None) -> dict[str, Any]:
        """{task: {"questions", "accuracy", "stderr", and of rows "difference", "difference_stderr"}}, of the questions that
        were answered dense and by the row."""
        out: dict[str, Any] = {}
        for task in self.args.tasks.split(","):
            right: list[int] = []
            base: list[int] = []
            for begin in range(0, self.args.questions, BLOCK):
                paths = self.task_path(task, begin, row), self.task_path(task, begin, None)
                if not all(path.exists() for path in paths):
                    break
                for path, into in zip(paths, (right, base), strict=True):
                    into += json.loads(path.read_text("utf-8"))["right"]
            n = len(right)
            if not n:
                continue
            share = statistics.fmean(right)
            out[task] = {"questions": n, "accuracy": share, "stderr": math.sqrt(share * (1 - share) / n)}
            if row is not None:
                differences = [a - b for a, b in zip(right, base, strict=True)]
                out[task]["difference"] = statistics.fmean(differences)
                out[task]["difference_stderr"] = statistics.pstdev(differences) / math.sqrt(n)
        return out


def _paired(nll: NDArray[np.float64], base: NDArray[np.float64]) -> tuple[float, float]:
    """The perplexity over another's on the same tokens, less one, and its standard error."""
    difference = nll - base
    factor = math.exp(float(difference.mean()))
    return factor - 1, factor * float(difference.std()) / math.sqrt(len(difference))


def _packed(scores: Scores) -> dict[str, Any]:
    return {
        key: value.round(6).tolist() if isinstance(value, np.ndarray) else value
        for key, value in ((f.name, getattr(scores, f.name)) for f in dataclasses.fields(scores))
    }


def _unpacked(part: dict[str, Any]) -> Scores:
    values = {f.name: part[f.name] for f in dataclasses.fields(Scores)}
    return Scores(**{k: np.asarray(v, np.float64) if isinstance(v, list) else v for k, v in values.items()})


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _write(path: Path, data: dict[str, Any], indent: int | None = None) -> None:
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(data, indent=indent) + "\n", "utf-8")
    os.replace(temporary, path)


def _words(arguments: list[str]) -> list[str]:
    """The command line as another machine would give it: files without their folders, and not for how long."""
    out: list[str] = []
    for word in arguments:
        if word.startswith("--for=") or (out and out[-1] == "--for"):
            out = out[:-1] if out and out[-1] == "--for" else out
            continue
        out.append(shlex.quote(Path(word).name if "/" in word else word))
    return out


def _once(found: Callable[[], str]) -> Callable[[], str]:
    value: list[str] = []
    return lambda: value[0] if value else (value.append(found()) or value[0])


@_once
def commit() -> str:
    """Of this program, as it was started."""
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
