"""What people who come from llama.cpp, ollama or mlx-lm type first: each word that means nothing here is refused with
what to type instead, never taken for another option (without this, -ngl 99 is -n with the value gl, -hf is help)."""

from __future__ import annotations

from collections.abc import Iterable

import click

# Spellings of one option -> whether a value follows, and what to do here.
_OPTIONS: dict[tuple[str, ...], tuple[bool, str]] = {
    ("-ngl", "--n-gpu-layers", "--gpu-layers"): (
        True,
        "--device cuda runs the model on a GPU, --device-memory SIZE limits what it takes there",
    ),
    ("-cnv", "--conversation"): (False, "leave it out: `sparse-run chat` always converses"),
    ("-no-cnv", "--no-conversation"): (False, "use `sparse-run generate`, which continues a text"),
    ("-st", "--single-turn"): (False, "`sparse-run generate --chat` answers one message"),
    ("-i", "--interactive", "--interactive-first"): (False, "leave it out: the chat is interactive in a terminal"),
    ("-mli", "--multiline-input"): (False, 'leave it out: in the chat, """ begins and ends a message of several lines'),
    ("-co", "--color"): (False, "leave it out: a terminal is coloured unless NO_COLOR is set"),
    ("-r", "--reverse-prompt"): (True, "`sparse-run generate --stop TEXT` ends at a text"),
    ("--jinja", "--no-jinja"): (False, "leave it out: the model's own template is always used"),
    ("--no-display-prompt",): (False, "leave it out: the prompt is never printed"),
    ("-e", "--escape"): (False, "give line breaks with -f FILE, or as the shell writes them: $'one\\ntwo'"),
    ("-hf", "-hfr", "--hf-repo"): (True, "fetch it first: sparse-run pull ORG/REPO, and then -m ORG/REPO"),
    ("-mu", "--model-url"): (True, "download the file, and give its path with -m"),
    ("-b", "-ub", "--batch-size", "--ubatch-size"): (True, "leave it out: prompts are read in blocks that suit"),
    ("-tb", "--threads-batch"): (True, "-t N is for prompts and answers alike"),
    ("-fa", "--flash-attn"): (False, "leave it out: there is one kind of attention"),
    ("-ctk", "-ctv", "--cache-type-k", "--cache-type-v", "--kv-bits"): (
        True,
        "leave it out: keys and values are kept in 16-bit floats",
    ),
    ("--max-kv-size", "--n-ctx"): (True, "-c N is the context window in tokens"),
    ("--mlock",): (False, "--no-mmap reads the weights into memory"),
    ("--keep",): (True, "leave it out: a chat that is full keeps the system prompt, and forgets its oldest messages"),
    ("--grammar", "--grammar-file", "-j", "--json-schema"): (True, "answers cannot be held to a grammar yet"),
    ("--lora", "--adapter-path", "--mmproj", "--control-vector"): (True, "a model is run as it is, without additions"),
    ("-md", "--model-draft", "--draft-model"): (True, "there is no speculation yet"),
    ("--prompt-cache", "--prompt-cache-file"): (True, "in a chat, /save and /load keep a conversation"),
    ("--trust-remote-code",): (False, "leave it out: no code of a model is ever run"),
}

_COMMANDS: dict[str, str] = {
    "serve": "there is no server yet",
    "server": "there is no server yet",
    "show": "use `sparse-run info`",
    "ls": "use `sparse-run list`",
    "ps": "a model runs only as long as the command that opened it",
    "stop": "a model runs only as long as the command that opened it",
    "rm": "`sparse-run list` shows where each model lies; delete it there",
    "create": "use `sparse-run convert`",
    "import": "use `sparse-run convert`",
    "quantize": "use `sparse-run convert SOURCE DESTINATION --bits 4`",
    "perplexity": "use `sparse-run eval`",
    "evaluate": "use `sparse-run eval`",
    "benchmark": "use `sparse-run bench`",
    "complete": "use `sparse-run generate`",
    "cli": "use `sparse-run chat`",
    "download": "use `sparse-run pull`",
    "check": "use `sparse-run doctor` for the machine, `sparse-run eval` for a model",
}


def refuse_foreign_options(command: click.Command) -> None:
    """Gives a command that runs a model hidden options which only say what to type instead; for click's exact parsing,
    so that a value that looks like one of them stays a value. Spellings that the command has itself are left to it."""
    own = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    if "--model" not in own or any(isinstance(parameter, _Refused) for parameter in command.params):
        return
    for i, (spellings, (with_value, remedy)) in enumerate(_OPTIONS.items()):
        free = [spelling for spelling in spellings if spelling not in own]
        if free:
            command.params.append(_Refused(i, free, with_value, remedy))


class _Refused(click.Option):
    """An option that is not there: naming it is an error with a remedy, whatever else the command line says."""

    def __init__(self, number: int, spellings: Iterable[str], with_value: bool, remedy: str) -> None:
        # Eager, as --help is, so that nothing else about the line is found wrong first.
        super().__init__(
            [f"refused_{number}", *spellings],
            is_flag=not with_value,
            flag_value="" if with_value else True,  # a value that is missing is no reason to ask for it
            default=None,
            hidden=True,
            expose_value=False,
            is_eager=True,
            allow_from_autoenv=False,
        )
        self._remedy = remedy

    def process_value(self, ctx: click.Context, value: object) -> None:
        if value is not None and not ctx.resilient_parsing:
            raise click.UsageError(f"{' / '.join(self.opts)} is no option here; {self._remedy}", ctx)


def unknown_command(name: str, commands: Iterable[str]) -> str:
    """The error for a command that is not there: what to use instead, or what it is likely meant to be."""
    hint = _COMMANDS.get(name.lower())
    if hint is None:
        import difflib

        near = difflib.get_close_matches(name.lower(), list(commands), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "`sparse-run --help` lists them"
    return f"no command {name!r}; {hint}"
