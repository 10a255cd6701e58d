"""Which model a request means, and that nothing else of its body is looked at."""

from __future__ import annotations

import contextlib
import tracemalloc
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamesh.config.cookbook import Cookbook, load_cookbook
from llamesh.errors import InvalidRequest, LlameshError, ModelNotFound
from llamesh.web.openai import ROUTES, Wish, choose_profile, read_wish

JSON = b"application/json"


def form(*fields: tuple[str, bytes], boundary: str = "xx") -> tuple[bytes, bytes]:
    """Content type and body of a form."""
    parts = [
        b'--%b\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n'
        % (boundary.encode(), name.encode(), b'; filename="a.wav"' if name == "file" else b"", value)
        for name, value in fields
    ]
    body = b"".join(parts) + b"--%b--\r\n" % boundary.encode()
    return f"multipart/form-data; boundary={boundary}".encode(), body


@pytest.mark.parametrize(
    ("body", "query", "wish"),
    [
        (b'{"model": "m"}', b"", Wish("m", False)),
        (b'{"model":"m","stream":true}', b"", Wish("m", True)),
        (b'{"stream" : true , "model":"m"}', b"", Wish("m", True)),
        (b'{"model":"m","stream":false}', b"", Wish("m", False)),
        (b'{"model":"m","stream":"true"}', b"", Wish("m", False)),
        (b'{"model":"m","stream":1}', b"", Wish("m", False)),
        (b'{"model":"m","stream":null}', b"", Wish("m", False)),
        (b"{}", b"", Wish(None, False)),
        (b"{}", b"model=a%3Ab", Wish("a:b", False)),
        (b"{}", b"x=1&model=m&model=n", Wish("m", False)),
        (b"{}", b"model=", Wish(None, False)),
        (b'{"model":"m"}', b"model=n", Wish("m", False)),
        (b'{"model":"m\\u00e4\\ud83d\\ude00"}', b"", Wish("mä😀", False)),
        ('{"model":"mä"}'.encode(), b"", Wish("mä", False)),
        (b'{"mod\\u0065l":"m"}', b"", Wish("m", False)),
        (b'{"model":"a","model":"b"}', b"", Wish("b", False)),
        (b'{"messages":[{"model":"x","stream":true}],"model":"m"}', b"", Wish("m", False)),
        (b' \r\n\t{"model":"m"}\n', b"", Wish("m", False)),
    ],
)
def test_wishes(body: bytes, query: bytes, wish: Wish) -> None:
    assert read_wish(JSON, query, body) == wish
    assert read_wish(b"", query, memoryview(body)) == wish


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"x", None),
        (b"[]", None),
        (b'"model"', None),
        (b"null", None),
        (b'{"model":"m"', None),
        (b'{"model":"m"}}', None),
        (b'{"model":"m"}{"model":"n"}', None),
        (b"{'model':'m'}", None),
        (b'\xef\xbb\xbf{"model":"m"}', None),
        (b'{"model":m}', None),
        (b'{"model":null}', "model"),
        (b'{"model":5}', "model"),
        (b'{"model":["m"]}', "model"),
        (b'{"model":{"id":"m"}}', "model"),
        (b'{"model":true}', "model"),
        (b'{"model":""}', "model"),
        (b'{"model":"\\ud83d"}', None),
        (b'{"model":"\xff\xfe"}', "model"),
    ],
)
def test_bodies_that_are_refused(body: bytes, param: str | None) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_wish(JSON, b"model=n", body)
    if param is not None:
        assert caught.value.param == param


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_deep_nesting_is_refused_without_a_crash(opening: bytes) -> None:
    with pytest.raises(InvalidRequest):
        read_wish(JSON, b"", b'{"x":' + opening * 100_000)


def test_too_many_fields_in_a_query() -> None:
    with pytest.raises(InvalidRequest):
        read_wish(JSON, b"model=m" + b"&a=b" * 100, b"{}")


def test_an_image_is_not_made_into_objects() -> None:
    image = b'{"messages":[{"content":[{"url":"data:image/png;base64,%b"}]}],"model":"m"}' % (
        b"A" * 20_000_000
    )
    pieces = b'{"messages":[' + b",".join([b'{"role":"user","content":"x"}'] * 100_000) + b'],"model":"m"}'
    for body in (image, pieces):
        view = memoryview(body)
        tracemalloc.start()
        try:
            assert read_wish(JSON, b"", view) == Wish("m", False)
            assert tracemalloc.get_traced_memory()[1] < 200_000
        finally:
            tracemalloc.stop()


@given(st.binary(max_size=80) | st.text(alphabet='{}[]":, modelstra1', max_size=60).map(str.encode))
def test_random_bodies_are_read_or_refused(body: bytes) -> None:
    for content_type in (JSON, b"multipart/form-data; boundary=x"):
        with contextlib.suppress(InvalidRequest):
            read_wish(content_type, b"", body)


# Forms.


def test_a_form() -> None:
    assert read_wish(form()[0], b"model=q", form(("model", b"m"), ("stream", b"true"))[1]) == Wish("m", True)
    assert read_wish(form()[0], b"model=q", form(("language", b"en"))[1]) == Wish("q", False)


def test_the_model_may_stand_behind_a_large_file() -> None:
    content_type, body = form(("file", b"RIFF\r\n--x" * 500_000), ("model", "mä".encode()))
    read_wish(*form()[:1], b"", form()[1])  # what it imports isn't meant
    tracemalloc.start()
    try:
        assert read_wish(content_type, b"", memoryview(body)) == Wish("mä", False)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_the_last_of_two_models_counts() -> None:
    content_type, body = form(("model", b"a"), ("model", b"b"))
    assert read_wish(content_type, b"", body).model == "b"


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        (b"multipart/form-data; charset=x", form()[1]),
        (b"multipart/form-data; boundary*=utf-8''%E2%82%AC", form()[1]),
        (form()[0], b""),
        (form()[0], b"nonsense"),
        (form()[0], form(("model", b"m"))[1][:-8]),
        (form()[0], form(("model", b""))[1]),
        form(*[(f"f{number}", b"x") for number in range(100)]),
    ],
)
def test_forms_that_are_refused(content_type: bytes, body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        read_wish(content_type, b"", body)


# Profiles.


@pytest.fixture
def cookbook(tmp_path: Path) -> Cookbook:
    def profile(name: str, flags: str = "") -> dict[str, str]:
        return {"id": name, "model_path": "/m.gguf", "llama_server_args": flags}

    models = [
        {"name": "Text", "aliases": ["gpt"], "profiles": [profile("default"), profile("fast")]},
        {"name": "vec", "profiles": [profile("default", "--embedding")]},
        {"name": "rank", "profiles": [profile("default", "--reranking")]},
    ]
    path = tmp_path / "cookbook.yaml"
    path.write_bytes(msgspec.json.encode({"models": models}))
    return load_cookbook(path)


@pytest.mark.parametrize(
    ("path", "name", "found"),
    [
        (b"/v1/chat/completions", "text", "Text:default"),
        (b"/v1/chat/completions", "TEXT:FAST", "Text:fast"),
        (b"/v1/messages", "gpt", "Text:default"),
        (b"/v1/chat/completions", None, "Text:fast"),
        (b"/v1/embeddings", "vec", "vec:default"),
        (b"/rerank", "rank", "rank:default"),
        (b"/tokenize", "vec", "vec:default"),
        (b"/tokenize", "text", "Text:default"),
        (b"/v1/chat/completions", "nobody", ModelNotFound),
        (b"/v1/chat/completions", "text:nobody", ModelNotFound),
        (b"/v1/chat/completions", "x" * 1_000_000, ModelNotFound),
        (b"/v1/chat/completions", "vec", InvalidRequest),
        (b"/v1/completions", "rank", InvalidRequest),
        (b"/v1/embeddings", "text", ModelNotFound),
        (b"/v1/rerank", "vec", ModelNotFound),
    ],
)
def test_profiles(cookbook: Cookbook, path: bytes, name: str | None, found: str | type[LlameshError]) -> None:
    wish, route = Wish(name, False), ROUTES[path]
    if isinstance(found, str):
        assert choose_profile(cookbook.find, wish, route, "text:fast", "n").key == found
        return
    with pytest.raises(found) as caught:
        choose_profile(cookbook.find, wish, route, "text:fast", "n")
    assert caught.value.param == "model"
    assert len(caught.value.message) < 400


def test_no_model_and_no_default(cookbook: Cookbook) -> None:
    with pytest.raises(InvalidRequest, match="default_model"):
        choose_profile(cookbook.find, Wish(None, False), ROUTES[b"/infill"], None, "n")


@pytest.mark.parametrize(
    ("more", "answers"),
    [
        ("", 1),
        (', "n": 3', 3),
        (', "n": 3.0', 3),
        (', "n": null, "n_cmpl": 2', 2),
        (', "n": 3, "n_cmpl": 2', 2),
        (', "n": "3"', 1),
        (', "n": -3', 1),
        (', "n": 1e400', 1),
        (', "n": 1e9', 1024),
        (', "prompt": "a"', 1),
        (', "prompt": []', 1),
        (', "prompt": ["a", "b"]', 2),
        (', "prompt": [ [1, 2], [3], "a", {"prompt_string": "b"}]', 4),
        (', "prompt": [1, 2, 3]', 1),
        (', "prompt": ["a", 2]', 1),
        (', "prompt": ["a", "b"], "n": 2', 4),
    ],
)
def test_how_many_answers_are_wanted(more: str, answers: int) -> None:
    """llama-server tells the tokens of one of them: by many in one request, limits could be passed by."""
    body = f'{{"model": "m"{more}}}'.encode()
    assert read_wish(b"application/json", b"", body).answers == answers
