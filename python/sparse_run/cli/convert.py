"""`sparse-run convert`: makes a packed model from GGUF or safetensors files."""

from __future__ import annotations

from pathlib import Path

import click

from ..convert.layout import LAYOUTS, LayoutChoice
from ..errors import UsageError
from .common import Progress, json_option, print_json, verbosity_options


@click.command()
@click.argument("source", metavar="SOURCE")
@click.argument("destination", metavar="[DESTINATION]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--force", is_flag=True, allow_from_autoenv=False, help="Replace DESTINATION if it is a packed model already."
)
@click.option(
    "--layout",
    type=click.Choice(LAYOUTS),
    default="auto",
    show_default=True,
    help="How the FFN's gate and up are stored: by input column (panels) or by neuron (neurons, what ReLU models and the"
    " methods that choose neurons want). auto: neurons where the activation gives exact zeros.",
)
@json_option
@verbosity_options
def command(source: str, destination: Path | None, force: bool, layout: LayoutChoice, as_json: bool, quiet: bool, verbose: int) -> None:
    """Make a packed model, the form that is mapped and run as it lies.

    SOURCE is a .gguf file, a model directory, or a name that `sparse-run list` shows. Without DESTINATION the result goes
    into the cache, where every command that is given SOURCE finds it; with a --layout other than auto, give those commands
    the path that is printed here. The weights keep their values and their bits.

    \b
    sparse-run convert model.gguf
    sparse-run convert model.gguf model.packed
    sparse-run convert --layout neurons model.gguf model.neurons
    """
    from ..convert import convert
    from ..convert.writer import is_packed
    from ..registry import find, packed_for, read_source

    with Progress(quiet=quiet) as progress:
        path = find(source, progress=progress)
        if is_packed(path):
            raise UsageError(f"{path} is a packed model already; there is nothing to convert")
        if destination is None:
            packed = packed_for(path, layout=layout, progress=progress, again=force)
        else:
            packed = destination
            convert(path, packed, layout=layout, existing="replace" if force else "refuse", progress=progress)
    if as_json:
        record = read_source(packed)
        print_json(
            {
                "path": str(packed.resolve()),
                "source": str(path.resolve()),
                "source_bytes": record.get("size"),
                "weights_bytes": record.get("weights_bytes"),
                "sha256": record.get("sha256"),
            }
        )
    else:
        click.echo(str(packed))
