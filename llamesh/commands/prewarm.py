"""`llamesh prewarm`: load a model before anyone asks for it."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import click

from llamesh.commands.shared import exit_codes
from llamesh.commands.shared.acts import model_argument, naming, node_option, tell, where
from llamesh.commands.shared.client import Client, path_of
from llamesh.commands.shared.failed import Failed
from llamesh.commands.shared.following import Following, State
from llamesh.commands.shared.node import Reach, node_options
from llamesh.commands.shared.options import command as make
from llamesh.commands.shared.saying import aside, out, passing
from llamesh.commands.shared.words import lasting, one_line

# A download of hundreds of gigabytes is part of it; the node has limits of its own.
_MOST_SECONDS = 86_400.0

_LOOK_SECONDS = 0.5

# Where nobody sees a line that moves.
_SPEAK_SECONDS = 15.0


@make(
    ("llamesh prewarm qwen3", "wait until it is loaded"),
    ("llamesh prewarm qwen3 --node box-b --no-wait", "there, and go on"),
)
@model_argument
@click.option("--no-wait", is_flag=True, help="don't wait until it is loaded")
@node_option
@node_options
def command(model: str, no_wait: bool, node: str | None, reach: Reach) -> int:
    """Load MODEL, fetching its weights first where they aren't there."""
    client = reach.client()
    with naming(client, model):
        if no_wait:
            answer = tell(client, "prewarm", node, {"model": model, "wait": False})
        else:
            answer = _load(client, node, model)
    name = one_line(str(answer.get("model") or model))
    state = one_line(str(answer.get("status") or "loaded"))
    out(f"{where(answer, node, client)}: {name} is {state}")
    return exit_codes.OK


def _load(client: Client, node: str | None, model: str) -> dict[str, Any]:
    """Have it loaded and show how far that is; the answer. Raises Failed, KeyboardInterrupt."""
    answers: list[dict[str, Any]] = []
    errors: list[Failed] = []

    def load() -> None:
        try:
            answers.append(tell(client, "prewarm", node, {"model": model}, seconds=_MOST_SECONDS))
        except Failed as error:
            errors.append(error)

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    # A moment: what is loaded already needs no progress.
    thread.join(_LOOK_SECONDS)
    try:
        if thread.is_alive():
            _show(client, model, thread)
    except KeyboardInterrupt:
        aside("llamesh: stopped waiting; what has begun to load goes on, `llamesh unload` ends it")
        raise
    if errors:
        raise errors[0]
    return answers[0]


def _show(client: Client, model: str, thread: threading.Thread) -> None:
    """Words about it until the thread ends: on a line that moves, else one now and then."""
    moves = sys.stderr.isatty()
    began = spoke = time.monotonic()
    said = ""
    with Following(client) as following:
        try:
            while thread.is_alive():
                words = f"{model}: {_progress(client, following.state, model)}"
                now = time.monotonic()
                if moves:
                    passing(f"{words}, {lasting(now - began)}")
                elif words != said or now - spoke > _SPEAK_SECONDS:
                    aside(f"{words}, {lasting(now - began)}")
                    said, spoke = words, now
                thread.join(_LOOK_SECONDS)
        finally:
            if moves:
                passing()


def _progress(client: Client, state: State, model: str) -> str:
    """What is going on with the model, in a few words."""
    keys = {
        one["key"]
        for one in state["models"]
        if model.casefold() in (one["key"].casefold(), one["name"].casefold())
    }
    for one in state["instances"]:
        if one["model"] in keys and one["state"] == "starting":
            return f"loading on {one_line(one['node'])}"
    try:
        status = client.get(path_of("/v1/models", model)).get("status")
    except Failed:
        status = None
    told = status if isinstance(status, dict) else {}
    value, share = told.get("value"), told.get("progress")
    if value == "downloading" and isinstance(share, int | float):
        return f"downloading, {share:.0%}"
    return "waiting for room" if value in (None, "unloaded") else str(value)
