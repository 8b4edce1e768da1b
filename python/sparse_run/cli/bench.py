"""`sparse-run bench`: prompt and decode speed, memory traffic, peak memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .common import Progress, json_option, model_option, print_json, threads_option, verbosity_options

if TYPE_CHECKING:
    from ..bench import BenchResult


@click.command("bench")
@model_option
@threads_option
@click.option("--prompt", type=click.IntRange(min=1), default=256, show_default=True, help="Tokens of the prompt.")
@click.option("--gen", type=click.IntRange(min=1), default=64, show_default=True, help="Tokens decoded a repetition.")
@click.option("--reps", type=click.IntRange(min=1), default=5, show_default=True, help="Repetitions of each.")
@json_option
@verbosity_options
def command(
    model: str | None,
    threads: int | None,
    prompt: int,
    gen: int,
    reps: int,
    as_json: bool,
    quiet: bool,
    verbose: int,
) -> None:
    """Measure prompt and decode speed.

    Evaluates random tokens: PROMPT of them at once into an empty cache, then GEN one at a time, REPS times each. Reports
    medians, the weight bytes a second that decoding reads, and the rate at which this machine can read memory at all.

    \b
    sparse-run bench
    sparse-run bench -m model.gguf --threads 2 --prompt 256 --gen 64 --reps 5 --json
    """
    from .. import registry
    from ..bench import bench

    with Progress(quiet=quiet) as progress:
        path = registry.resolve(model, progress=progress)
    result = bench(path, threads=threads, prompt=prompt, gen=gen, reps=reps)
    if as_json:
        print_json(result.as_dict())
    else:
        click.echo(table(result))


def table(r: BenchResult) -> str:
    """The result for people."""

    def spread(rates: list[float]) -> str:
        return f"{min(rates):.1f} to {max(rates):.1f}" if len(rates) > 1 else ""

    share = f"{r.gb_per_s / r.stream_gb_per_s:.0%} of this machine's {r.stream_gb_per_s:.1f} GB/s"
    rows = [
        ("model", f"{r.model}, {r.weight_bytes / 1e6:.1f} MB of weights"),
        ("machine", f"{r.threads} threads, {r.isa}"),
        ("prompt", f"{r.prompt_median:9.1f} tok/s   {r.prompt} tokens, {spread(r.prompt_tokens_per_s)}"),
        (
            "decode",
            f"{r.decode_median:9.1f} tok/s   {1e3 / r.decode_median:.2f} ms a token, {spread(r.decode_tokens_per_s)}",
        ),
        ("memory", f"{r.gb_per_s:9.1f} GB/s    {r.bytes_per_token / 1e6:.1f} MB a token; {share}"),
        ("peak", f"{r.peak_rss_bytes / 1e6:9.1f} MB      resident; loaded in {r.load_seconds * 1e3:.0f} ms"),
        ("tokens", f"{r.token_hash}    hash of 32 greedy tokens"),
    ]
    return "\n".join(f"{name:<9}{text.rstrip(', ')}" for name, text in rows)
