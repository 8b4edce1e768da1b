"""`sparse-run plot`: pictures of quality against speed, of densities, and of predictors."""

from __future__ import annotations

import click

from .common import Progress, json_option, print_json, verbosity_options


@click.command("plot")
@click.argument("model_argument", metavar="[MODEL]", required=False)
@click.option("-m", "--model", metavar="MODEL", help="Draw this model's sparsity files.")
@click.option("--sparsity", "chosen", metavar="NAME", multiple=True, help="Only these files; may be repeated.")
@click.option(
    "--table", "tables", metavar="FILE", multiple=True, help="Measurements of tests/bench/sparsity_table.py --json."
)
@click.option(
    "--peer",
    "peers",
    metavar="FILE",
    multiple=True,
    help="Another engine's files of the model: JSON with name, perplexity and tokens_per_s of each.",
)
@click.option("-o", "--out", metavar="FOLDER", default=".", show_default=True, help="Where the pictures go.")
@click.option(
    "--format",
    "formats",
    type=click.Choice(["png", "svg"]),
    multiple=True,
    help="May be repeated.  [default: both]",
)
@json_option
@verbosity_options
def command(
    model_argument: str | None,
    model: str | None,
    chosen: tuple[str, ...],
    tables: tuple[str, ...],
    peers: tuple[str, ...],
    out: str,
    formats: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    verbose: int,
) -> None:
    """Draw what sparsity costs and brings. Without -m or --table: of the default model, where it is on this machine.

    frontier: perplexity against tokens a second, one line a method. density: what each layer and site keeps. predictor:
    recall against density of trained predictors. Each is drawn where there are figures for it. Needs matplotlib:
    pip install 'sparse-run[plot]'.

    \b
    sparse-run plot -m model.gguf -o pictures
    sparse-run plot --table table.json --peer llamacpp.json -o pictures
    """
    from .. import pictures, registry
    from .. import sparsity as files
    from ..errors import ModelError

    if model is not None and model_argument is not None and model != model_argument:
        raise click.UsageError(f"two models are named, {model_argument!r} and -m {model!r}; name one")
    model = model or model_argument
    if chosen and model is None:
        raise click.UsageError("--sparsity names files of a model; say which with -m MODEL")
    pictures.load_matplotlib()
    parts = [pictures.of_table(path) for path in tables]
    if model is not None or not tables:
        # A model that is fetched or converted now has nothing measured.
        try:
            with Progress(quiet=quiet) as progress:
                path = registry.resolve(model, progress=progress, pull=False)
        except ModelError:
            if model is not None:
                raise
            raise click.UsageError(
                "nothing to draw: name a model that was calibrated with -m MODEL, or measurements with --table FILE"
            ) from None
        header = files.read_header(path)
        names = list(chosen) or files.names(path)
        parts.append(pictures.of_files([files.resolve(name, header) for name in names]))
    figures = pictures.joined(parts)
    for peer in peers:
        figures.peers += pictures.of_peer(peer)
    written = pictures.draw(figures, out, formats or pictures.FORMATS)
    if as_json:
        print_json({"files": [str(path) for path in written]})
    else:
        for path in written:
            click.echo(str(path))
