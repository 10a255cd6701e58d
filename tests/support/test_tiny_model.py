"""The tiny model keeps its promises, on every engine there is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.support.engine import serving
from tests.support.node import CHECKOUT
from tests.support.tiny_model import byte_alphabet, write_tiny_model


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    first = write_tiny_model(tmp_path / "a.gguf").read_bytes()
    again = write_tiny_model(tmp_path / "deeper" / "b.gguf").read_bytes()
    other = write_tiny_model(tmp_path / "c.gguf", seed=2).read_bytes()
    assert first == again
    assert first != other
    assert len(first) == len(other) < 400_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "c.gguf", "deeper"]


def test_every_byte_has_its_own_stand_in() -> None:
    alphabet = byte_alphabet()
    assert len(set(alphabet)) == 256
    assert alphabet[ord("a")] == "a"
    assert alphabet[ord(" ")] == "Ġ"


def test_it_can_be_written_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "by-hand.gguf"
    command = [sys.executable, "-m", "tests.support.tiny_model", str(path), "--context", "1024"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(path)
    assert path.read_bytes().startswith(b"GGUF")


def test_it_chats_one_character_a_token_and_never_ends_early(
    tiny_model: Path, engine_binary: Path | None
) -> None:
    with serving(tiny_model, "-c", "1024", binary=engine_binary) as engine:
        chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 40, "temperature": 1.5}
        reply = engine.ask("/v1/chat/completions", chat)
        text = reply["choices"][0]["message"]["content"]
        assert len(text) == reply["usage"]["completion_tokens"] == 40
        assert text.isalnum()
        assert text.isascii()
        assert reply["choices"][0]["finish_reason"] == "length"
        greedy = {"prompt": "The same", "max_tokens": 30, "temperature": 0}
        texts = [engine.ask("/v1/completions", greedy)["choices"][0]["text"] for _ in range(2)]
        assert texts[0] == texts[1]
        assert len(texts[0]) == 30


def test_it_streams_an_event_a_token(tiny_model: Path, engine_binary: Path | None) -> None:
    with serving(tiny_model, "-c", "1024", binary=engine_binary) as engine:
        asked = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 25, "stream": True}
        with engine.client.stream("POST", "/v1/chat/completions", json=asked) as reply:
            lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
        assert lines.pop() == "[DONE]"
        events = [json.loads(line) for line in lines]
        words = [event["choices"][0]["delta"].get("content") for event in events if event["choices"]]
        assert [len(word) for word in words if word] == [1] * 25
        assert events[-1]["timings"]["predicted_n"] == 25


def test_it_embeds(tiny_model: Path, engine_binary: Path | None) -> None:
    with serving(tiny_model, "--embedding", "--pooling", "mean", binary=engine_binary) as engine:
        data = engine.ask("/v1/embeddings", {"input": ["one", "another"]})["data"]
        vectors = [entry["embedding"] for entry in data]
        assert [len(vector) for vector in vectors] == [64, 64]
        assert vectors[0] != vectors[1]


def test_it_reranks(tiny_model: Path, engine_binary: Path | None) -> None:
    with serving(tiny_model, "--reranking", binary=engine_binary) as engine:
        reply = engine.ask("/v1/rerank", {"query": "one", "documents": ["one", "another"]})
        assert {entry["index"] for entry in reply["results"]} == {0, 1}


def test_its_context_can_be_chosen(tmp_path: Path, engine_binary: Path | None) -> None:
    model = write_tiny_model(tmp_path / "short.gguf", context=512)
    with serving(model, "-c", "0", binary=engine_binary) as engine:
        assert engine.client.get("/props").json()["default_generation_settings"]["n_ctx"] == 512
