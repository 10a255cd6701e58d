"""The command line: which commands there are, and how one is found and called.

A command is imported when it is called: `llamesh --help`, a typing error and a node that starts know them by
this table only. Options of files count before a command as well as after it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

# section -> command -> where it is, and what it does in a few words
SECTIONS: dict[str, dict[str, tuple[str, str]]] = {
    "The running mesh": {
        "status": ("llamesh.commands.status:command", "show nodes, models and instances"),
        "top": ("llamesh.commands.top:command", "watch instances and requests, live"),
        "chat": ("llamesh.commands.chat:command", "talk to a model"),
        "logs": ("llamesh.commands.logs:command", "show what a model's processes say"),
        "why": ("llamesh.commands.why:command", "explain what became of a request"),
        "cancel": ("llamesh.commands.cancel:command", "end a request that runs"),
        "prewarm": ("llamesh.commands.prewarm:command", "load a model before anyone asks for it"),
        "unload": ("llamesh.commands.unload:command", "end the instances of a model"),
        "drain": ("llamesh.commands.drain:command", "have a node take no new requests"),
        "undrain": ("llamesh.commands.undrain:command", "have it take requests again"),
        "pause": (
            "llamesh.commands.pause:command",
            "have a node leave the machine to its owner for a while",
        ),
    },
    "Models on this machine": {
        "init": ("llamesh.commands.init:command", "write config.yaml and cookbook.yaml for this machine"),
        "add": ("llamesh.commands.add:command", "add a model to the cookbook"),
        "pull": ("llamesh.commands.pull:command", "fetch the weights of models now"),
        "models": ("llamesh.commands.models:command", "show which models are on this disk"),
        "rm": ("llamesh.commands.rm:command", "remove downloaded weights from this disk"),
    },
    "Several machines": {
        "invite": ("llamesh.commands.invite:command", "print one line that lets another machine join"),
        "join": ("llamesh.commands.join:command", "make this machine's node a part of a mesh"),
        "token": ("llamesh.commands.token:command", "print the secret that all nodes of a mesh share"),
        "key": ("llamesh.commands.key:command", "print this node's public key"),
    },
    "This machine": {
        "check": ("llamesh.commands.check:command", "read both files, and say what would start here"),
        "import": ("llamesh.commands.convert:command", "turn the files of another program into a cookbook"),
        "schema": ("llamesh.commands.schema:command", "print what editors check the files with"),
        "build": ("llamesh.commands.build:command", "build llama.cpp, test it, and use it"),
        "doctor": ("llamesh.commands.doctor:command", "say what is wrong on this machine, and what to do"),
        "completion": ("llamesh.commands.completion:command", "have the shell complete commands and models"),
    },
}

COMMANDS: dict[str, str] = {
    name: where for entries in SECTIONS.values() for name, (where, _) in entries.items()
}

_EXAMPLES = (
    ("llamesh --config config.yaml --cookbook cookbook.yaml", "run a node"),
    ("llamesh status --watch", "what runs where, live"),
    ("llamesh chat qwen3 'Why is the sky blue?'", "one answer"),
    ("llamesh drain --wait && systemctl restart llamesh", "lose no request"),
    ("llamesh why", "explain the last request that failed"),
)

# In the order of llamesh/commands/shared/exit_codes.py.
_EXIT_CODES = (
    "0 done, 1 refused or a bad file, 2 a wrong word on the command line, 3 no node answers, 4 not done in "
    "time, 130 stopped by Ctrl-C. `llamesh COMMAND --help` says where a command has others."
)

_FILES = ("config", "secrets", "cookbook")


class _PlainHelp(click.Command):
    """Whose `--help` is told in the style of the other options."""

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        """click's own, with other words."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.help = "print this"
        return option


class Commands(_PlainHelp, click.Group):
    """The commands of the table."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Their names, in the table's order."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import it; None when there is none."""
        where = COMMANDS.get(cmd_name)
        if where is None:
            return None
        module, _, name = where.partition(":")
        found = getattr(import_module(module), name)
        assert isinstance(found, click.Command)  # noqa: S101
        found.name = cmd_name
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or say which one may have been meant."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-") and not ctx.resilient_parsing:
            raise click.UsageError(_unknown(args[0]), ctx)
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Hand what stands before a command on to it, as defaults of its options."""
        rest = super().parse_args(ctx, args)
        given = {name: ctx.params[name] for name in _FILES if ctx.params.get(name) is not None}
        ctx.default_map = dict.fromkeys(COMMANDS, given)
        return rest

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Commands with their words, and options; nothing is imported."""
        found = [
            CompletionItem(name, help=words)
            for entries in SECTIONS.values()
            for name, (_, words) in entries.items()
            if name.startswith(incomplete)
        ]
        return found + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table, section by section."""
        for section, entries in SECTIONS.items():
            with formatter.section(section):
                formatter.write_dl([(name, words) for name, (_, words) in entries.items()], col_max=14)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Examples and exit codes."""
        write_examples(formatter, _EXAMPLES)
        with formatter.section("Exit codes"):
            formatter.write_text(_EXIT_CODES)


class Command(_PlainHelp):
    """One of them. Its help ends with examples."""

    def __init__(self, *args: Any, examples: Sequence[tuple[str, str]] = (), **more: Any) -> None:
        super().__init__(*args, **more)
        self.examples = examples

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The examples, then what else there is to say."""
        if self.examples:
            write_examples(formatter, self.examples)
        super().format_epilog(ctx, formatter)


def write_examples(formatter: click.HelpFormatter, examples: Sequence[tuple[str, str]]) -> None:
    """Commands as one types them, each with what it does."""
    with formatter.section("Examples"):
        margin = " " * formatter.current_indent
        width = max(len(line) for line, _ in examples)
        if any(len(margin) + width + 4 + len(words) > formatter.width for _, words in examples):
            width = 0
        for line, words in examples:
            formatter.write(f"{margin}{line.ljust(width)}  # {words}\n")


def _unknown(word: str) -> str:
    near = difflib.get_close_matches(word, COMMANDS, n=3, cutoff=0.5)
    names = " or ".join(f"`llamesh {name}`" for name in near)
    meant = f"; did you mean {names}?" if near else "; `llamesh --help` lists them."
    return f"There is no command {word[:64]!r}{meant}"


def file_option(name: str, words: str, default: Path | None = None) -> Callable[[Any], Any]:
    """`--NAME PATH`. Whether the file is there is for whoever reads it."""
    return click.option(
        f"--{name}", type=click.Path(path_type=Path), metavar="PATH", default=default, help=words
    )


#: name -> what its file is
FILE_WORDS = {
    "config": "settings (default: config.yaml, if any)",
    "secrets": "keys (default: secrets.yaml, if any)",
    "cookbook": "models (default: cookbook.yaml)",
}


def command_line(run_node: Callable[[Path | None, Path, Path | None, bool], int]) -> Commands:
    """The whole of it. `run_node(config, cookbook, secrets, version)` is called where no command is."""

    @click.pass_context
    def llamesh(
        ctx: click.Context, config: Path | None, secrets: Path | None, cookbook: Path | None, version: bool
    ) -> int:
        """Runs llama-server per model when a request needs it, behind one OpenAI API.

        Without a command it runs a node until that is told to end.
        """
        if ctx.invoked_subcommand is not None:
            return 0
        return run_node(config, cookbook or Path("cookbook.yaml"), secrets, version)

    decorated: Any = llamesh
    decorated = click.option("--version", is_flag=True, help="print this program's and the engine's version")(
        decorated
    )
    for name in reversed(_FILES):
        decorated = file_option(name, FILE_WORDS[name])(decorated)
    made: Commands = click.group(
        "llamesh", cls=Commands, invoke_without_command=True, context_settings={"max_content_width": 100}
    )(decorated)
    return made


def run(command: click.Command, arguments: Sequence[str] | None) -> int:
    """Call what the arguments (None: the process's own) say; the exit code."""
    words = None if arguments is None else list(arguments)
    try:
        code = command.main(words, prog_name="llamesh", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return 130
    return code if isinstance(code, int) else 0
