"""Cookbooks, requests and looks at processes that the end-to-end tests share."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import trio

from tests.support.node import PATIENCE_SECONDS, POLL_SECONDS, Node, wait_until

CHAT = "/v1/chat/completions"

CHILD_KEY = "key-of-the-child"
"""The `--api-key` of every profile here, so that a test can ask a child behind the node's back."""


def profile(source: Path, arguments: str = "-c 1024 -np 1", **more: Any) -> dict[str, Any]:
    """A profile, `default` unless `id` says otherwise."""
    # Threads of llama.cpp wait for each other at every token; on a busy machine that takes 100 times as long.
    flags = f"{arguments} -t 1 --api-key {CHILD_KEY}"
    return {"id": "default", "model_path": str(source), "llama_server_args": flags, **more}


def cookbook(**models: Any) -> dict[str, Any]:
    """A cookbook of models by name: a list of profiles, one profile, or a whole model entry."""
    entries = []
    for name, value in models.items():
        if isinstance(value, list):
            value = {"profiles": value}
        elif "profiles" not in value:
            value = {"profiles": [value]}
        entries.append({"name": name, **value})
    return {"models": entries}


def chat(model: str = "tiny", tokens: int = 5, **more: Any) -> dict[str, Any]:
    """The body of a chat request; greedy, so that the same question gets the same answer."""
    messages = [{"role": "user", "content": "hi"}]
    return {"model": model, "messages": messages, "max_tokens": tokens, "temperature": 0, **more}


async def ask(node: Node, model: str = "tiny", **more: Any) -> httpx.Response:
    """One short chat."""
    return await node.client.post(CHAT, json=chat(model, **more))


async def ask_well(node: Node, model: str = "tiny", **more: Any) -> str:
    """One short chat that must succeed; what was said."""
    reply = await ask(node, model, **more)
    assert reply.status_code == 200, reply.text
    text = reply.json()["choices"][0]["message"]["content"]
    assert isinstance(text, str)
    return text


def error_of(reply: httpx.Response) -> dict[str, Any]:
    """The error of a reply, which must have OpenAI's four members."""
    error = reply.json()["error"]
    assert isinstance(error, dict)
    assert set(error) == {"message", "type", "param", "code"}
    return error


async def entry_of(node: Node, model: str) -> dict[str, Any]:
    """A model's entry in the list of models."""
    reply = await node.client.get(f"/v1/models/{model}")
    assert reply.status_code == 200, reply.text
    entry: dict[str, Any] = reply.json()
    return entry


@asynccontextmanager
async def child_of(node: Node, key: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the newest llama-server of "model:profile", past the node."""
    words = psutil.Process(pid_of(node, key)).cmdline()
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{words[words.index('--port') + 1]}",
        headers={"authorization": f"Bearer {CHILD_KEY}"},
        trust_env=False,
        timeout=PATIENCE_SECONDS,
    ) as client:
        yield client


def pid_of(node: Node, key: str) -> int:
    """The process id of the newest instance of "model:profile" (asked for: the log may be behind)."""
    running = httpx.get(f"{node.url}/running", trust_env=False).json()["running"]
    pids = {
        int(e["instance"].rpartition("#")[2]): e["pid"]
        for e in running
        if e["instance"].startswith(f"{key}#")
    }
    return int(pids[max(pids)])


@asynccontextmanager
async def openai_client(node: Node, **options: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official client, as a user would make it, without retries unless `max_retries` says so."""
    given = {"api_key": "unused", "max_retries": 0, "timeout": PATIENCE_SECONDS, **options}
    async with openai.AsyncOpenAI(base_url=f"{node.url}/v1", **given) as client:
        yield client


def processes_in(directory: Path, *, but: int = 0) -> list[psutil.Process]:
    """The living processes whose command line names something in `directory`, `but` excepted.

    Unlike the children that a node reports, this finds those whose node is dead.
    """
    found = []
    for process in psutil.process_iter():
        try:
            named = any(str(directory) in word for word in process.cmdline())
            if named and process.pid != but and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


async def wait_alone(directory: Path) -> None:
    """Wait until no process has to do with `directory`."""
    await wait_until(lambda: not processes_in(directory), lambda: f"left: {processes_in(directory)}")


async def wait_running(node: Node, count: int = 1) -> None:
    """Wait until the node works on exactly so many requests."""
    await wait_document(node, "/metrics/json", lambda document: document["current_requests"] == count)


async def wait_document(node: Node, path: str, condition: Callable[[Any], bool]) -> Any:
    """GET `path` again and again until `condition` holds of its document; that document."""
    document = None
    with trio.move_on_after(PATIENCE_SECONDS):
        while not condition(document := (await node.client.get(path)).json()):
            await trio.sleep(POLL_SECONDS)
        return document
    raise AssertionError(f"{path} stays at {document}")


def events_of(text: str) -> list[Any]:
    """The documents of an SSE stream, `"[DONE]"` as it is; comments and event names left out."""
    lines = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def shape(value: Any) -> Any:
    """The form of a JSON document without its values: names, kinds, lengths of lists."""
    if isinstance(value, Mapping):
        return {name: shape(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [shape(inner) for inner in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "number"
    return type(value).__name__
