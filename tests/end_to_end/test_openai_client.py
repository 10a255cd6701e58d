"""The official `openai` client, as its users know it, against a whole node with a real engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import trio

from tests.end_to_end.cookbooks import (
    CHAT,
    ask_well,
    chat,
    child_of,
    cookbook,
    openai_client,
    profile,
    wait_document,
    wait_running,
)
from tests.support.fake import FAKE_LLAMA_SERVER, fake_profile_file
from tests.support.node import PATIENCE_SECONDS, running_node

HI: Any = [{"role": "user", "content": "hi"}]


async def test_chat_and_completions(tmp_path: Path, tiny_model: Path, engine_binary: Path | None) -> None:
    recipes = cookbook(tiny=profile(tiny_model))
    async with running_node(tmp_path, recipes, binary_path=engine_binary) as node:
        # The asynchronous client leaves its generators to the collector after `[DONE]`, and trio complains.
        await trio.to_thread.run_sync(_converse, f"{node.url}/v1")
        await node.wait_event("request", error="", after=5)


def _converse(base_url: str) -> None:
    """Chat, complete and respond, each as a whole and as a stream."""
    with openai.OpenAI(base_url=base_url, api_key="unused", max_retries=0) as client:
        whole = client.chat.completions.create(model="tiny", messages=HI, max_tokens=12, temperature=0)
        said = whole.choices[0].message.content
        assert said is not None
        assert len(said) == 12
        assert whole.choices[0].finish_reason == "length"
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 12

        chunks = list(
            client.chat.completions.create(
                model="tiny",
                messages=HI,
                max_tokens=12,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
        assert deltas[0].role == "assistant"
        words = [delta.content for delta in deltas if delta.content]
        assert len(words) == 12
        assert "".join(words) == said
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 12

        text = client.completions.create(model="tiny", prompt="once", max_tokens=9, temperature=0)
        assert len(text.choices[0].text) == 9
        parts = client.completions.create(
            model="tiny", prompt="once", max_tokens=9, temperature=0, stream=True
        )
        assert "".join(part.choices[0].text for part in parts if part.choices) == text.choices[0].text

        answer = client.responses.create(model="tiny", input="hi", max_output_tokens=7)
        assert len(answer.output_text) == 7
        events = client.responses.create(model="tiny", input="hi", max_output_tokens=7, stream=True)
        kinds = [event.type for event in events]
        assert kinds[0] == "response.created"
        assert kinds[-1] == "response.completed"
        assert kinds.count("response.output_text.delta") == 7


async def test_a_raw_response_shows_who_answered(
    tmp_path: Path, tiny_model: Path, engine_binary: Path | None
) -> None:
    recipes = cookbook(tiny=profile(tiny_model))
    async with (
        running_node(tmp_path, recipes, binary_path=engine_binary) as node,
        openai_client(node) as client,
    ):
        raw = await client.chat.completions.with_raw_response.create(
            model="TINY", messages=HI, max_tokens=1, extra_headers={"X-Request-Id": "mine-1"}
        )
        assert raw.headers["x-request-id"] == "mine-1"
        assert raw.headers["x-llamesh-node"] == "node-a"
        assert raw.headers["x-llamesh-profile"] == "tiny:default"
        assert raw.headers["x-llamesh-queue-ms"].isdigit()
        assert raw.headers["x-llamesh-affinity"] in {"hit", "miss", "off"}
        await node.wait_event("request", request_id="mine-1", instance="tiny:default#1", tokens=1)
        async with client.chat.completions.with_streaming_response.create(
            model="tiny", messages=HI, max_tokens=3, stream=True
        ) as streamed:
            assert streamed.headers["content-type"].startswith("text/event-stream")
            assert streamed.headers["x-accel-buffering"] == "no"
            lines = [line async for line in streamed.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"


async def test_embeddings(tmp_path: Path, tiny_model: Path, engine_binary: Path | None) -> None:
    recipes = cookbook(tiny=profile(tiny_model, "--embedding --pooling mean -c 1024"))
    async with (
        running_node(tmp_path, recipes, binary_path=engine_binary) as node,
        openai_client(node) as client,
    ):
        # The client asks for base64 by itself and decodes it.
        reply = await client.embeddings.create(model="tiny", input=["one", "another"])
        assert [len(entry.embedding) for entry in reply.data] == [64, 64]
        assert reply.data[0].embedding != reply.data[1].embedding
        floats = await client.embeddings.create(model="tiny", input=["one"], encoding_format="float")
        assert floats.data[0].embedding == pytest.approx(reply.data[0].embedding, rel=1e-3, abs=1e-6)


async def test_models(tmp_path: Path, tiny_model: Path) -> None:
    """Nothing needs to run for the list."""
    listed_only = profile(tiny_model, id="listed", max_instances=0)
    recipes = cookbook(
        **{
            "Tiny": [profile(tiny_model), profile(tiny_model, id="long"), listed_only],
            "org/deep-1.5": [profile(tiny_model, id="only")],
            "off": {"enabled": False, "profiles": [profile(tiny_model)]},
        }
    )
    async with running_node(tmp_path, recipes) as node, openai_client(node) as client:
        listed = [model async for model in client.models.list()]
        assert [model.id for model in listed] == ["Tiny", "Tiny:long", "Tiny:listed", "org/deep-1.5:only"]
        assert {(model.owned_by, model.object) for model in listed} == {("node-a", "model")}
        assert len({model.created for model in listed}) == 1
        for model in listed:
            assert (await client.models.retrieve(model.id)) == model
        assert (await client.models.retrieve("tiny:LONG")).id == "Tiny:long"
        for unknown in ("off", "nothing", "Tiny:nothing", "org/deep-1.5"):
            with pytest.raises(openai.NotFoundError) as caught:
                await client.models.retrieve(unknown)
            assert caught.value.type == "model_not_found"
        assert node.find_events("starting") == []


async def test_errors_are_its_own_exceptions(
    tmp_path: Path, tiny_model: Path, engine_binary: Path | None
) -> None:
    recipes = cookbook(
        tiny=profile(tiny_model),
        embed=profile(tiny_model, "--embedding -c 1024"),
        broken=profile(tmp_path / "missing.gguf"),
    )
    limits = {"http": {"request_body_limit_bytes": 10_000}}
    async with (
        running_node(tmp_path, recipes, limits, binary_path=engine_binary) as node,
        openai_client(node) as client,
    ):

        async def fails(kind: type[openai.APIStatusError], model: str = "tiny", **more: Any) -> Any:
            with pytest.raises(kind) as caught:
                await client.chat.completions.create(
                    **{"model": model, "messages": HI, "max_tokens": 1, **more}
                )
            assert caught.type is kind
            return caught.value

        unknown = await fails(openai.NotFoundError, "nobody")
        assert (unknown.type, unknown.code, unknown.param) == ("model_not_found", "model_not_found", "model")
        assert "nobody" in unknown.message
        assert "node-a" in unknown.message
        empty = await fails(openai.BadRequestError, "")
        assert (empty.type, empty.param) == ("invalid_request_error", "model")
        assert (await fails(openai.BadRequestError, "embed")).param == "model"
        with pytest.raises(openai.NotFoundError) as caught:
            await client.embeddings.create(model="tiny", input="one")
        assert caught.value.type == "model_not_found"
        # llama-server's own refusal, in its own words.
        own = await fails(openai.BadRequestError, messages=[{"role": "user"}, "nonsense"])
        assert own.response.headers["x-llamesh-profile"] == "tiny:default"
        too_large = await fails(openai.APIStatusError, messages=[{"role": "user", "content": "x" * 20_000}])
        assert (too_large.status_code, too_large.type) == (413, "request_too_large")
        hops = await fails(openai.BadRequestError, extra_headers={"X-Llama-Mesh-Hops": "11"})
        assert "Too many hops" in hops.message
        with pytest.raises(openai.NotFoundError) as caught:
            await client.post("/nowhere", body={}, cast_to=httpx.Response)
        assert caught.value.type == "not_found"
        failed = await fails(openai.InternalServerError, "broken")
        assert (failed.status_code, failed.type) == (503, "spawn_failures_exhausted")
        assert failed.response.headers["retry-after"] == "30"


async def test_keys(tmp_path: Path, tiny_model: Path, engine_binary: Path | None) -> None:
    keys = {"enabled": True, "allowed_keys": ["key-one"], "admin_keys": ["key-two"]}
    recipes = cookbook(tiny=profile(tiny_model))
    async with running_node(tmp_path, recipes, {"auth": keys}, binary_path=engine_binary) as node:
        async with openai_client(node, api_key="key-none") as client:
            with pytest.raises(openai.AuthenticationError) as refused:
                await client.chat.completions.create(model="tiny", messages=HI, max_tokens=1)
            assert refused.value.type == "authentication_error"
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()
        async with openai_client(node, api_key="key-one") as client:
            reply = await client.chat.completions.create(model="tiny", messages=HI, max_tokens=1)
            assert reply.choices[0].message.content
            assert [model.id async for model in client.models.list()] == ["tiny"]
            administer = client.with_options(base_url=node.url)
            with pytest.raises(openai.PermissionDeniedError) as forbidden:
                await administer.post("/admin/unload", body={}, cast_to=object)
            assert forbidden.value.type == "forbidden"
        # The other way to send a key.
        other = await node.client.post(CHAT, json=chat(), headers={"x-api-key": "key-two"})
        assert other.status_code == 200
        for path in ("/healthz", "/readyz", "/version"):
            assert (await node.client.get(path)).status_code == 200
        for path in ("/metrics", "/metrics/json", "/cluster/nodes", "/v1/models"):
            assert (await node.client.get(path)).status_code == 401


async def test_a_stream_that_is_closed_early_frees_its_slot(
    tmp_path: Path, endless_model: Path, engine_binary: Path | None
) -> None:
    recipes = cookbook(tiny=profile(endless_model, "-np 1"))
    async with running_node(tmp_path, recipes, binary_path=engine_binary) as node:

        def hear_three_words_and_leave() -> list[str]:
            with openai.OpenAI(base_url=f"{node.url}/v1", api_key="unused", max_retries=0) as client:
                stream = client.chat.completions.create(model="tiny", messages=HI, stream=True)
                with stream:
                    words = (chunk.choices[0].delta.content or "" for chunk in stream)
                    return [next(words) for _ in range(3)]

        assert len(await trio.to_thread.run_sync(hear_three_words_and_leave)) == 3
        async with child_of(node, "tiny:default") as child:
            with trio.fail_after(PATIENCE_SECONDS):
                while (await child.get("/slots")).json()[0]["is_processing"]:
                    await trio.sleep(0.02)
        await wait_running(node, 0)
        assert len(await ask_well(node)) == 5
        left = await node.wait_event("request", error="cancelled")
        assert left["status"] == 200
        assert left["tokens"] > 0


async def test_a_request_that_is_cancelled_frees_its_slot_once_it_is_idle(
    tmp_path: Path, endless_model: Path, engine_binary: Path | None
) -> None:
    """Without a stream llama-server notices late; meanwhile nobody else may be sent there."""
    recipes = cookbook(tiny=profile(endless_model, "-np 1"))
    async with (
        running_node(tmp_path, recipes, binary_path=engine_binary) as node,
        openai_client(node) as client,
    ):
        await ask_well(node)
        async with trio.open_nursery() as nursery:

            async def talk() -> None:
                await client.chat.completions.create(model="tiny", messages=HI)

            nursery.start_soon(talk)
            await wait_document(node, "/running", lambda document: document["running"][0]["busy"] == 1)
            nursery.cancel_scope.cancel()
        await node.wait_event("request", error="cancelled")
        assert len(await ask_well(node)) == 5
        assert node.find_events("crashed") == []


async def test_it_tries_again_when_it_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full queue is a 503 with Retry-After; the client waits that long and then gets its answer."""
    gate = tmp_path / "gate"
    behaviour = fake_profile_file(tmp_path, "slow", slots=1, gate=str(gate))
    recipes = cookbook(slow=profile(behaviour, "-np 1", max_queue_size=1))
    pauses: list[float] = []
    async with (
        running_node(tmp_path, recipes, binary_path=FAKE_LLAMA_SERVER) as node,
        openai_client(node, max_retries=2) as client,
        trio.open_nursery() as nursery,
    ):

        async def sleep(seconds: float) -> None:
            pauses.append(seconds)
            gate.touch()
            await wait_running(node, 0)

        monkeypatch.setattr("openai._base_client.anyio.sleep", sleep)
        nursery.start_soon(ask_well, node, "slow")
        await wait_running(node, 1)
        await node.wait_event("ready")
        nursery.start_soon(ask_well, node, "slow")
        await wait_document(node, "/cluster/nodes", lambda d: d["nodes"]["node-a"]["total_queue_length"] == 1)
        reply = await client.chat.completions.create(model="slow", messages=HI, max_tokens=2)
        assert reply.choices[0].message.content == "t0 t1 "
        assert pauses == [5.0]
        await node.wait_event("request", error="queue_full")
        assert len(node.find_events("request", error="queue_full")) == 1
