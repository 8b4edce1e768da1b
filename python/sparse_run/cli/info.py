"""`sparse-run info`: what a model is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .common import Progress, json_option, model_option, print_json, quality_line, read_text


@click.command()
@model_option
@click.option(
    "--measure", metavar="FILE", allow_from_autoenv=False,
    help="A text that the model reads, to count the FFN's neurons that are exactly 0. Runs the model; converts it if need be.",
)
@json_option
def command(model: str | None, measure: str | None, as_json: bool) -> None:
    """Show a model's family, sizes, bits and bytes by class of weights, licence and source.

    MODEL is a .gguf file, a packed model, or a name that `sparse-run list` shows. Nothing is downloaded, and without
    --measure nothing is converted.

    \b
    sparse-run info smollm2-135m
    sparse-run info model.gguf --json
    sparse-run info ReluLLaMA-7B/ --measure text.txt
    """
    from ..convert.describe import describe
    from ..registry import find

    text = None if measure is None else read_text(measure)
    with Progress(quiet=text is None) as progress:
        path = find(model, progress=progress, pull=False)
        facts = describe(path)
        if text is not None and facts["exact_zeros"]:
            facts["natural_sparsity"] = _measured(path, text, progress)
    if as_json:
        print_json(facts)
    else:
        _print(facts)


def _measured(path: Path, text: str, progress: Progress) -> dict[str, Any]:
    from ..convert.measure import natural_sparsity
    from ..convert.writer import is_packed
    from ..registry import packed_for
    from ..tokenizer import Tokenizer

    packed = path if is_packed(path) else packed_for(path, progress=progress)
    return natural_sparsity(packed, Tokenizer.load(packed), text, progress)


def _print(facts: dict[str, Any]) -> None:
    window = f", attention window {facts['window']}" if facts["window"] else ""
    scaled = ", scaled RoPE" if facts["rope_scaled"] else ""
    groups = facts["heads"] // facts["kv_heads"]
    lines = {
        "name": facts["name"],
        "family": facts["architecture"],
        "file": f"{facts['path']} ({facts['format']}{', layout ' + facts['layout'] if 'layout' in facts else ''})",
        "licence": facts["license"] or "not stated",
        "source": facts["source"] or facts.get("made_from", {}).get("path") or "not stated",
        "layers": f"{facts['layers']} of width {facts['embedding']}",
        "attention": f"{facts['heads']} heads of {facts['head_dim']}, {facts['kv_heads']} for keys and values "
        f"({groups} queries each)",
        "FFN": f"{facts['ffn']} neurons, {facts['ffn_kind']}, {_activation(facts)}",
        "zeros": _zeros(facts),
        "vocabulary": f"{facts['vocabulary']} tokens"
        + (", embedding used as head" if facts["tied_embeddings"] else ""),
        "context": f"{facts['context']} tokens{window}{scaled}",
        "parameters": f"{facts['parameters'] / 1e6:.1f} million, {facts['bytes'] / 1e6:.1f} MB, "
        f"{facts['bits_per_weight']:.2f} bits a weight of the matrices",
    }
    rounded = facts.get("made_from", {}).get("quantised")
    if rounded:
        lines["rounded to"] = rounded["bits"] + (", calibrated" if rounded["calibrated"] else "")
    if facts.get("quality"):
        lines["quality"] = quality_line(facts["quality"])
    for key, value in lines.items():
        click.echo(f"{key:<11} {value}")
    click.echo("\nweights        million        MB    bits/weight  kinds")
    for name, w in facts["weights"].items():
        click.echo(
            f"{name:<11} {w['parameters'] / 1e6:>10.2f} {w['bytes'] / 1e6:>9.1f} {w['bits_per_weight']:>14.2f}  "
            + ", ".join(w["kinds"])
        )


def _activation(facts: dict[str, Any]) -> str:
    """The activation with what makes it sparser: FATReLU's threshold, dReLU's second ReLU."""
    text = str(facts["activation"])
    if facts["activation_threshold"]:
        text += f", 0 below {facts['activation_threshold']:g} (FATReLU)"
    if facts["up_relu"]:
        text += ", on gate and up (dReLU)"
    return text


def _zeros(facts: dict[str, Any]) -> str:
    """How many of the FFN's neurons are exactly 0 by themselves."""
    measured = facts["natural_sparsity"]
    if measured is not None:
        layers = measured["by_layer"]
        return (
            f"{measured['ffn']:.1%} of the FFN's neurons are exactly 0 ({min(layers):.0%} to {max(layers):.0%} by layer; "
            f"{measured['tokens']} tokens)"
        )
    if not facts["exact_zeros"]:
        return f"none: {facts['activation']} gives no exact zeros"
    return "not measured (--measure TEXT does)"
