"""What a stream hears while its model loads or all slots are taken, in both dialects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import trio

from tests.end_to_end.cookbooks import CHAT, chat, cookbook, events_of, profile, wait_document
from tests.support.fake import FAKE_LLAMA_SERVER, fake_profile_file
from tests.support.node import running_node

SETTINGS = {"http": {"stream_keepalive_seconds": 0.05}}
MESSAGES = "/v1/messages"


async def read(reply: httpx.Response, enough: trio.Event, signs: int) -> str:
    """All of a stream; sets `enough` when so many signs of life came."""
    text = ""
    async for piece in reply.aiter_text():
        text += piece
        if text.count("\n\n") >= signs:
            enough.set()
    return text


async def listen(
    tmp_path: Path, path: str, gate: Path, recipes: dict[str, Any], model: str
) -> tuple[httpx.Response, str]:
    """Ask for a stream, let it wait for three signs of life, open the gate, hear it to its end."""
    async with (
        running_node(tmp_path / "node", recipes, SETTINGS, binary_path=FAKE_LLAMA_SERVER) as node,
        node.client.stream("POST", path, json=chat(model, stream=True)) as reply,
        trio.open_nursery() as nursery,
    ):
        waited = trio.Event()

        async def open_gate() -> None:
            await waited.wait()
            gate.touch()

        nursery.start_soon(open_gate)
        return reply, await read(reply, waited, 3)


async def test_a_stream_hears_that_its_model_loads(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    slow = fake_profile_file(tmp_path, "slow", ready_when=str(gate))
    reply, text = await listen(tmp_path, CHAT, gate, cookbook(slow=profile(slow)), "slow")
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["x-accel-buffering"] == "no"
    assert reply.headers["x-llamesh-profile"] == "slow:default"
    comments = [line for line in text.split("\n") if line.startswith(":")]
    assert len(comments) >= 3
    assert "slow:default" in comments[0]
    events = events_of(text)
    assert events[-1] == "[DONE]"
    assert len([e for e in events[:-1] if e["choices"][0]["delta"].get("content")]) == 5


async def test_anthropic_s_clients_hear_pings(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    slow = fake_profile_file(tmp_path, "slow", ready_when=str(gate))
    _, text = await listen(tmp_path, MESSAGES, gate, cookbook(slow=profile(slow)), "slow")
    assert text.startswith('event: ping\ndata: {"type": "ping"}\n\n' * 3)
    assert not [line for line in text.split("\n") if line.startswith(":")]


async def test_an_error_after_a_wait_is_an_event(tmp_path: Path) -> None:
    """The head has gone out with 200: what went wrong comes in the stream, which ends properly."""
    for path, name in ((CHAT, "one"), (MESSAGES, "two")):
        gate = tmp_path / f"gate-{name}"
        broken = fake_profile_file(tmp_path, name, ready_when=str(gate), status=500)
        reply, text = await listen(tmp_path / name, path, gate, cookbook(broken=profile(broken)), "broken")
        assert reply.status_code == 200
        last = text.rstrip("\n").split("\n\n")[-1]
        if path == CHAT:
            document = json.loads(last.removeprefix("data: "))
        else:
            assert last.startswith("event: error\ndata: ")
            document = json.loads(last.removeprefix("event: error\ndata: "))
            assert document["type"] == "error"
        assert document["error"]["message"] == "told to fail"


async def test_a_stream_in_the_queue_hears_of_it(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    busy = fake_profile_file(tmp_path, "busy", gate=str(gate), gate_after=1)
    recipes = cookbook(busy=profile(busy))
    async with (
        running_node(tmp_path / "node", recipes, SETTINGS, binary_path=FAKE_LLAMA_SERVER) as node,
        trio.open_nursery() as nursery,
    ):
        body, texts = chat("busy", stream=True), {}

        async def ask_for_a_stream(name: str, enough: trio.Event) -> None:
            async with node.client.stream("POST", CHAT, json=body) as reply:
                texts[name] = await read(reply, enough, 3)

        nursery.start_soon(ask_for_a_stream, "first", trio.Event())
        await wait_document(node, "/running", lambda d: [i["busy"] for i in d["running"]] == [1])
        waited = trio.Event()
        nursery.start_soon(ask_for_a_stream, "second", waited)
        await waited.wait()
        gate.touch()
    for text in texts.values():
        assert events_of(text)[-1] == "[DONE]"
    comments = [line for line in texts["second"].split("\n") if line.startswith(":")]
    assert len(comments) >= 3
    for comment in comments:
        assert "0 ahead" in comment
