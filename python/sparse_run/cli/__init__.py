"""The command `sparse-run`: a group whose commands are imported only when called, and the one place where errors become
exit codes. Answers go to stdout, everything else to stderr."""

from __future__ import annotations

import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from ..errors import Cancelled, Error
from .peers import refuse_foreign_options, unknown_command

# name -> (module that holds `command`, line for the overview). One table, so that `--help` imports nothing.
COMMANDS: dict[str, tuple[str, str]] = {
    "chat": ("chat", "Talk with a model in the terminal."),
    "run": ("chat", "The same as chat."),
    "generate": ("generate", "Continue a prompt and print the text."),
    "pull": ("pull", "Download a model."),
    "convert": ("convert", "Make a packed model from GGUF or safetensors files."),
    "list": ("list_", "Show the models on this machine and those known by name."),
    "info": ("info", "Show what a model is made of."),
    "calibrate": ("calibrate", "Find out which weights a model can skip, and write a sparsity file."),
    "train-predictor": ("train_predictor", "Train predictors of needed neurons, for models with ReLU."),
    "plot": ("plot", "Draw quality against speed, densities, and predictors."),
    "bench": ("bench", "Measure prompt and decode speed."),
    "eval": ("eval", "Measure perplexity on a text."),
    "doctor": ("doctor", "Check this machine and this installation."),
    "completion": ("completion", "Print the script that makes a shell complete commands."),
}

EXIT_INTERRUPTED = 130


class LazyGroup(click.Group):
    """A group that imports `sparse_run.cli.<module>` when one of its commands is called or asked for help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"{__name__}.{COMMANDS[cmd_name][0]}")
        command: click.Command = module.command
        # SPARSE_RUN_THREADS is --threads of every command, not SPARSE_RUN_CHAT_THREADS of one.
        command.context_settings.setdefault("auto_envvar_prefix", "SPARSE_RUN")
        refuse_foreign_options(command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS and not ctx.resilient_parsing:
            raise click.UsageError(unknown_command(args[0], COMMANDS), ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        # Before click's own handling, which would give a broken pipe the code 1.
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise _PipeClosed from None


class _PipeClosed(Exception):
    """The reader of our output went away."""


def _print_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from .. import _core

    isas = _core.isa_list()
    chosen = next((isa["name"] for isa in isas if isa["selected"]), "unknown")
    built = " ".join(isa["name"] for isa in isas)
    click.echo(f"sparse-run {_core.__version__} (instruction set {chosen}; built with {built})")
    ctx.exit()


@click.group(
    cls=LazyGroup,
    context_settings={
        "auto_envvar_prefix": "SPARSE_RUN",
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
    },
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    allow_from_autoenv=False,
    help="Print version and instruction set, and leave.",
)
def cli() -> None:
    """Run language models on the processor you own.

    \b
    sparse-run chat                                   talk with the default model
    sparse-run generate -m model.gguf -p "Once"       continue a text
    sparse-run COMMAND --help                         options and examples of a command

    Every long option can be set in the environment: SPARSE_RUN_THREADS=4 is --threads 4.
    """


def _fail(text: str) -> None:
    line = " ".join(text.split()) or "unknown error"
    try:
        sys.stderr.write(f"sparse-run: error: {line}\n")
        sys.stderr.flush()
    except OSError:
        pass


def _mute(stream: Any) -> None:
    """Points a closed pipe at the null device, so that the interpreter's last flush is silent."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    except (OSError, ValueError, AttributeError):
        pass


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code: 0 success, 1 run-time failure, 2 usage, 3 check failed, 4 model not
    found or unreadable, 5 memory budget, 130 interrupted. A reader that closes our output early is a success."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 shows ?, and nothing fails
    code = 0
    try:
        result = cli.main(args=None if args is None else list(args), prog_name="sparse-run", standalone_mode=False)
        code = result if isinstance(result, int) else 0
        sys.stdout.flush()
    except _PipeClosed:
        _mute(sys.stdout)
    except BrokenPipeError:
        _mute(sys.stdout)
    except (click.Abort, KeyboardInterrupt, Cancelled):
        code = EXIT_INTERRUPTED
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except Error as error:
        _fail(str(error))
        code = error.exit_code
    except MemoryError:
        _fail("out of memory; choose a smaller model, a smaller --ctx-size or a shorter prompt")
        code = 5
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        hint = {
            errno.ENOSPC: "; free some space, or set XDG_CACHE_HOME to a larger disk",
            errno.EDQUOT: "; free some space, or set XDG_CACHE_HOME to a larger disk",
            errno.ENOENT: "; check the path",
            errno.EISDIR: "; give a file, not a folder",
            errno.EACCES: "; check the permissions of the file and of its folder",
            errno.EPERM: "; check the permissions of the file and of its folder",
            errno.EROFS: "; set XDG_CACHE_HOME to a folder that can be written",
        }.get(error.errno or 0, "")
        _fail(f"{where}{error.strerror or error}{hint}")
        code = 1
    return code
