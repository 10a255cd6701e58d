"""`llamesh chat`: talk to a model, or have one answer printed."""

from __future__ import annotations

import sys
import uuid
from contextlib import closing
from dataclasses import dataclass, field
from typing import IO, Any

import click

from llamesh.commands.shared import exit_codes
from llamesh.commands.shared.acts import model_argument, naming
from llamesh.commands.shared.answering import Figures, Message, answer
from llamesh.commands.shared.client import Client, path_of
from llamesh.commands.shared.failed import Failed, NoSuchModel
from llamesh.commands.shared.node import Reach, node_options
from llamesh.commands.shared.options import command as make
from llamesh.commands.shared.saying import aside, passing
from llamesh.commands.shared.words import clean

_HELP = """\
/new           forget what was said
/system TEXT   tell the model how to be (without TEXT: not any more)
/model NAME    go on with another model
/exit          end (Ctrl-D, too); Ctrl-C stops an answer"""

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


@make(
    ("llamesh chat qwen3", "talk; /help says what else there is"),
    ("llamesh chat qwen3 'Why is the sky blue?'", "one answer, to stdout"),
    ("git diff | llamesh chat qwen3 'Review this:' > review.md", "both together"),
)
@model_argument
@click.argument("prompt", metavar="[PROMPT]", required=False)
@click.option("-s", "--system", metavar="TEXT", help="how the model is to be")
@click.option("--max-tokens", type=click.IntRange(min=1), metavar="N", help="longest answer")
@click.option("--temperature", type=click.FloatRange(min=0), metavar="T", help="0: always the likeliest word")
@click.option("-q", "--quiet", is_flag=True, help="only the answer: no figures on stderr")
@node_options
def command(
    model: str,
    prompt: str | None,
    system: str | None,
    max_tokens: int | None,
    temperature: float | None,
    quiet: bool,
    reach: Reach,
) -> int:
    """Talk to MODEL. With a PROMPT, or text on stdin, its answer is printed and that is all."""
    options: dict[str, Any] = {}
    if max_tokens is not None:
        options["max_tokens"] = max_tokens
    if temperature is not None:
        options["temperature"] = temperature
    talk = Talk(reach.client(), model, system, options, quiet)
    given = "" if sys.stdin.isatty() or reach.key_file == "-" else sys.stdin.read()
    if prompt is None and not given.strip():
        if not sys.stdin.isatty():
            raise click.UsageError("there is nothing to answer: give a PROMPT, or text on stdin")
        return _interactive(talk)
    question = "\n\n".join(part for part in (prompt, given.strip("\n")) if part)
    talk.ask(question)
    return exit_codes.OK


@dataclass(slots=True)
class Talk:
    """A conversation, and where it is shown."""

    client: Client
    model: str
    system: str | None
    options: dict[str, Any]
    quiet: bool
    said: list[Message] = field(default_factory=list)
    # Its turns go where its prompt cache is.
    session: str = field(default_factory=lambda: f"chat-{uuid.uuid4().hex[:12]}")
    turn: int = 0

    def ask(self, question: str) -> None:
        """Show the answer as it comes, and remember both. Raises Failed, KeyboardInterrupt: then what came so
        far counts as the answer.
        """
        messages = [{"role": "system", "content": self.system}] if self.system else []
        asked: Message = {"role": "user", "content": question}
        messages += [*self.said, asked]
        self.turn += 1
        id = f"{self.session}-{self.turn}"  # noqa: A001
        headers = {"x-request-id": id, "x-session-id": self.session}
        page, figures = _Page(), Figures()
        try:
            with (
                naming(self.client, self.model),
                closing(answer(self.client, self.model, messages, self.options, headers, figures)) as pieces,
            ):
                for piece in pieces:
                    page.show(piece.kind, piece.text)
        except Failed as error:
            if error.exit_code != exit_codes.FAILED or isinstance(error, NoSuchModel):
                raise
            raise Failed(f"{error.message}; `llamesh why {id}` may tell more") from None
        finally:
            page.close()
            if page.text:
                self.said += [asked, {"role": "assistant", "content": page.text}]
        if not self.quiet:
            _dim(str(figures))


class _Page:
    """An answer on stdout; on a terminal, thoughts and waiting on stderr beside it."""

    def __init__(self) -> None:
        self.text = ""
        self._beside = sys.stderr.isatty()
        self._kind = ""

    def show(self, kind: str, text: str) -> None:
        """One more piece."""
        if kind != "text" and not self._beside:
            return
        if kind != self._kind:
            self._turn(kind)
        if kind == "waiting":
            passing(text, _DIM)
        elif kind == "thought":
            _write(sys.stderr, f"{_DIM}{clean(text)}{_PLAIN}")
        else:
            self.text += text
            _write(sys.stdout, clean(text) if sys.stdout.isatty() else text)

    def close(self) -> None:
        """Whatever comes next begins on a line of its own."""
        self._turn("")
        if self.text and not self.text.endswith("\n"):
            _write(sys.stdout, "\n")

    def _turn(self, kind: str) -> None:
        if self._kind == "waiting":
            passing()
        elif self._kind == "thought":
            sys.stderr.write("\n")
        sys.stderr.flush()
        self._kind = kind


def _interactive(talk: Talk) -> int:
    """Until /exit or Ctrl-D."""
    import readline  # noqa: F401  # input() edits lines with it, and knows the former ones; nothing is kept

    # Whether there is such a model is better told before anybody types a question.
    with naming(talk.client, talk.model):
        talk.client.get(path_of("/v1/models", talk.model))
    if not talk.quiet:
        _dim(f"{talk.model} at {talk.client.place}. /help says what else there is, Ctrl-D ends.")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            sys.stdout.write("\n")
            return exit_codes.OK
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            continue
        if line.startswith("/"):
            if not _obey(talk, line):
                return exit_codes.OK
        elif line:
            try:
                talk.ask(line)
            except Failed as error:
                error.show()
            except KeyboardInterrupt:
                _dim("stopped")


def _obey(talk: Talk, line: str) -> bool:
    """Do what a /word says; False to end."""
    word, _, rest = line.partition(" ")
    rest = rest.strip()
    match word:
        case "/exit" | "/quit" | "/bye":
            return False
        case "/new":
            talk.said.clear()
            _dim("forgotten")
        case "/system":
            talk.system = rest or None
            _dim("so be it" if rest else "no instructions any more")
        case "/model" if rest:
            talk.model = rest
        case "/model":
            _dim(talk.model)
        case "/help":
            _dim(_HELP)
        case _:
            _dim(f"there is no {word}\n{_HELP}")
    return True


def _write(stream: IO[str], text: str) -> None:
    stream.write(text)
    stream.flush()


def _dim(text: str) -> None:
    aside(f"{_DIM}{text}{_PLAIN}" if sys.stderr.isatty() else text)
