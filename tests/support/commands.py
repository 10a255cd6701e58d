"""Running `llamesh COMMAND` against a node of a test."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import trio

from tests.support.node import Node, clean_environment

COMMAND = (sys.executable, "-m", "llamesh")


def environment_for(node: Node, **more: str) -> dict[str, str]:
    """What leads a command in the node's directory to the node."""
    return clean_environment({"LLAMESH_LISTEN_ADDR": f"127.0.0.1:{node.port}", **more})


async def call(node: Node, *words: str, stdin: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the node's directory, to its end."""
    return await run(node.directory, environment_for(node, **more), *words, stdin=stdin)


async def run(
    directory: Path, environment: dict[str, str], *words: str, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end. No traceback may come of it."""
    done = await trio.to_thread.run_sync(
        partial(
            subprocess.run,
            [*COMMAND, *words],
            cwd=directory,
            env=environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


async def say(node: Node, *words: str, stdin: str = "", **more: str) -> str:
    """What a command prints, which must succeed."""
    done = await call(node, *words, stdin=stdin, **more)
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout
