"""`sparse-run convert`: makes a packed model from GGUF or safetensors files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..convert.layout import LAYOUTS, LayoutChoice
from ..errors import UsageError
from .common import Progress, json_option, print_json, quality_line, read_text, verbosity_options

if TYPE_CHECKING:
    from ..convert.writer import Existing


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
@click.option(
    "--order",
    metavar="FILE",
    allow_from_autoenv=False,
    help="Also write the FFN's neurons one by one, those first that this text uses most, so that a memory budget can hold and"
    " read single ones. The word none: in the order they have.",
)
@click.option(
    "--bits",
    type=click.Choice(["auto", "4", "5", "6", "8", "16"]),
    allow_from_autoenv=False,
    help="Round the layers' weights to so many bits; embedding and head keep at least 6. auto deals bits out by error.",
)
@click.option(
    "--target-bpw",
    type=click.FloatRange(4.5, 8.5),
    allow_from_autoenv=False,
    help="With --bits auto: bits a weight, scales included, over all matrices.  [default: 4.5]",
)
@click.option(
    "--group",
    type=click.Choice(["32", "64", "128"]),
    default="32",
    show_default=True,
    allow_from_autoenv=False,
    help="Weights that share a scale. Larger groups are stored as several of 32: they save no bytes.",
)
@click.option(
    "--calibration", metavar="FILE", allow_from_autoenv=False,
    help="A text that the source reads first: rounding spares the columns with large inputs.",
)
@click.option(
    "--report-text", metavar="FILE", allow_from_autoenv=False,
    help="A text on which the result's perplexity and KL divergence from the source are measured.",
)
@json_option
@verbosity_options
def command(
    source: str,
    destination: Path | None,
    force: bool,
    layout: LayoutChoice,
    order: str | None,
    bits: str | None,
    target_bpw: float | None,
    group: str,
    calibration: str | None,
    report_text: str | None,
    as_json: bool,
    quiet: bool,
    verbose: int,
) -> None:
    """Make a packed model, the form that is mapped and run as it lies.

    SOURCE is a .gguf file, a model directory, or a name that `sparse-run list` shows. Without DESTINATION the result goes
    into the cache, where every command that is given SOURCE finds it; with a --layout other than auto, give those commands
    the path that is printed here. The weights keep their values and their bits, unless --bits rounds them, which needs a
    DESTINATION. With --order, SOURCE may be a packed model: its neurons are then written beside its weights.

    \b
    sparse-run convert model.gguf
    sparse-run convert model.gguf model.packed
    sparse-run convert --layout neurons model.gguf model.neurons
    sparse-run convert --layout neurons --order text.txt model.gguf model.neurons
    sparse-run convert Qwen3-0.6B/ qwen.packed --bits 4 --calibration text.txt --report-text wiki.test.raw
    sparse-run convert Qwen3-0.6B/ qwen.packed --bits auto --target-bpw 4.8
    """
    from ..convert import convert
    from ..convert.describe import describe
    from ..convert.measure import natural_sparsity
    from ..convert.neuron_file import NEURON_FILE, hot_first, write_neuron_file
    from ..convert.quantise import Quantisation
    from ..convert.writer import add_to_record, is_packed
    from ..neurons import gives_zeros
    from ..registry import find, packed_for, read_source
    from ..tokenizer import Tokenizer

    quantisation = quality = None
    if bits is not None:
        if destination is None:
            raise UsageError("--bits needs a DESTINATION: the cache holds conversions that keep every weight")
        if target_bpw is not None and bits != "auto":
            raise UsageError("--target-bpw belongs to --bits auto")
        quantisation = Quantisation(0 if bits == "auto" else int(bits), int(group), target_bpw or 4.5)
    elif calibration or report_text or target_bpw is not None or group != "32":
        raise UsageError("--group, --target-bpw, --calibration and --report-text are about rounding; give --bits too")
    texts = {
        key: read_text(path)
        for key, path in (("calibration", calibration), ("report_text", report_text))
        if path is not None
    }
    if order is not None:
        if layout == "panels":
            raise UsageError("--order writes single neurons, which --layout panels does not have; use --layout neurons")
        layout = "neurons"
    order_text = None if order in (None, "none") else read_text(str(order))
    with Progress(quiet=quiet) as progress:
        path = find(source, progress=progress)
        if is_packed(path):
            if order is None or destination is not None or bits is not None:
                raise UsageError(f"{path} is a packed model already; only its neurons can be written anew, with --order")
            packed = path
        elif destination is None:
            packed = packed_for(path, layout=layout, progress=progress, again=force)
        else:
            packed = destination
            existing: Existing = "replace" if force else "refuse"
            quality = convert(
                path, packed, layout=layout, existing=existing, progress=progress, quantisation=quantisation, **texts
            )
        if order is not None:
            hot = None if order_text is None else hot_first(packed, order_text, progress)
            write_neuron_file(packed, hot, progress)
            if order_text is not None and gives_zeros(json.loads((packed / "config.json").read_bytes())):
                # What a memory budget asks: whether single neurons are worth reading.
                measured = natural_sparsity(packed, Tokenizer.load(packed), order_text, progress)
                add_to_record(packed, "natural_sparsity", measured)
    facts = describe(packed)
    if as_json:
        record = read_source(packed)
        print_json(
            {
                "path": str(packed.resolve()),
                "source": str(path.resolve()),
                "source_bytes": record.get("size"),
                "weights_bytes": record.get("weights_bytes"),
                "sha256": record.get("sha256"),
                "neurons_bytes": (packed / NEURON_FILE).stat().st_size if (packed / NEURON_FILE).is_file() else None,
                "bits_per_weight": facts["bits_per_weight"],
                "weights": facts["weights"],
                "quantised": record.get("quantised"),
                "quality": quality.as_dict() if quality is not None else None,
            }
        )
        return
    click.echo(str(packed))
    if quantisation is not None:
        click.echo(f"{facts['bits_per_weight']:.2f} bits a weight, {facts['bytes'] / 1e6:.1f} MB")
        for name, w in facts["weights"].items():
            if w["kinds"] != ["f32"]:
                click.echo(f"  {name:<10} {w['bits_per_weight']:.2f}  {', '.join(w['kinds'])}")
    if quality is not None:
        click.echo(quality_line(quality.as_dict()))
