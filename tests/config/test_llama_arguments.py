"""llama_server_args: what llamesh reads of them, and that everything else stays as it was."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamesh.config.arguments import FromArguments, read_arguments


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ()),
        ("  -c 4096\n--parallel   2 ", ("-c", "4096", "--parallel", "2")),
        ("--alias 'a b' --x \"c 'd'\" e\\ f", ("--alias", "a b", "--x", "c 'd'", "e f")),
        ("--override-kv a=int:1 --log-prefix # c", ("--override-kv", "a=int:1", "--log-prefix", "#", "c")),
        ("--unknown=1 -x=2", ("--unknown=1", "-x=2")),
    ],
)
def test_words_are_a_shell_s_words(text: str, words: tuple[str, ...]) -> None:
    read = read_arguments(text)
    assert (read.words, read.complaints) == (words, ())


@pytest.mark.parametrize(
    "flag",
    [
        "-m",
        "--model",
        "-mu",
        "--model-url",
        "--model_url",
        "-dr",
        "--docker-repo",
        "-hf",
        "-hfr",
        "--hf-repo",
    ],
)
def test_flags_that_name_the_model(flag: str) -> None:
    read = read_arguments(f"-c 1 {flag} x/y -ngl 2")
    assert read.sources == (FromArguments(flag, "x/y"),)
    assert read.words == ("-c", "1", flag, "x/y", "-ngl", "2")
    for broken in (flag, f"{flag} -c 1"):
        assert [complaint.message for complaint in read_arguments(broken).complaints] == [
            f"{flag} has no value"
        ]


@pytest.mark.parametrize(
    "flag",
    ["--gpt-oss-20b-default", "--fim-qwen-1.5b-default", "--vision-gemma-4b-default", "--embd-gemma-default"],
)
def test_presets_name_the_model_without_a_value(flag: str) -> None:
    read = read_arguments(f"{flag} -c 1")
    assert read.sources == (FromArguments(flag, ""),)
    assert read.kind == ("embedding" if flag.startswith("--embd") else "text")


@pytest.mark.parametrize(
    "text", ["--spec-default", "-md draft.gguf", "-hfd a/b", "--mmproj x", "-c -m", "--M x"]
)
def test_other_flags_do_not(text: str) -> None:
    assert read_arguments(text).sources == ()


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("-c 1", "text"),
        ("--embedding", "embedding"),
        ("-c 1 --embeddings", "embedding"),
        ("--rerank", "rerank"),
        ("--reranking", "rerank"),
        ("--embedding --reranking --pooling rank", "rerank"),
    ],
)
def test_kinds(text: str, kind: str) -> None:
    assert read_arguments(text).kind == kind


def test_the_api_key_is_taken_out() -> None:
    for text in ("-c 1 --api-key k-1 -ngl 2", "-c 1 --api_key k-1 -ngl 2"):
        read = read_arguments(text)
        assert (read.words, read.api_key) == (("-c", "1", "-ngl", "2"), "k-1")
        assert "k-1" not in repr(read)
    read = read_arguments("--api-key-file f")
    assert (read.words, read.api_key) == (("--api-key-file", "f"), None)
    assert read_arguments("--api-key -starts-with-a-dash").api_key == "-starts-with-a-dash"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("'a", "a quote isn't closed"),
        ('a "b', "a quote isn't closed"),
        ("a \\", "a backslash at the end escapes nothing"),
        ("a \x07b", "holds a control character"),
        ("--model=m", "llama-server doesn't take --model=VALUE"),
        ("--hf_repo=m", "llama-server doesn't take --hf-repo=VALUE"),
        ("-c=4096", "llama-server doesn't take -c=VALUE"),
        ("--port=1", "llama-server doesn't take --port=VALUE"),
        ("--api-key=k", "llama-server doesn't take --api-key=VALUE"),
        ("--api-key", "--api-key has no value"),
        ("--api-key a,b", "--api-key names more than one key"),
        ("--api-key a --api-key b", "--api-key names more than one key"),
        ("--api-key 'a b'", "--api-key can't travel in a header"),
        ("--api-key ''", "--api-key can't travel in a header"),
        ("-hff f.gguf", "-hff has no -hf beside it"),
    ],
)
def test_complaints(text: str, message: str) -> None:
    (complaint,) = read_arguments(text).complaints
    assert complaint.message == message
    assert complaint.hint


@given(st.text(max_size=40))
def test_any_text_is_read_without_an_exception(text: str) -> None:
    read_arguments(text)


@given(st.lists(st.text(alphabet="abc -'\"\\=/€", max_size=6).map(lambda word: "x" + word), max_size=6))
def test_what_a_shell_would_quote_comes_back_whole(words: list[str]) -> None:
    assert read_arguments(shlex.join(words)).words == tuple(words)
