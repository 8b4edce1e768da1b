"""`sparse-run calibrate`: makes sparsity files for a model: thresholds, levels, and the quality they measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from .common import (
    Progress,
    Work,
    json_option,
    model_option,
    print_json,
    read_text,
    threads_option,
    verbosity_options,
)

if TYPE_CHECKING:
    from ..sparsity import SparsityFile


@click.command("calibrate")
@model_option
@threads_option
@click.option(
    "--method",
    metavar="NAME",
    default="teal",
    show_default=True,
    help="How it is chosen what to skip: a folder of predictors.",
)
@click.option(
    "--max-ppl-increase",
    "budgets",
    metavar="P%",
    multiple=True,
    help="Skip as much as costs at most this much perplexity, such as 1%; may be repeated.  [default: 1%]",
)
@click.option(
    "--level", "levels", multiple=True, metavar="S", help="Skip this share of the inputs, 0..1; may be repeated."
)
@click.option(
    "--allocation",
    metavar="NAME",
    help="The method's variant. teal: how levels differ by layer and site, global, greedy, uniform, or time, which saves time "
    "as `bench --breakeven` measured it instead of bytes.  [default for teal: uniform with --level, else global]",
)
@click.option(
    "--score",
    type=click.Choice(["abs", "wina"]),
    help="teal: an input's weight, its magnitude, or that times the norm of its column.  [default: abs]",
)
@click.option("--text", "text_file", metavar="FILE", help="Text like what the model will meet, UTF-8; - is stdin.")
@click.option("--tokens", type=click.IntRange(min=128), default=8192, show_default=True, help="Tokens for thresholds.")
@click.option(
    "--eval-tokens", type=click.IntRange(min=128), default=6144, show_default=True, help="Held-out tokens for quality."
)
@click.option("--ctx", type=click.IntRange(min=64), default=512, show_default=True, help="Tokens of a chunk.")
@click.option(
    "--dense-tokens", type=click.IntRange(min=0), default=16, show_default=True, help="First positions that stay dense."
)
@click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Seed of the model's own text."
)
@click.option("--name", metavar="NAME", help="Name of the file; with one level or budget only.")
@json_option
@verbosity_options
def command(
    model: str | None,
    threads: int | None,
    method: str,
    budgets: tuple[str, ...],
    levels: tuple[str, ...],
    allocation: str | None,
    score: str | None,
    text_file: str | None,
    tokens: int,
    eval_tokens: int,
    ctx: int,
    dense_tokens: int,
    seed: int,
    name: str | None,
    as_json: bool,
    quiet: bool,
    verbose: int,
) -> None:
    """Find out which weights a model can skip while it decodes, and what that costs.

    Writes one sparsity file for each --max-ppl-increase and --level, with the quality and speed that were measured; use it
    with --sparsity NAME. Half of the calibration text is made by the model itself, the other half is --text; without --text
    all of it is the model's own.

    \b
    sparse-run calibrate --max-ppl-increase 1%                 writes teal-1pct, which --sparsity auto uses
    sparse-run calibrate --text my.txt --max-ppl-increase 1% --max-ppl-increase 5%
    sparse-run calibrate --level 0.5                           writes uniform-0.50

    An interrupted calibration goes on where it was when it is started again with the same options.
    """
    from .. import _core, registry
    from .. import sparsity as files
    from ..predictors.common import methods
    from ..tokenizer import Tokenizer

    wanted_levels = [_level(text) for text in levels]
    wanted_budgets = sorted({_budget(text) for text in budgets})
    if not wanted_levels and not wanted_budgets:
        wanted_budgets = [0.01]
    if name is not None and len(wanted_levels) + len(wanted_budgets) != 1:
        raise click.UsageError("--name goes with one --level or one --max-ppl-increase")
    kind_of_fit = methods.fit_class(method)
    if allocation is not None and allocation not in kind_of_fit.ALLOCATIONS:
        raise UsageError(
            f"{method} has no allocation {allocation!r}; it must be one of {', '.join(kind_of_fit.ALLOCATIONS)}"
        )
    options = methods.options(
        method, tokens=tokens, eval_tokens=eval_tokens, ctx=ctx, seed=seed, score=score, dense_tokens=dense_tokens
    )
    with Progress(quiet=quiet) as progress:
        path = registry.resolve(model, progress=progress)
    header = files.read_header(path)
    if name is not None:
        files.path_of(path, name)
    text = None if text_file is None else read_text(text_file)
    written: list[SparsityFile] = []
    core = _core.Model(str(path), threads or 0)
    try:
        with Work(quiet=quiet) as work:
            fit = kind_of_fit(core, Tokenizer.load(path), header, options, text=text, tick=work)
            for level in wanted_levels:
                kind = allocation or fit.default_allocation(budget=False)
                file = fit.file(kind, level)
                files.save(file, files.path_of(path, name or fit.name_of(kind, level, None)))
                written.append(file)
            for budget in wanted_budgets:
                kind = allocation or fit.default_allocation(budget=True)
                level = fit.search(kind, budget)
                file = fit.file(kind, level, extra={"max_ppl_increase": budget})
                files.save(file, files.path_of(path, name or fit.name_of(kind, None, budget)))
                written.append(file)
    finally:
        core.close()
    if as_json:
        print_json({"model": written[0].model_name, "files": [_as_dict(file) for file in written]})
    else:
        for file in written:
            click.echo(report(file))


def _level(text: str) -> float:
    from ..sparsity import parse_level

    level = parse_level(text)
    if level is None:
        raise UsageError(f"{text!r} is no level; give a number from 0 to 1, such as 0.5")
    return level


def _budget(text: str) -> float:
    """ "1%" or "1" -> 0.01."""
    try:
        percent = float(text.strip().removesuffix("%"))
    except ValueError:
        percent = -1.0
    if not 0 < percent <= 1000:
        raise UsageError(f"{text!r} is no budget; give a percentage above 0, such as 1%")
    return percent / 100


def _as_dict(file: SparsityFile) -> dict[str, Any]:
    return {
        "name": file.name,
        "path": str(file.path),
        "method": file.method,
        "options": file.options,
        "dense_tokens": file.dense_tokens,
        "levels": file.levels,
        "n_tokens": file.n_tokens,
        "corpus": file.corpus,
        "quality": file.quality,
    }


def report(file: SparsityFile) -> str:
    """What one file holds, for people."""
    q = file.quality
    sites = ", ".join(f"{site} {share:.0%}" for site, share in q["density"].items() if site != "body")
    if file.skips_nothing:
        wanted = file.options.get("max_ppl_increase")
        reads = "skips nothing: no level that saves time on this machine " + (
            f"costs at most {wanted:.3g}; allow more with --max-ppl-increase" if wanted else "is that low; raise --level"
        )
    else:
        reads = f"reads {q['density'].get('body', 1.0):.1%} of the layers' weights ({sites})"
    return "\n".join(
        (
            f"{file.name}: {reads}",
            (
                f"  perplexity {q['perplexity_dense']:.3f} -> {q['perplexity']:.3f} ({q['perplexity_increase']:+.2%}) on "
                f"{q['tokens_scored']} tokens of {q['text']}; KL {q['kl_mean']:.4f} (99%: {q['kl_p99']:.3f}); the same first "
                f"choice {q['top1_agreement']:.1%}"
            ),
            (
                f"  {q['bytes_per_token_dense'] / 1e6:.1f} -> {q['bytes_per_token'] / 1e6:.1f} MB a token; "
                f"{q['tokens_per_s_dense']:.1f} -> {q['tokens_per_s']:.1f} tokens/s"
            ),
            f"  {Path(str(file.path))}",
        )
    )
