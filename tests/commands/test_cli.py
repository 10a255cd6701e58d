"""The command line: what is imported when, what stands where, and what is said of a slip."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from llamesh.cli import COMMANDS, Command, command_line, run
from llamesh.commands.shared.failed import Failed, TimedOut, Unreached
from llamesh.commands.shared.node import Reach, node_options
from llamesh.commands.shared.options import Files, command, files_options
from tests.support.node import CHECKOUT, clean_environment


def no_node(*given: object) -> int:
    raise AssertionError(f"a node was to be run: {given}")


def invoke(*words: str, **options: Any) -> Result:
    return CliRunner().invoke(command_line(no_node), words, **options)


def in_python(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=CHECKOUT,
        env=clean_environment({}),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_command_is_there_and_explains_itself() -> None:
    for name, where in COMMANDS.items():
        module, _, _ = where.partition(":")
        # No module can be called as that word of Python is.
        assert module == f"llamesh.commands.{'convert' if name == 'import' else name}"
        found = import_module(module).command
        assert isinstance(found, click.Command)
        shown = invoke(name, "--help")
        assert shown.exit_code == 0
        usage, _, rest = shown.output.partition("\n")
        assert usage.startswith(f"Usage: llamesh {name}")
        assert f"llamesh {name}" in rest, "no example"
        assert max(len(line) for line in shown.output.splitlines()) <= 100
        names = {one for parameter in found.params for one in parameter.opts}
        assert not any(one in ("--key", "--api-key", "--token") for one in names), "a key on a command line"


def test_options_are_told_in_one_style() -> None:
    for name, where in COMMANDS.items():
        found = import_module(where.partition(":")[0]).command
        assert isinstance(found, Command)
        options = [one for one in found.get_params(click.Context(found)) if isinstance(one, click.Option)]
        for option in options:
            words = option.help or ""
            assert words, f"{name} {option.opts}"
            assert not words.endswith("."), f"{name} {option.opts}"
            assert words[0].islower() or words[:2].isupper() or not words[0].isalpha(), f"{name}: {words}"


def test_every_command_is_in_the_manual() -> None:
    manual = (CHECKOUT / "docs/commands.md").read_text()
    headings = [line[4:] for line in manual.splitlines() if line.startswith("### ")]
    assert set(COMMANDS) - set(headings) == set()
    for name in COMMANDS:
        assert f"[{name}](#{name})" in manual


def test_help_imports_no_command() -> None:
    program = (
        "import sys\n"
        "from llamesh.__main__ import main\n"
        "assert main({words!r}) == {code}\n"
        "print('imported', *(m for m in sys.modules if m.startswith('llamesh.') or m in ('rich', 'trio')))"
    )
    for words, code in ((["--help"], 0), (["stauts"], 2), (["--nonsense"], 2)):
        shown = in_python(program.format(words=words, code=code))
        assert shown.splitlines()[-1].split() == ["imported", "llamesh.cli", "llamesh.__main__"]


def test_a_node_that_starts_imports_no_command() -> None:
    """It parses its options, and that is all that it has to do with the commands."""
    program = (
        "import sys\n"
        "from llamesh.cli import command_line, run\n"
        "assert run(command_line(lambda *given: 7), ['--config', 'x']) == 7\n"
        "print(*(m for m in sys.modules if m.startswith(('llamesh.', 'rich'))))"
    )
    assert in_python(program).split() == ["llamesh.cli"]


def test_without_a_command_a_node_is_run() -> None:
    given: list[tuple[object, ...]] = []

    def run_node(*words: object) -> int:
        given.append(words)
        return 5

    assert run(command_line(run_node), []) == 5
    assert run(command_line(run_node), ["--config", "a", "--cookbook=b", "--secrets", "c", "--version"]) == 5
    assert given == [
        (None, Path("cookbook.yaml"), None, False),
        (Path("a"), Path("b"), Path("c"), True),
    ]


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["stauts"], "did you mean `llamesh status`"),
        (["prewram", "m"], "`llamesh prewarm`"),
        (["xyzzy"], "`llamesh --help` lists them"),
        (["--cofnig", "x"], "Did you mean '--config'?"),
        (["status", "--jsno"], "Did you mean '--json'?"),
        (["drain", "--timeout", "soon"], "'soon' is not a valid float"),
        (["drain", "--timeout", "5"], "--timeout is for --wait"),
        (["unload"], "name a MODEL, or --all of them"),
        (["unload", "m", "--all"], "name a MODEL, or --all of them"),
        (["pause", "soon"], "not a time: 'soon'"),
        (["why", "x", "--last"], "name a REQUEST_ID, or --last"),
        (["completion", "csh"], "'csh' is not one of"),
        (["status", "--url", "ftp://x"], "not the address of a node"),
        (["status", "--url", "http://u:p@host"], "a key doesn't belong into the address"),
        (["status", "--url", "http://host:port"], "not the address of a node"),
        (["top", "--url", "http://127.0.0.1:1"], "needs a terminal"),
        (["chat", "m", "--url", "http://127.0.0.1:1"], "there is nothing to answer"),
    ],
)
def test_a_slip_is_told_with_what_was_meant(words: list[str], hint: str) -> None:
    done = invoke(*words)
    assert done.exit_code == 2, done.output
    assert hint in " ".join(done.output.split())


def test_files_count_before_the_command_and_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Files] = []

    @command()
    @files_options(cookbook=True)
    def probe(files: Files) -> int:
        seen.append(files)
        return 0

    monkeypatch.setattr("llamesh.commands.models.command", probe)
    for words in (
        ["--config", "a", "--secrets", "s", "--cookbook", "c", "models"],
        ["models", "--config", "a", "--secrets", "s", "--cookbook", "c"],
        ["--config", "other", "--secrets", "s", "models", "--cookbook", "c", "--config", "a"],
        ["models"],
    ):
        assert invoke(*words).exit_code == 0
    named = Files(Path("a"), Path("s"), Path("c"), config_required=True, secrets_required=True)
    assert seen == [named, named, named, Files()]


def test_exit_codes_of_errors(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    errors: list[BaseException] = [Failed("no"), Unreached("gone"), TimedOut("late"), KeyboardInterrupt()]

    @command()
    @node_options
    def probe(reach: Reach) -> int:
        raise errors.pop(0)

    monkeypatch.setattr("llamesh.commands.top.command", probe)
    codes = [run(command_line(no_node), ["top"]) for _ in range(4)]
    assert codes == [1, 3, 4, 130]
    assert [line for line in capsys.readouterr().err.splitlines() if line] == [
        "llamesh: no",
        "llamesh: gone",
        "llamesh: late",
    ]


def test_completion_of_commands_and_options() -> None:
    def complete(*words: str) -> list[str]:
        environment = {
            "_LLAMESH_COMPLETE": "bash_complete",
            "COMP_WORDS": " ".join(["llamesh", *words]),
            "COMP_CWORD": str(len(words)),
        }
        done = subprocess.run(
            [sys.executable, "-m", "llamesh"],
            env=clean_environment(environment),
            capture_output=True,
            text=True,
            timeout=60,
        )
        return [line.partition(",")[2] for line in done.stdout.splitlines()]

    assert complete("un") == ["unload", "undrain"]
    assert complete("--se") == ["--secrets"]
    assert "--timeout" in complete("drain", "--")
    assert complete("completion", "z") == ["zsh"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_lines_for_a_shell(shell: str) -> None:
    shown = invoke("completion", shell)
    assert shown.exit_code == 0
    assert f"_LLAMESH_COMPLETE={shell}_complete" in shown.output
