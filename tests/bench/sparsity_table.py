"""Quality of TEAL on a model, as the table of predictors/teal/RESULTS.md: levels by each allocation, and perplexity budgets.

    python tests/bench/sparsity_table.py -m MODEL --calibrate ../shared/data/calibration/c4.txt \\
        --text ../shared/data/text/wikitext-2.test.raw

Thresholds come from one text, the figures from another. Quality does not depend on the machine's load; speed is
`sparse-run bench --sparsity NAME`. Prints Markdown; calibration's stages are kept beside the model, so a second run is short.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sparse_run import _core, registry, sparsity
from sparse_run.cli.common import Work
from sparse_run.eval import compare
from sparse_run.packed_header import SITES
from sparse_run.predictors.teal.fit import Fit, Options, level_name
from sparse_run.tokenizer import Tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("-t", "--threads", type=int, default=0)
    parser.add_argument("--calibrate", required=True, help="text for thresholds, levels and budgets")
    parser.add_argument("--text", required=True, help="text for the figures")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--eval-tokens", type=int, default=6144)
    parser.add_argument("--chunks", type=int, default=20, help="chunks of 512 tokens that are evaluated")
    parser.add_argument("--levels", default="0.25,0.4,0.5,0.6")
    parser.add_argument("--budgets", default="1,5", help="perplexity budgets in percent")
    parser.add_argument("--allocations", default="uniform,greedy,global")
    args = parser.parse_args()

    path = registry.resolve(args.model)
    header, tokenizer = sparsity.read_header(path), Tokenizer.load(path)
    core = _core.Model(str(path), args.threads)
    text = Path(args.text).read_text("utf-8")[: args.chunks * 512 * 12]
    ids = tokenizer.encode(text, parse_special=False)
    bos = tokenizer.bos_id if tokenizer.add_bos else None
    options = Options(tokens=args.tokens, eval_tokens=args.eval_tokens)
    with Work() as work:
        fit = Fit(core, tokenizer, header, options, text=Path(args.calibrate).read_text("utf-8"), tick=work)

        def row(name: str, allocation: str, level: float) -> None:
            file = fit.file(allocation, level, measure=False)
            sparsity.save(file, sparsity.path_of(path, name))
            r = compare(core, ids, file.plan(core), n_vocab=fit.n_vocab, chunks=args.chunks, bos=bos)
            d = r.density
            sites = " / ".join(f"{d.get(site, 1.0):.0%}" for site in SITES)
            print(
                f"| {name} | {level:.1%} | {d.get('body', 1.0):.1%} | {sites} | {r.perplexity:.3f} | "
                f"{r.perplexity / r.perplexity_dense - 1:+.2%} | {r.kl_mean:.4f} | {r.kl_p99:.3f} | {r.top1_agreement:.1%} |",
                flush=True,
            )

        print("| file | level | bytes read | kept at A / O / M / Z | perplexity | increase | KL | KL p99 | top-1 |")
        print("|---|---|---|---|---|---|---|---|---|", flush=True)
        for level in map(float, args.levels.split(",")):
            for allocation in args.allocations.split(","):
                row(level_name(level, allocation), allocation, level)
        for budget in map(float, filter(None, args.budgets.split(","))):
            level = fit.search("global", budget / 100)
            held = fit.increase("global", level) if level else 0.0
            print(f"held-out text at {budget:g}%: {held:+.2%} at level {level:.1%}", file=sys.stderr)
            row(f"teal-{budget:g}pct", "global", level)
    core.close()


if __name__ == "__main__":
    main()
