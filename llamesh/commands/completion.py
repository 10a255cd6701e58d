"""`llamesh completion`: what a shell needs to complete commands, options, models and nodes."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from llamesh.commands.shared import exit_codes
from llamesh.commands.shared.failed import Failed
from llamesh.commands.shared.options import command as make
from llamesh.commands.shared.saying import out


@make(
    ('eval "$(llamesh completion bash)"', "in ~/.bashrc"),
    ('eval "$(llamesh completion zsh)"', "in ~/.zshrc, after compinit"),
    ("llamesh completion fish > ~/.config/fish/completions/llamesh.fish", "once"),
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> int:
    """Print the lines that have SHELL complete commands, options, and the names of models and nodes.

    Names come from the running node, else from the cookbook.
    """
    kind = get_completion_class(shell)
    if kind is None:
        raise Failed(f"click knows no completion for {shell}")
    out(kind(ctx.find_root().command, {}, "llamesh", "_LLAMESH_COMPLETE").source().strip())
    return exit_codes.OK
