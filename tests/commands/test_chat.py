"""What `llamesh chat` sends, and what it makes of the pieces of an answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llamesh.commands.chat import Talk
from llamesh.commands.shared.answering import Figures, answer
from llamesh.commands.shared.failed import Failed, Refused
from tests.commands.test_client import Server, call, server

__all__ = ["server"]

DONE = b"data: [DONE]\n\n"


def event(**members: Any) -> bytes:
    return b"data: " + json.dumps(members).encode() + b"\n\n"


def delta(**members: str) -> bytes:
    return event(choices=[{"delta": members}])


def pieces(server: Server, *data: bytes) -> tuple[list[tuple[str, str]], Figures]:
    server.document, figures = b"".join(data), Figures()
    found = answer(server.client(), "m", [{"role": "user", "content": "hi"}], {}, {}, figures)
    return [(piece.kind, piece.text) for piece in found], figures


def test_the_pieces_and_the_figures(server: Server) -> None:
    server.headers = {"x-llamesh-node": "node-b"}
    found, figures = pieces(
        server,
        b": loading m:default\n\n",
        delta(role="assistant"),
        delta(reasoning_content="hm"),
        delta(content="yes"),
        delta(content=""),
        event(choices=[], usage={"completion_tokens": 12}, timings={"predicted_per_second": 34.56}),
        DONE,
    )
    assert found == [("waiting", "loading m:default"), ("thought", "hm"), ("text", "yes")]
    # Who answers wasn't known when the head went out.
    assert (figures.tokens, figures.speed, figures.node) == (12, 34.56, "")
    assert str(figures).startswith("12 tokens, 34.6 tokens/s, the first after ")
    _, figures = pieces(server, delta(content="yes"), DONE)
    assert (figures.tokens, figures.node) == (1, "node-b")
    _, path, _, sent = server.asked[0]
    assert path == "/v1/chat/completions"
    assert (sent["stream"], sent["stream_options"]) == (True, {"include_usage": True})


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ([delta(content="a")], "the answer was cut"),
        ([event(error={"message": "out of\x1b memory"}), DONE], "out of\N{REPLACEMENT CHARACTER} memory"),
        ([b"data: {nonsense\n\n"], "isn't what a model sends"),
        ([b"data: [1]\n\n"], "isn't what a model sends"),
    ],
)
def test_an_answer_that_isnt_whole(server: Server, data: list[bytes], reason: str) -> None:
    with pytest.raises(Failed, match=reason):
        pieces(server, *data)


def test_a_conversation_is_remembered(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.document = delta(content="one") + DONE
    talk = Talk(server.client(), "m", "be brief", {"max_tokens": 9}, quiet=True)
    talk.ask("first")
    server.document = delta(content="tw")  # and then it breaks off
    with pytest.raises(Failed, match=r"cut.*`llamesh why chat-\w+-2` may tell more"):
        talk.ask("second")
    server.document = delta(content="three\n") + DONE
    talk.ask("third")
    *_, last = (sent for _, _, _, sent in server.asked)
    assert [(one["role"], one["content"]) for one in last["messages"]] == [
        ("system", "be brief"),
        ("user", "first"),
        ("assistant", "one"),
        ("user", "second"),
        ("assistant", "tw"),
        ("user", "third"),
    ]
    assert last["max_tokens"] == 9
    [session] = {headers["x-session-id"] for _, _, headers, _ in server.asked}
    ids = [headers["x-request-id"] for _, _, headers, _ in server.asked]
    assert ids == [f"{session}-{turn}" for turn in (1, 2, 3)]
    assert capsys.readouterr().out == "one\ntw\nthree\n"


def test_what_is_refused_leaves_no_trace(server: Server) -> None:
    server.status, server.document = 503, {"error": {"message": "full", "type": "queue_full"}}
    talk = Talk(server.client(), "m", None, {}, quiet=True)
    with pytest.raises(Failed, match=r"full.*llamesh why") as caught:
        talk.ask("hi")
    assert not isinstance(caught.value, Refused)
    assert talk.said == []


@pytest.mark.parametrize(
    ("words", "stdin", "question"),
    [
        (["chat", "m", "hi"], "", "hi"),
        (["chat", "m"], "text\nof two lines\n", "text\nof two lines"),
        (["chat", "m", "Review:"], "a diff\n", "Review:\n\na diff"),
    ],
)
def test_one_answer_for_scripts(server: Server, words: list[str], stdin: str, question: str) -> None:
    server.document = delta(reasoning_content="hm") + delta(content="a\x1b[1mb") + DONE
    done = call(server, *words, "-q", stdin=stdin)
    # A pipe gets what the model said, byte for byte.
    assert (done.exit_code, done.output) == (0, "a\x1b[1mb\n")
    [(_, _, _, sent)] = server.asked
    assert sent["messages"] == [{"role": "user", "content": question}]
