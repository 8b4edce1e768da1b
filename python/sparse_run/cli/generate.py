"""`sparse-run generate`: continues a prompt and prints the text, or one JSON object about it."""

from __future__ import annotations

import sys

import click

from ..errors import UsageError
from ..memory import stats_text
from ..sampling import Sampling
from .common import (
    Opening,
    Waiting,
    json_option,
    load_model,
    model_option,
    opening_options,
    print_json,
    read_text,
    sampling_options,
    stats_option,
    timings_line,
    verbosity_options,
)


@click.command("generate")
@model_option
@click.option("-p", "--prompt", metavar="TEXT", help="The prompt.")
@click.option("-f", "--file", metavar="FILE", help="Read the prompt from a file; - is stdin.")
@click.option(
    "-n",
    "--max-tokens",
    "--n-predict",
    type=click.IntRange(min=-1),
    default=256,
    show_default=True,
    metavar="N",
    help="Tokens to make; -1 is up to the end of the context.",
)
@click.option(
    "--chat/--raw",
    default=False,
    help="Put the prompt into the model's chat template, or take it as it is.  [default: raw]",
)
@click.option("-sys", "--system-prompt", metavar="TEXT", help="System prompt; only with --chat.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End at this text; may be repeated.")
@click.option("--ignore-eos", is_flag=True, help="Go on after the model's end tokens.")
@sampling_options
@opening_options
@stats_option
@json_option
@verbosity_options
def command(
    model: str | None,
    prompt: str | None,
    file: str | None,
    max_tokens: int,
    chat: bool,
    system_prompt: str | None,
    stop: tuple[str, ...],
    ignore_eos: bool,
    sampling: Sampling,
    opening: Opening,
    stats: bool,
    as_json: bool,
    quiet: bool,
    verbose: int,
) -> None:
    """Continue a prompt and print the text. The prompt comes from -p, from -f, or from stdin.

    \b
    sparse-run generate -p "The capital of France is" -n 16 --temp 0
    sparse-run generate -m model.gguf -f prompt.txt --json
    git diff | sparse-run generate --chat -sys "Write a commit message."

    --json prints {"schema": 1, "text", "tokens" (ids), "finish_reason" ("stop", "length"), "prompt_tokens" (count),
    "timings"}, and with --memory-budget "memory".
    """
    if prompt is not None and file is not None:
        raise click.UsageError("give the prompt with -p or with -f, not with both")
    if system_prompt is not None and not chat:
        raise click.UsageError("--system-prompt needs --chat")
    if prompt is None and file is None and (sys.stdin is None or sys.stdin.isatty()):
        raise click.UsageError("no prompt; give one with -p TEXT, -f FILE or on stdin")
    text = prompt if prompt is not None else read_text(file or "-")
    if chat and not text.strip():
        raise UsageError("the prompt is empty")
    with (
        load_model(model, opening, quiet=quiet) as opened,
        opened.session() as session,
    ):
        limit = None if max_tokens < 0 else max_tokens
        if chat:
            turns = [{"role": "user", "content": text}]
            if system_prompt is not None:
                turns.insert(0, {"role": "system", "content": system_prompt})
            stops = [*stop, *opened.template.stop]
            ids = opened.chat_ids(turns)
        else:
            stops = list(stop)
            ids = opened.tokenize(text)
        generation = session.start(
            ids,
            sampling,
            max_tokens=limit,
            stop=stops,
            ignore_eos=ignore_eos,
            strip_space=chat and opened.tokenizer.add_space_prefix,
        )
        with Waiting(opened, quiet=quiet) as waiting:
            for piece in generation:
                waiting.write("" if as_json else piece)
        measured = opened.stats()
        if as_json:
            print_json(
                {
                    "text": generation.text,
                    "tokens": generation.tokens,
                    "finish_reason": generation.finish_reason,
                    "prompt_tokens": len(generation.prompt_tokens),
                    "timings": generation.timings.to_dict(),
                    **({"memory": measured["memory"]} if "memory" in measured else {}),
                }
            )
        elif not generation.text.endswith("\n"):
            sys.stdout.write("\n")
            sys.stdout.flush()
        if (stats or verbose) and not quiet:
            click.echo(timings_line(generation), err=True)
            if "memory" in measured:
                click.echo(stats_text(measured["memory"]), err=True)
