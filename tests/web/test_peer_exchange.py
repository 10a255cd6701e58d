"""The headers between peers: what is written is read, and what isn't right is refused."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamesh.dispatch.lease import Travel
from llamesh.errors import InvalidRequest, ModelNotFound, QueueFull
from llamesh.net.exchange import Headers
from llamesh.web.peer_exchange import PeerRefused, heard_attempts, peer_headers, read_travel, refused

IDS = st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True)
NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=80)


@given(
    origin=IDS,
    via=st.lists(IDS, max_size=20, unique=True),
    hops=st.integers(1, 1000),
    attempt=st.integers(0, 5),
    wait=st.none() | st.floats(0, 1e9),
    deadline=st.none() | st.floats(1, 1e9),
    model=NAMES,
    fingerprint=NAMES,
)
def test_what_is_told_is_heard(
    origin: str, via: list[str], hops: int, attempt: int, wait: float | None, deadline: float | None,
    model: str, fingerprint: str,
) -> None:  # fmt: skip
    path = (*[one for one in via if one != origin], origin)
    sent = Travel(
        "", hops, path, attempt, wait, deadline, model, fingerprint.encode("utf-8", "ignore").decode()
    )
    headers = peer_headers(sent)
    assert all(value.isascii() and not set(value) & set(b"\r\n\0") for _, value in headers)
    heard = read_travel(headers, origin)
    assert (heard.origin, heard.hops, heard.via, heard.attempt) == (origin, hops, path, attempt)
    assert (heard.model, heard.fingerprint) == (sent.model, sent.fingerprint)
    for told, got in ((wait, heard.max_wait_ms), (deadline, heard.deadline_ms)):
        assert (told is None) == (got is None)
        assert told is None or got is None or told - 1 < got <= told


def test_a_plain_request_of_a_peer() -> None:
    assert read_travel([], "b") == Travel("b", 1, ("b",))


def test_who_sent_it_is_always_part_of_the_way() -> None:
    """Else a peer could make a loop by leaving itself out."""
    assert read_travel([(b"x-llamesh-via", b"a,c")], "b").via == ("a", "c", "b")
    assert read_travel([(b"x-llamesh-via", b"a,b")], "b").via == ("a", "b")
    assert read_travel([(b"x-llamesh-via", b",,")], "b").via == ("b",)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"x-llamesh-via", b"a b"),
        (b"x-llamesh-via", b"a" * 65),
        (b"x-llamesh-via", b"\xff"),
        (b"x-llamesh-via", b"a\n"),
        (b"x-llamesh-via", b",".join(b"n%d" % n for n in range(65))),
        (b"x-llamesh-attempt", b"-1"),
        (b"x-llamesh-attempt", b"1.5"),
        (b"x-llamesh-max-wait-ms", b""),
        (b"x-llamesh-max-wait-ms", b"\xb2"),
        (b"x-llamesh-deadline-ms", b"9" * 13),
        (b"x-llama-mesh-hops", b"one"),
        (b"x-llamesh-model", b"m" * 9000),
        (b"x-llamesh-fingerprint", b"f" * 9000),
    ],
)
def test_headers_that_are_refused(name: bytes, value: bytes) -> None:
    with pytest.raises(InvalidRequest):
        read_travel([(name, value)], "b")


def test_large_numbers_are_cut() -> None:
    travel = read_travel([(b"x-llamesh-deadline-ms", b"9" * 12), (b"x-llamesh-attempt", b"9" * 12)], "b")
    assert travel.deadline_ms == 31 * 86400 * 1000
    assert travel.attempt == 1000


@pytest.mark.parametrize(
    ("status", "kind", "others"),
    [
        (503, "queue_full", True), (503, "queue_timeout", True), (503, "no_capacity", True),
        (503, "draining", True), (503, "spawn_failures_exhausted", True), (404, "model_not_found", True),
        (502, "upstream_error", False), (504, "request_timeout", False),
        (400, "invalid_request_error", False), (500, "internal_error", False),
        (200, "queue_full", False), (503, "\xff", False),
    ],
)  # fmt: skip
def test_after_what_others_are_asked(status: int, kind: str, others: bool) -> None:
    headers: Headers = [(b"x-llamesh-error", kind.encode("latin-1"))]
    assert refused(status, headers) == (kind if others else "")
    # What its llama-server says is an answer.
    assert refused(status, [(b"content-type", b"application/json")]) == ""


def test_a_refusal_keeps_its_words() -> None:
    loading = {"model": "m", "state": "loading"}
    body = msgspec.json.encode({"error": {"message": "b is full"}, "loading": loading})
    error = PeerRefused("b", "queue_full", body, 1)
    assert isinstance(error.face, QueueFull)
    assert (error.face.message, error.face.retry_after, error.broken) == ("b is full", 5, 1)
    assert error.face.document()["loading"] == loading


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b"[]", b'{"error": "x"}', b'{"error": {"message": 5}}', b"[" * 9000]
)
def test_a_refusal_without_words(body: bytes) -> None:
    error = PeerRefused("b", "model_not_found", body)
    assert isinstance(error.face, ModelNotFound)
    assert error.face.message == "node b refused it (model_not_found)"


def test_a_long_story_is_cut() -> None:
    body = msgspec.json.encode({"error": {"message": "x" * 60_000}})
    assert len(PeerRefused("b", "queue_full", body).face.message) == 2000


def test_attempts_in_an_answer() -> None:
    assert heard_attempts([(b"x-llamesh-attempt", b"2")]) == 2
    assert heard_attempts([(b"x-llamesh-attempt", b"99999999999999999999")]) == 1000
    for value in (b"", b"-1", b"x", b"\xb2"):
        assert heard_attempts([(b"x-llamesh-attempt", value)]) == 0
