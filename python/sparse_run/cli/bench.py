"""`sparse-run bench`: prompt and decode speed, memory traffic, peak memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ..memory import division_text, parse_size, start_text, stats_text
from .common import (
    Progress,
    Work,
    budget_option,
    check_device_memory,
    device_options,
    json_option,
    model_option,
    print_json,
    sparsity_option,
    threads_option,
    verbosity_options,
)

if TYPE_CHECKING:
    from pathlib import Path

    from ..bench import BenchResult, SparseBenchResult
    from ..bench.breakeven import BreakEvenResult
    from ..bench.gather import GatherResult


@click.command("bench")
@model_option
@threads_option
@device_options
@sparsity_option
@budget_option
@click.option("--prompt", type=click.IntRange(1, 2**30), default=256, show_default=True, help="Tokens of the prompt.")
@click.option("--gen", type=click.IntRange(1, 2**30), default=64, show_default=True, help="Tokens decoded a repetition.")
@click.option("--reps", type=click.IntRange(min=1), default=5, show_default=True, help="Repetitions of each.")
@click.option("--gather", is_flag=True, help="Measure the memory instead: GB/s of random runs by length and share.")
@click.option(
    "--breakeven",
    is_flag=True,
    help="Measure instead up to which density skipping columns pays, for each shape of the model's matrices; kept for later runs.",
)
@json_option
@verbosity_options
def command(
    model: str | None,
    threads: int | None,
    device: str,
    device_memory: str | None,
    sparsity: str | None,
    memory_budget: str | None,
    prompt: int,
    gen: int,
    reps: int,
    gather: bool,
    breakeven: bool,
    as_json: bool,
    quiet: bool,
    verbose: int,
) -> None:
    """Measure prompt and decode speed.

    Evaluates random tokens: PROMPT of them at once into an empty cache, then GEN one at a time, REPS times each. Reports
    medians, the weight bytes a second that decoding reads, and the rate at which this machine can read memory at all.

    --sparsity also decodes a text of the model's own, dense and sparse in turns, and reports both rates and their ratio; with
    --memory-budget both keep to it.

    --gather needs no model: it reads random runs of memory, which tells what skipping weights can gain here at most.
    --breakeven multiplies with matrices of the model's shapes, dense and on a part of their columns in turns; above the density
    found, a product runs dense. It is kept in $XDG_CACHE_HOME/sparse-run for models run with --sparsity on this processor.

    \b
    sparse-run bench
    sparse-run bench --gather
    sparse-run bench --breakeven -m model.gguf --threads 2
    sparse-run bench --sparsity 0.5
    sparse-run bench -m model.gguf --threads 2 --prompt 256 --gen 64 --reps 5 --json
    """
    from .. import registry
    from ..bench import bench

    if gather or breakeven:
        if gather and breakeven:
            raise click.UsageError("--gather and --breakeven are two measurements; ask for one")
        if sparsity is not None:
            raise click.UsageError(f"--sparsity has no meaning with --{'gather' if gather else 'breakeven'}")
        _machine(gather, model, threads, reps, as_json, quiet)
        return
    budget = None if memory_budget is None else parse_size(memory_budget)
    on_device = check_device_memory(device, device_memory)
    with Progress(quiet=quiet) as progress:
        path = registry.resolve(model, progress=progress)
    compared = None
    if sparsity not in (None, "off"):
        compared = _sparse(path, threads, device, on_device, str(sparsity), gen, reps, quiet, budget)
    with Work(quiet=quiet) as work:  # a large model takes minutes
        result = bench(
            path,
            threads=threads,
            device=device,
            device_memory=on_device,
            prompt=prompt,
            gen=gen,
            reps=reps,
            memory_budget=budget,
            progress=work,
        )
    if as_json:
        print_json({**result.as_dict(), **(compared.as_dict() if compared is not None else {})})
    else:
        click.echo(table(result))
        if compared is not None:
            click.echo(sparse_rows(compared))


def _machine(gather: bool, model: str | None, threads: int | None, reps: int, as_json: bool, quiet: bool) -> None:
    """--gather and --breakeven: measurements of the machine."""
    from .. import registry
    from ..bench.breakeven import measure_break_even
    from ..bench.gather import gather as measure_gather

    if gather and model is not None:
        raise click.UsageError("--gather measures the memory and takes no model")
    with Work(quiet=quiet) as work:
        if gather:
            found = measure_gather(threads, reps=reps, progress=work)
            print_json(found.as_dict()) if as_json else click.echo(gather_table(found))
            return
        path = registry.resolve(model, progress=work)
        result = measure_break_even(path, threads, reps=reps, progress=work)
    print_json(result.as_dict()) if as_json else click.echo(break_even_table(result))
    if not result.cache and not quiet:
        click.echo("not kept: the cache folder cannot be written; see XDG_CACHE_HOME", err=True)


def gather_table(r: GatherResult) -> str:
    """Rates of random runs, for people."""
    head = (
        f"GB/s of wanted bytes, random runs; {r.cpu}, {r.isa}, {r.threads} threads; stream {r.stream_gb_per_s:.1f} GB/s"
    )
    rows = [f"{'run':>7} " + "".join(f"{d:>7.0%}" for d in r.densities)]
    for run, rates in zip(r.runs, r.gb_per_s, strict=True):
        rows.append(f"{run:>5} B " + "".join(f"{rate:>7.1f}" for rate in rates))
    return "\n".join([head, *rows])


def break_even_table(r: BreakEvenResult) -> str:
    """Gains and break-even by shape, for people."""
    head = f"{r.model}: dense time over time with columns skipped, by density; {r.cpu}, {r.isa}, {r.threads} threads"
    rows = [f"{'matrix':<32}" + "".join(f"{d:>7.0%}" for d in r.densities) + "  break-even"]
    for s in r.shapes:
        kind = f"{s.kind} {'min ' if s.has_min else ''}{s.rows} x {s.cols}"
        rows.append(
            f"{'/'.join(s.sites):<6}{kind:<26}" + "".join(f"{g:>7.2f}" for g in s.gain) + f"  {s.break_even:>9.0%}"
        )
    return "\n".join([head, *rows, "a product runs dense where more of its columns are kept than its break-even"])


def _sparse(
    path: Path,
    threads: int | None,
    device: str,
    device_memory: int,
    choice: str,
    gen: int,
    reps: int,
    quiet: bool,
    budget: int | None,
) -> SparseBenchResult | None:
    """Dense and sparse decoding in turns; None where `auto` decided for dense."""
    from .. import _core
    from ..bench import bench_sparse
    from ..bench.sparse import context_for
    from ..neurons import known, needs
    from ..packed_header import read_header
    from ..sparsity import choose
    from ..tokenizer import Tokenizer

    header, tokenizer = read_header(path), Tokenizer.load(path)
    say = None if quiet else lambda text: click.echo(text, err=True)
    opening = tokenizer.encode("The history of the city begins")
    if budget is not None:
        file, why = known(choice, path)
        if why and say is not None:
            say(why)
        if file is None:
            return None
        wanted = needs(file, header.config, header.path)
        # Two contexts, the dense one's and the sparse one's, each in whole huge pages.
        c = header.config
        token_bytes = 4 * int(c["n_layers"]) * int(c["n_kv_heads"]) * int(c["head_dim"])
        sparse_from = max(file.dense_tokens, int(file.options.get("min_prompt", 32)))
        n_ctx = 2 * context_for(sparse_from, len(opening), gen, reps) + 512 + (8 << 20) // token_bytes
        core = _core.Model(
            str(path),
            threads or 0,
            memory_budget=budget,
            n_ctx=n_ctx,
            extra_bytes=wanted.extra_bytes,
            neuron_share=wanted.neuron_share,
            by_gate=wanted.by_gate,
        )
        try:
            return bench_sparse(core, file, opening, gen=gen, reps=reps)
        finally:
            core.close()
    core = _core.Model(str(path), threads or 0, device=device, device_memory=device_memory)
    try:
        with Work(quiet=quiet) as work:
            file = choose(choice, header, core, tokenizer, say=say, tick=work)
        if file is None:
            return None
        return bench_sparse(core, file, opening, gen=gen, reps=reps)
    finally:
        core.close()


def sparse_rows(r: SparseBenchResult) -> str:
    """Sparse against dense decoding, for people."""
    sites = ", ".join(f"{site} {share:.0%}" for site, share in r.density.items() if site != "body")
    return (
        f"sparsity {r.decode_sparse_median:9.1f} tok/s   {r.sparsity}: {r.sparse_ratio:.2f} times dense "
        f"({r.decode_dense_median:.1f}) on the same text; reads {r.density.get('body', 1.0):.0%} of the layers' weights "
        f"({sites})"
        + (f"\n{'disk':<9}{stats_text(r.sparse_memory)} while decoding sparsely" if r.sparse_memory is not None else "")
    )


def table(r: BenchResult) -> str:
    """The result for people."""

    def spread(rates: list[float]) -> str:
        return f"{min(rates):.1f} to {max(rates):.1f}" if len(rates) > 1 else ""

    share = f"{r.gb_per_s / r.stream_gb_per_s:.0%} of this machine's {r.stream_gb_per_s:.1f} GB/s"
    if r.device != "cpu":
        share = "of the file; device memory holds 5 and 6 bits as bytes"
    rows = [
        ("model", f"{r.model}, {r.weight_bytes / 1e6:.1f} MB of weights"),
        ("machine", f"{r.threads} threads, {r.isa}" if r.device == "cpu" else r.device),
        ("prompt", f"{r.prompt_median:9.1f} tok/s   {r.prompt} tokens, {spread(r.prompt_tokens_per_s)}"),
        (
            "decode",
            f"{r.decode_median:9.1f} tok/s   {1e3 / r.decode_median:.2f} ms a token, {spread(r.decode_tokens_per_s)}",
        ),
        ("memory", f"{r.gb_per_s:9.1f} GB/s    {r.bytes_per_token / 1e6:.1f} MB a token; {share}"),
        ("peak", f"{r.peak_rss_bytes / 1e6:9.1f} MB      resident; loaded in {r.load_seconds * 1e3:.0f} ms"),
        ("tokens", f"{r.token_hash}    hash of 32 greedy tokens"),
    ]
    if r.memory is not None:
        rows += [("budget", start_text(r.memory)), ("disk", stats_text(r.memory))]
    if r.device_memory is not None and (divided := division_text(r.device_memory)):
        rows.append(("divided", divided))
    return "\n".join(f"{name:<9}{text.rstrip(', ')}" for name, text in rows)
