"""Commands on a real terminal: what moves, what keys do, and that the terminal is left as it was."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.end_to_end.cookbooks import CHAT, chat, wait_document, wait_running
from tests.end_to_end.mesh.parts import fakes
from tests.support.commands import COMMAND, environment_for
from tests.support.fake import FAKE_LLAMA_SERVER
from tests.support.node import Node, running_node
from tests.support.terminal import Terminal, on_terminal

COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-7][0-9;]*m")


@asynccontextmanager
async def one_node(tmp_path: Path, **models: Any) -> AsyncIterator[Node]:
    recipes = fakes(tmp_path, **models)
    async with running_node(tmp_path / "node", recipes, binary_path=FAKE_LLAMA_SERVER) as node:
        yield node


@asynccontextmanager
async def typing(node: Node, *words: str, **more: str) -> AsyncIterator[Terminal]:
    async with on_terminal([*COMMAND, *words], node.directory, environment_for(node, **more)) as terminal:
        yield terminal


async def test_a_conversation(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    async with (
        one_node(tmp_path, m={}, slow={"gate": str(gate), "gate_after": 2, "tokens": 4}) as node,
        typing(node, "chat", "m", "--system", "be brief") as terminal,
    ):
        await terminal.wait_for("> ")
        terminal.type("hello\r")
        await terminal.wait_for("t0 t1 t2 t3 t4 \n")
        await terminal.wait_for("tokens/s")
        # Ctrl-C stops an answer, and not the program.
        terminal.type("/model slow\r")
        await terminal.wait_for("> ")
        terminal.type("go on\r")
        await terminal.wait_for("t0 t1 ")
        terminal.type("\x03")
        await terminal.wait_for("stopped")
        await wait_running(node, 0)
        await terminal.wait_for("> ")
        # Nor does it at the prompt.
        terminal.type("half a line\x03")
        await terminal.wait_for("> ")
        terminal.type("/nonsense\r")
        await terminal.wait_for("there is no /nonsense")
        terminal.type("/model nobody\rhello\r")
        await terminal.wait_for("knows no model 'nobody'")
        terminal.type("/new\r")
        await terminal.wait_for("forgotten")
        gate.touch()
        terminal.type("/model slow\rhello\r")
        await terminal.wait_for("t0 t1 t2 t3 \n")
        await terminal.wait_for("> ")
        terminal.type("\x04")
        assert await terminal.wait_end() == 0


async def test_a_model_that_nobody_has_is_told_before_a_question(tmp_path: Path) -> None:
    async with one_node(tmp_path, m={}) as node, typing(node, "chat", "mm") as terminal:
        await terminal.wait_for("did you mean m?")
        assert await terminal.wait_end() == 1


@pytest.mark.parametrize("keys", ["q", "\x03"])
async def test_top(tmp_path: Path, keys: str) -> None:
    gate = tmp_path / "gate"
    slow = {"gate": str(gate), "gate_after": 2, "tokens": 4}
    async with (
        one_node(tmp_path, slow=slow) as node,
        trio.open_nursery() as nursery,
        typing(node, "top") as terminal,
    ):
        await terminal.wait_for("Requests")
        await terminal.wait_for("node-a")
        assert not terminal.echoes()

        async def ask() -> None:
            await node.client.post(CHAT, json=chat("slow", stream=True), headers={"x-request-id": "r1"})

        nursery.start_soon(ask)
        await terminal.wait_for("r1")
        await terminal.wait_for("decode")
        gate.touch()
        terminal.type(keys)
        assert await terminal.wait_end() == 0
        # On its own screen, and back from it.
        assert "\x1b[?1049h" in terminal.raw
        assert terminal.raw.rindex("\x1b[?1049l") > terminal.raw.rindex("\x1b[?1049h")
        assert terminal.echoes()


async def test_status_goes_on(tmp_path: Path) -> None:
    async with one_node(tmp_path, m={}) as node, typing(node, "status", "--watch") as terminal:
        await terminal.wait_for("fits: node-a")
        await node.client.post("/admin/prewarm", json={"model": "m"})
        await terminal.wait_for("loaded: node-a")
        await terminal.wait_for("m:default#1")
        assert COLOUR.search(terminal.raw)
        assert await node.stop() == 0
        await terminal.wait_for("no node answers at 127.0.0.1")
        terminal.type("\x03")
        assert await terminal.wait_end() == 0


async def test_without_colours(tmp_path: Path) -> None:
    async with one_node(tmp_path, m={}) as node:
        async with typing(node, "status", NO_COLOR="1") as terminal:
            await terminal.wait_for("fits: node-a")
            assert await terminal.wait_end() == 0
            assert not COLOUR.search(terminal.raw)
        async with typing(node, "status") as terminal:
            assert await terminal.wait_end() == 0
            assert COLOUR.search(terminal.raw)


async def test_a_load_is_watched_and_left(tmp_path: Path) -> None:
    load = tmp_path / "load"
    async with one_node(tmp_path, m={"ready_when": str(load)}) as node:
        async with typing(node, "prewarm", "m") as terminal:
            await terminal.wait_for("m: loading on node-a, ")
            terminal.type("\x03")
            await terminal.wait_for("what has begun to load goes on")
            assert await terminal.wait_end() == 130
        async with typing(node, "prewarm", "m") as terminal:
            await terminal.wait_for("m: loading on node-a, ")
            load.touch()
            await terminal.wait_for("node-a: m is loaded")
            assert await terminal.wait_end() == 0
        await wait_document(node, "/running", lambda d: [one["state"] for one in d["running"]] == ["ready"])


async def test_a_log_is_followed(tmp_path: Path) -> None:
    async with one_node(tmp_path, m={}) as node:
        await node.client.post(CHAT, json=chat("m"))
        async with typing(node, "logs", "m", "-f", "-n", "1") as terminal:
            await terminal.wait_for("request POST /v1/chat/completions")
            await node.client.post(CHAT, json=chat("m"))
            await terminal.wait_for("request POST /v1/chat/completions")
            terminal.type("\x03")
            assert await terminal.wait_end() == 0
