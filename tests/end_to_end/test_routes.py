"""Every inference path on a real engine: what the node answers is what the engine says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from tests.end_to_end.cookbooks import child_of, cookbook, error_of, events_of, profile, shape
from tests.support.fake import FAKE_LLAMA_SERVER, fake_profile_file
from tests.support.node import Node, running_node

MESSAGES = [{"role": "user", "content": "hi"}]
GREEDY = {"temperature": 0, "max_tokens": 6}
RERANK = {"query": "one", "documents": ["one", "another", "a third"]}


class Case(NamedTuple):
    """A request without its model. `upstream`: the path at llama-server, where it is another."""

    model: str
    path: str
    body: dict[str, Any]
    upstream: str = ""


# tiny is for text, embed and rerank for what they are called.
WHOLE = [
    Case("tiny", "/v1/chat/completions", {"messages": MESSAGES, **GREEDY}),
    Case("tiny", "/v1/completions", {"prompt": "once", **GREEDY}),
    Case("tiny", "/v1/responses", {"input": "hi", "temperature": 0, "max_output_tokens": 6}),
    Case("tiny", "/v1/messages", {"messages": MESSAGES, **GREEDY}),
    Case("tiny", "/v1/messages/count_tokens", {"messages": MESSAGES}),
    Case("tiny", "/infill", {"input_prefix": "a", "input_suffix": "b", "n_predict": 4}),
    Case("tiny", "/tokenize", {"content": "so many words"}),
    Case("tiny", "/detokenize", {"tokens": [72, 73, 74]}),
    Case("tiny", "/apply-template", {"messages": MESSAGES}),
    Case("embed", "/v1/embeddings", {"input": ["one", "another"]}),
    Case("embed", "/v1/embeddings", {"input": "one", "encoding_format": "base64"}),
    Case("embed", "/tokenize", {"content": "so many words"}),
    Case("rerank", "/v1/rerank", RERANK),
    Case("rerank", "/v1/reranking", RERANK, "/v1/rerank"),
    Case("rerank", "/rerank", RERANK, "/v1/rerank"),
]

# No ids, no times, no rounding that depends on the neighbours.
SAME_EACH_TIME = {"/tokenize", "/detokenize", "/apply-template", "/v1/messages/count_tokens"}

STREAMED = [
    Case("tiny", "/v1/chat/completions", {"messages": MESSAGES, **GREEDY}),
    Case("tiny", "/v1/completions", {"prompt": "once", **GREEDY}),
    Case("tiny", "/v1/responses", {"input": "hi", "temperature": 0, "max_output_tokens": 6}),
    Case("tiny", "/v1/messages", {"messages": MESSAGES, **GREEDY}),
]

# What llama-server itself refuses: its own words pass byte for byte.
REFUSED = [
    Case("tiny", "/v1/chat/completions", {"messages": "not a list"}),
    Case("tiny", "/v1/chat/completions", {"messages": "not a list", "stream": True}),
    Case("tiny", "/v1/completions", {"prompt": {"no": "prompt"}}),
    Case("tiny", "/v1/messages", {"max_tokens": 3}),
    Case("tiny", "/infill", {"input_prefix": "a"}),
    Case("tiny", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 4000}]}),
    Case("embed", "/v1/embeddings", {"input": []}),
    Case("rerank", "/v1/rerank", {"query": "one"}),
]


def recipes(model: Path) -> dict[str, Any]:
    """A profile of each kind."""
    return cookbook(
        tiny=profile(model),
        embed=profile(model, "--embedding --pooling mean -c 1024"),
        rerank=profile(model, "--reranking -c 1024"),
    )


async def both(node: Node, case: Case, **more: Any) -> tuple[httpx.Response, httpx.Response]:
    """The node's answer, and that of its own llama-server when asked directly."""
    body = {"model": case.model, **case.body, **more}
    relayed = await node.client.post(case.path, json=body)
    async with child_of(node, f"{case.model}:default") as child:
        direct = await child.post(case.upstream or case.path, json=body)
    return relayed, direct


async def test_whole_answers(tmp_path: Path, tiny_model: Path, engine_binary: Path | None) -> None:
    async with running_node(tmp_path, recipes(tiny_model), binary_path=engine_binary) as node:
        for case in WHOLE:
            relayed, direct = await both(node, case)
            assert relayed.status_code == direct.status_code, (case, relayed.text, direct.text)
            assert relayed.headers["content-type"] == direct.headers["content-type"], case
            assert relayed.headers["x-llamesh-profile"] == f"{case.model}:default"
            assert "server" not in relayed.headers
            assert shape(relayed.json()) == shape(direct.json()), case
            if case.path != "/infill":  # the tiny model lacks the tokens for it
                assert relayed.status_code == 200, (case, relayed.text)
            if case.path in SAME_EACH_TIME:
                assert relayed.content == direct.content, case


async def test_streams(tmp_path: Path, tiny_model: Path, engine_binary: Path | None) -> None:
    async with running_node(tmp_path, recipes(tiny_model), binary_path=engine_binary) as node:
        for case in STREAMED:
            relayed, direct = await both(node, case, stream=True)
            assert relayed.status_code == direct.status_code == 200, (case, relayed.text)
            assert relayed.headers["content-type"] == direct.headers["content-type"]
            assert relayed.headers["x-accel-buffering"] == "no"
            events = events_of(relayed.text)
            assert shape(events) == shape(events_of(direct.text)), case
            assert len(events) >= 6
            # Every line but the data, the names of events among them.
            assert _frame(relayed.text) == _frame(direct.text), case


def _frame(text: str) -> list[str]:
    return ["data" if line.startswith("data: {") else line for line in text.split("\n")]


async def test_refusals_of_the_engine(tmp_path: Path, tiny_model: Path, engine_binary: Path | None) -> None:
    async with running_node(tmp_path, recipes(tiny_model), binary_path=engine_binary) as node:
        for case in REFUSED:
            relayed, direct = await both(node, case)
            assert relayed.status_code == direct.status_code >= 400, (case, relayed.text, direct.text)
            assert relayed.content == direct.content, case
            assert relayed.headers["x-llamesh-profile"] == f"{case.model}:default"
        metrics = (await node.client.get("/metrics/json")).json()
        assert metrics["requests_total"] == metrics["errors_total"] == len(REFUSED)


async def test_audio_is_a_form(tmp_path: Path, tiny_model: Path, engine_binary: Path | None) -> None:
    """The model's name stands in the form, before or after the file; a text model refuses to listen."""
    wav = b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(range(256)) * 8
    file = ("speech.wav", wav, "audio/wav")
    async with running_node(tmp_path, recipes(tiny_model), binary_path=engine_binary) as node:
        forms: list[Any] = [
            [("model", (None, "tiny")), ("file", file)],
            [("file", file), ("model", (None, "TINY:default")), ("language", (None, "en"))],
        ]
        for form in forms:
            relayed = await node.client.post("/v1/audio/transcriptions", files=form)
            async with child_of(node, "tiny:default") as child:
                direct = await child.post("/v1/audio/transcriptions", files=form)
            assert relayed.status_code == direct.status_code >= 400
            assert relayed.content == direct.content
        by_query = await node.client.post("/v1/audio/transcriptions?model=tiny", files={"file": file})
        assert by_query.content == direct.content
        nameless = await node.client.post("/v1/audio/transcriptions", files={"file": file})
        assert (nameless.status_code, error_of(nameless)["param"]) == (400, "model")


# Model, path, and the status and type of the refusal.
WRONG: list[tuple[object, str, int, str]] = [
    ("embed", "/v1/chat/completions", 400, "invalid_request_error"),
    ("rerank", "/v1/completions", 400, "invalid_request_error"),
    ("embed", "/v1/messages", 400, "invalid_request_error"),
    ("tiny", "/v1/embeddings", 404, "model_not_found"),
    ("tiny", "/v1/rerank", 404, "model_not_found"),
    ("rerank", "/v1/embeddings", 404, "model_not_found"),
    ("nobody", "/tokenize", 404, "model_not_found"),
    ("tiny:nobody", "/tokenize", 404, "model_not_found"),
    ("", "/v1/completions", 400, "invalid_request_error"),
    (None, "/v1/completions", 400, "invalid_request_error"),
    (7, "/v1/completions", 400, "invalid_request_error"),
]


async def test_the_wrong_model_for_a_path_starts_nothing(tmp_path: Path, tiny_model: Path) -> None:
    async with running_node(tmp_path, recipes(tiny_model)) as node:
        for model, path, status, kind in WRONG:
            reply = await node.client.post(path, json={"model": model})
            assert reply.status_code == status, (model, path)
            error = error_of(reply)
            assert (error["type"], error["param"]) == (kind, "model"), (model, path)
        nameless = await node.client.post("/v1/completions", json={"prompt": "once"})
        assert (nameless.status_code, error_of(nameless)["param"]) == (400, "model")
        assert node.find_events("starting") == []


async def test_bodies_and_queries_arrive_as_they_were_sent(tmp_path: Path) -> None:
    """An engine that echoes what it got: each path, a body that no program would write, keys replaced."""
    echo = fake_profile_file(tmp_path, "echo", echo=True)
    menu = cookbook(
        tiny=profile(echo),
        embed=profile(echo, "--embedding"),
        rerank=profile(echo, "--reranking"),
    )
    body = '{\t"model" :"%s" ,"x":[1.50,1e2, "\\u00e9é"],\r\n "again": {"model":"other"} }   '
    async with running_node(tmp_path / "node", menu, binary_path=FAKE_LLAMA_SERVER) as node:
        for case in WHOLE:
            sent = (body % case.model).encode()
            reply = await node.client.post(
                f"{case.path}?n=1&b=%20+x",
                content=sent,
                headers={"authorization": "Bearer mine", "x-api-key": "mine", "x-other": "kept"},
            )
            assert reply.status_code == 200, (case, reply.text)
            head, _, arrived = reply.content.partition(b"\r\n\r\n")
            assert arrived == sent
            assert head.startswith(f"POST {case.upstream or case.path}?n=1&b=%20+x HTTP/1.1\r\n".encode())
            assert b"mine" not in head
            assert b"x-other: kept" in head.lower()
            assert head.lower().count(b"\r\ncontent-length: ") == 1


async def test_a_body_of_many_megabytes(tmp_path: Path) -> None:
    """An image in JSON: larger than what is kept in memory, and not changed by a byte."""
    echo = fake_profile_file(tmp_path, "echo", echo=True)
    document = {"image": "AbC+/" * 800_000, "model": "tiny"}
    sent = json.dumps(document).encode()
    async with running_node(
        tmp_path / "node", cookbook(tiny=profile(echo)), binary_path=FAKE_LLAMA_SERVER
    ) as node:
        reply = await node.client.post("/v1/chat/completions", content=sent)
        assert reply.status_code == 200
        assert reply.content.partition(b"\r\n\r\n")[2] == sent
