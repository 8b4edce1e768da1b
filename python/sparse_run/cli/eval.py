"""`sparse-run eval`: perplexity of a model on a text."""

from __future__ import annotations

import click

from ..errors import UsageError
from .common import Progress, json_option, model_option, print_json, read_text, threads_option, verbosity_options

_CHARACTERS_PER_TOKEN = 12  # more than any tokenizer makes of a token on average: tokenize no more text than is scored


@click.command("eval")
@model_option
@threads_option
@click.option("--text", "text_file", required=True, metavar="FILE", help="The text, UTF-8; - is standard input.")
@click.option("--ctx", type=click.IntRange(min=4), default=512, show_default=True, help="Tokens of a chunk.")
@click.option(
    "--chunks", type=click.IntRange(min=0), default=20, show_default=True, help="Chunks to score; 0 is the whole text."
)
@json_option
@verbosity_options
def command(
    model: str | None,
    threads: int | None,
    text_file: str,
    ctx: int,
    chunks: int,
    as_json: bool,
    quiet: bool,
    verbose: int,
) -> None:
    """Measure perplexity: how surprised the model is by a text (lower is better).

    The text is cut into chunks of CTX tokens and the second half of each is scored, as llama.cpp's perplexity tool does,
    so that figures can be compared.

    \b
    sparse-run eval -m model.gguf --text wiki.test.raw
    sparse-run eval -m model.gguf --text wiki.test.raw --ctx 512 --chunks 20 --json
    """
    import json

    from .. import _core, registry
    from ..eval import perplexity
    from ..tokenizer import Tokenizer

    text = read_text(text_file).replace("\r\n", "\n").replace("\r", "\n")
    with Progress(quiet=quiet) as progress:
        path = registry.resolve(model, progress=progress)
        tokenizer = Tokenizer.load(path)
        bos = tokenizer.bos_id if tokenizer.add_bos else None
        if chunks:
            text = text[: ctx * chunks * _CHARACTERS_PER_TOKEN]
        ids = tokenizer.encode(text, parse_special=False)
        core = _core.Model(str(path), threads or 0)
        try:
            config = json.loads(core.config_json)
            try:
                result = perplexity(
                    core, ids, n_vocab=config["n_vocab"], ctx=ctx, chunks=chunks or None, bos=bos, progress=progress
                )
            except UsageError as error:
                raise UsageError(f"{text_file}: {error}") from None
            isa, used_threads = core.isa, core.threads
        finally:
            core.close()
    if chunks and result.chunks < chunks and not quiet:
        click.echo(f"{text_file} has only {result.chunks} chunks of {ctx} tokens", err=True)
    if as_json:
        print_json({"model": config.get("name", path.name), **result.as_dict(), "threads": used_threads, "isa": isa})
    else:
        click.echo(
            f"perplexity {result.perplexity:.4f}   {result.tokens_scored} tokens in {result.chunks} chunks of {ctx}, "
            f"{result.seconds:.1f} s"
        )
