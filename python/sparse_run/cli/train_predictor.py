"""`sparse-run train-predictor`: trains predictors of needed neurons and heads (Deja Vu) and writes a sparsity file."""

from __future__ import annotations

import click

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


@click.command("train-predictor")
@model_option
@threads_option
@click.option("--text", "text_file", metavar="FILE", help="Text like what the model will meet, UTF-8; - is stdin.")
@click.option("--tokens", type=click.IntRange(min=256), default=16384, show_default=True, help="Tokens traced.")
@click.option("--ctx", type=click.IntRange(min=64), default=512, show_default=True, help="Tokens of a chunk.")
@click.option("--rank", type=click.IntRange(min=0), default=0, help="Rank of the predictors.  [default: width / 8]")
@click.option("--bits", type=click.Choice(["4", "8"]), default="8", show_default=True, help="Of a predictor's weight.")
@click.option(
    "--recall",
    type=float,
    default=0.95,
    show_default=True,
    help="Share of the needed neurons that thresholds are set to find, in the mean over the layers.",
)
@click.option("--heads", is_flag=True, help="Predict attention heads too.")
@click.option("--epochs", type=click.IntRange(min=1), default=12, show_default=True, help="Passes over the traces.")
@click.option(
    "--dense-tokens", type=click.IntRange(min=0), default=16, show_default=True, help="First positions that stay dense."
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Seed of text and training.")
@click.option("--name", metavar="NAME", default="dejavu", show_default=True, help="Name of the file.")
@json_option
@verbosity_options
def command(
    model: str | None,
    threads: int | None,
    text_file: str | None,
    tokens: int,
    ctx: int,
    rank: int,
    bits: str,
    recall: float,
    heads: bool,
    epochs: int,
    dense_tokens: int,
    seed: int,
    name: str,
    as_json: bool,
    quiet: bool,
    verbose: int,
) -> None:
    """Train small networks that predict which neurons a token needs (Deja Vu).

    For models whose FFN makes true zeros (ReLU, squared ReLU, FATReLU). Traces come from the model's own generations, and
    from --text for one half. Reports recall and density of every layer beside those of the trivial predictor that reuses
    the previous token's set, and where the model is stored in the layout neurons what decoding with them costs and how
    fast it is. Needs PyTorch, for training only: pip install 'sparse-run[train]'.

    \b
    sparse-run train-predictor -m model.gguf                    writes dejavu, for --sparsity dejavu
    sparse-run train-predictor -m model.gguf --rank 128 --recall 0.98 --heads
    """
    from .. import _core, registry
    from .. import sparsity as files
    from ..predictors.dejavu.fit import CANNOT_RUN, Fit, Options, advice
    from ..predictors.dejavu.train import load_torch
    from ..tokenizer import Tokenizer

    options = Options(
        tokens=tokens,
        ctx=ctx,
        seed=seed,
        rank=rank,
        bits=int(bits),
        epochs=epochs,
        recall=recall,
        heads=heads,
        dense_tokens=dense_tokens,
    )
    text = None if text_file is None else read_text(text_file)
    load_torch()  # it takes seconds, but less than a model that is fetched or converted for nothing
    with Progress(quiet=quiet) as progress:
        path = registry.resolve(model, progress=progress)
    header = files.read_header(path)
    target = files.path_of(path, name)
    core = _core.Model(str(path), threads or 0)
    try:
        with Work(quiet=quiet) as work:
            fit = Fit(core, Tokenizer.load(path), header, options, text=text, tick=work)
            if not quiet:
                for warning in fit.warnings():  # training takes an hour or more
                    click.echo(warning, err=True)
            file = fit.file()
        files.save(file, target)
    finally:
        core.close()
    said = advice(file)
    if as_json:
        print_json({"name": file.name, "path": str(target), "model": file.model_name, "options": file.options,
                    "quality": file.quality, "advice": said})  # fmt: skip
        return
    for what in ("neurons", "heads"):
        if what in file.quality:
            click.echo(f"{what}: recall, density, needed; previous token's set: recall, density")
            for row in file.quality[what]["layers"]:
                click.echo(
                    f"  layer {row['layer']:3d}  {row['recall']:6.1%} {row['density']:6.1%} {row['active']:6.1%}   "
                    f"{row['previous_token_recall']:6.1%} {row['previous_token_density']:6.1%}"
                )
    click.echo(f"{file.name}: {said}")
    click.echo(
        f"  rank {file.quality['rank']}, {file.quality['predictor_bytes'] / 1e6:.2f} MB "
        f"({file.quality['predictor_share']:.1%} of the FFN's bytes)"
    )
    q = file.quality
    if "tokens_per_s" in q:
        click.echo(
            f"  perplexity {q['perplexity_dense']:.3f} -> {q['perplexity']:.3f} ({q['perplexity_increase']:+.2%}) on "
            f"{q['tokens_scored']} held-out tokens; reads {q['density'].get('body', 1.0):.1%} of the layers' weights; "
            f"{q['tokens_per_s_dense']:.1f} -> {q['tokens_per_s']:.1f} tokens/s"
        )
    else:
        click.echo(f"  {CANNOT_RUN}")
    click.echo(f"  {target}")
