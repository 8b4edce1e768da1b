"""`sparse-run completion SHELL`: the script that makes the shell complete commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print the completion script of a shell.

    \b
    eval "$(sparse-run completion bash)"              in ~/.bashrc
    eval "$(sparse-run completion zsh)"               in ~/.zshrc
    sparse-run completion fish > ~/.config/fish/completions/sparse-run.fish
    """
    from . import cli

    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"no completion for {shell}")
    click.echo(kind(cli, {}, "sparse-run", "_SPARSE_RUN_COMPLETE").source())
