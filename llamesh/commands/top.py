"""`llamesh top`: what runs in the mesh now, on the whole screen."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections.abc import Iterator

import click

from llamesh.commands.shared import exit_codes
from llamesh.commands.shared.failed import Failed
from llamesh.commands.shared.following import Following, State
from llamesh.commands.shared.node import Reach, node_options
from llamesh.commands.shared.options import command as make
from llamesh.commands.shared.sheets import Sheet
from llamesh.commands.shared.views import attention, instances, nodes, requests, summary

_REDRAW_SECONDS = 0.5

_QUIT = frozenset(b"qQ\x03\x04")


@make(("llamesh top", "`q` or Ctrl-C ends it"))
@node_options
def command(reach: Reach) -> int:
    """Watch instances and requests on the whole screen, with their phases and speeds."""
    client = reach.client()
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise click.UsageError("`llamesh top` needs a terminal; `llamesh status --watch` doesn't")
    with Following(client) as following, contextlib.suppress(KeyboardInterrupt), _keys() as descriptor:
        _watch(following, descriptor)
    return exit_codes.OK


def _watch(following: Following, descriptor: int) -> None:
    from rich.console import Group, RenderableType
    from rich.live import Live
    from rich.text import Text

    from llamesh.commands.shared.screen import console, drawn, heading

    screen = console()

    def picture() -> RenderableType:
        state = following.state
        head = heading(f"q quits. {summary(state)}", following.problem)
        return Group(head, Text(), drawn(_sheets(state), screen.width, screen.height - 2))

    with Live(picture(), console=screen, screen=True, auto_refresh=False) as live:
        while not _quit(descriptor, _REDRAW_SECONDS):
            live.update(picture(), refresh=True)


def _sheets(state: State) -> list[Sheet]:
    now = time.time()
    return [attention(state), requests(state, now), instances(state, now), nodes(state)]


def _quit(descriptor: int, seconds: float) -> bool:
    """Whether somebody pressed a key that ends it, within so long."""
    if not select.select([descriptor], [], [], seconds)[0]:
        return False
    pressed = os.read(descriptor, 64)
    return not pressed or not _QUIT.isdisjoint(pressed)


@contextlib.contextmanager
def _keys() -> Iterator[int]:
    """Keys come as they are pressed, and unseen."""
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    try:
        before = termios.tcgetattr(descriptor)
    except termios.error as error:
        raise Failed(f"this terminal can't be read key by key: {error}") from None
    try:
        tty.setcbreak(descriptor)
        yield descriptor
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
