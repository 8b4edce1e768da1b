"""`sparse-run chat`: options, and which of the three ways of talking it is: a terminal, piped lines, or one prompt."""

from __future__ import annotations

import sys

import click

from ..errors import UsageError
from ..sampling import Sampling
from .common import (
    Opening,
    load_model,
    model_option,
    opening_options,
    read_text,
    sampling_options,
    stats_option,
    verbosity_options,
)


@click.command("chat")
@model_option
@click.option("-p", "--prompt", metavar="TEXT", help="First message. Without a terminal: the only one.")
@click.option(
    "-f", "--file", metavar="FILE", help="First message from a file, after that of -p; - is the whole of stdin."
)
@click.option("-sys", "--system-prompt", metavar="TEXT", help="System prompt.")
@click.option("--chat-template", metavar="NAME", help="chatml, gemma, llama3, phi3 or plain, instead of the model's own template.")
@click.option("--chat-template-file", metavar="FILE", help="A Jinja file, instead of the model's own template.")
@click.option(
    "-n",
    "--max-tokens",
    "--n-predict",
    type=click.IntRange(min=-1),
    default=-1,
    show_default=True,
    metavar="N",
    help="Longest answer in tokens; -1 is up to the end of the context.",
)
@sampling_options
@opening_options
@stats_option
@verbosity_options
def command(
    model: str | None,
    prompt: str | None,
    file: str | None,
    system_prompt: str | None,
    chat_template: str | None,
    chat_template_file: str | None,
    max_tokens: int,
    sampling: Sampling,
    opening: Opening,
    stats: bool,
    quiet: bool,
    verbose: int,
) -> None:
    """Talk with a model. Without -m: SmolLM2-135M-Instruct, which is downloaded on first use.

    \b
    sparse-run chat
    sparse-run chat -m model.gguf -sys "Answer in one sentence." --temp 0.2
    sparse-run chat -f letter.txt -p "Summarise this letter."
    printf 'Hello\\nAnd in French?\\n' | sparse-run chat

    In a terminal: /help lists the commands, Ctrl-C stops an answer, Ctrl-C twice or Ctrl-D leaves. Piped input: each line
    is a message, and lines that begin with / are commands; a whole document is -f -. Answers go to stdout, everything else
    to stderr. When the conversation outgrows the context, its oldest turns are forgotten, with a notice.
    """
    from ..chat_state import Conversation
    from ..template import BUILT_IN
    from .chat_loop import ChatLoop

    if chat_template is not None and chat_template_file is not None:
        raise click.UsageError("give --chat-template or --chat-template-file, not both")
    if chat_template is not None and chat_template not in BUILT_IN:
        raise click.UsageError(
            f"--chat-template is {' or '.join(sorted(BUILT_IN))}; a file goes with --chat-template-file"
        )
    if chat_template_file is not None:
        chat_template = read_text(chat_template_file)
    first = [text for text in (prompt, None if file is None else read_text(file)) if text is not None]
    message = "\n\n".join(first)
    if first and not message.strip():
        raise UsageError("the first message is empty")
    interactive = sys.stdin is not None and sys.stdin.isatty() and file != "-"
    with (
        load_model(model, opening, quiet=quiet, chat_template=chat_template) as opened,
        opened.session() as session,
    ):
        conversation = Conversation(opened, session, sampling, max_tokens=max_tokens, system=system_prompt)
        if interactive and not quiet and chat_template is None and opened.tokenizer.chat_template is None:
            click.echo(
                "this model has no chat template, as models have that were not trained to chat: it may go on with a "
                "text rather than answer, which `sparse-run generate` is for",
                err=True,
            )
        loop = ChatLoop(conversation, interactive=interactive, quiet=quiet, verbose=stats or verbose > 0)
        if interactive:
            code = loop.talk(message)
        elif first:
            code = loop.one(message)
        else:
            code = loop.lines(sys.stdin or ())
    if code:
        raise click.exceptions.Exit(code)
