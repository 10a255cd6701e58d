"""A conversation goes on where its beginning is in the cache, unless that is the slower place by now."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import trio

from tests.end_to_end.cookbooks import cookbook, profile
from tests.end_to_end.mesh.parts import NO_MODELS, fakes
from tests.support.chats import Answer
from tests.support.fake import FAKE_LLAMA_SERVER
from tests.support.mesh import Member, running_mesh


def told(answer: Answer) -> tuple[str, str]:
    """Who served, and whether it was where the prompt had been read."""
    assert answer.status == 200, answer.body
    return answer.node, answer.headers["x-llamesh-affinity"]


async def converse(entry: Member, subject: str, turns: int, **more: Any) -> list[Answer]:
    """So many turns of a conversation, each with all that was said before."""
    messages = [{"role": "user", "content": f"{subject} " * 200}]
    answers = []
    for turn in range(turns):
        answers.append(await entry.ask("m", messages=messages, **more))
        messages += [
            {"role": "assistant", "content": answers[-1].text},
            {"role": "user", "content": f"and then? {turn}"},
        ]
    return answers


async def test_conversations_stay_where_they_are_cached(
    tmp_path: Path, tiny_model: Path, engine_binary: Path | None
) -> None:
    recipes = cookbook(m=profile(tiny_model, "-c 8192 -np 2", min_instances=1))
    cookbooks = {"node-a": NO_MODELS, "node-b": recipes, "node-c": recipes}
    async with running_mesh(tmp_path, cookbooks, binary_path=engine_binary) as mesh:
        a, *_ = mesh
        await mesh.wait_joined()
        for name in ("node-b", "node-c"):
            await mesh.wait_listed("m", at="node-a", by=name)
            await wait_loaded(mesh[name])
        for subject in ("apples", "pears", "plums", "cherries", "quinces", "figs"):
            answers = await converse(a, subject, 3)
            first, *others = map(told, answers)
            assert first[1] == "miss"
            assert others == [(first[0], "hit")] * 2
            # And it was worth it: all but the last turn was there.
            usage = json.loads(answers[-1].body)["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] > 0.8 * usage["prompt_tokens"]


async def wait_loaded(member: Member) -> None:
    """Until it has its model ready."""
    with trio.fail_after(60):
        while not any(one["state"] == "ready" for one in (await member.get("/running"))["running"]):
            await trio.sleep(0.02)


async def test_what_is_short_is_off_and_a_name_is_something_to_go_by(tmp_path: Path) -> None:
    async with running_mesh(
        tmp_path, {"node-a": fakes(tmp_path, m={})}, binary_path=FAKE_LLAMA_SERVER
    ) as mesh:
        [a] = mesh
        for _ in range(2):
            assert told(await a.ask("m")) == ("node-a", "off")
        for name in ("X-Session-Id", "x-openwebui-chat-id", "X-Conversation-Id", "x-claude-code-session-id"):
            headers = {name: "chat-" + name}
            assert told(await a.ask("m", headers=headers)) == ("node-a", "miss")
            assert told(await a.ask("m", headers=headers, words="on")) == ("node-a", "hit")
        for more in ({"prompt_cache_key": "k"}, {"session_id": "s"}):
            assert told(await a.ask("m", **more)) == ("node-a", "miss")
            assert told(await a.ask("m", words="on", **more)) == ("node-a", "hit")
        assert told(await a.ask("m", user="somebody")) == ("node-a", "off")
        # What was said by the instance that is gone is gone.
        await a.node.client.post("/admin/unload", json={"model": "m"})
        await a.node.wait_event("gone")
        assert told(await a.ask("m", session_id="s")) == ("node-a", "miss")


async def test_a_busy_home_is_left(tmp_path: Path) -> None:
    """A follow-up that would have to wait long where its cache is, is read anew elsewhere."""
    gate = tmp_path / "gate"
    slow = {"slots": 1, "token_delay": 0.03}
    cookbooks = {
        "node-a": NO_MODELS,
        "node-b": fakes(tmp_path / "b", entry={"min_instances": 1}, m=slow),
        "node-c": fakes(tmp_path / "c", entry={"min_instances": 1}, m=slow),
    }
    async with running_mesh(tmp_path, cookbooks, binary_path=FAKE_LLAMA_SERVER) as mesh:
        a, *_ = mesh
        await mesh.wait_joined()
        for name in ("node-b", "node-c"):
            await mesh.wait_listed("m", at="node-a", by=name)
            await wait_loaded(mesh[name])
        first, second = map(told, await converse(a, "apples", 2))
        assert (first[1], second) == ("miss", (first[0], "hit"))
        messages = [{"role": "user", "content": "apples " * 200}]
        async with a.talking("m", messages=messages, fake={"gate": str(gate), "gate_after": 1}) as talk:
            assert await talk.word()
            assert talk.node == first[0]
            [elsewhere] = map(told, await converse(a, "apples", 1))
            assert elsewhere[0] != first[0]
            assert elsewhere[1] == "miss"
            gate.touch()
            await talk.rest()
