"""A profile's `llama_server_args`: split like a shell, and read for the little that llamesh must know.

Everything else passes to llama-server as it is; that program knows its flags best.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Kind = Literal["text", "embedding", "rerank"]

# llama.cpp, common/arg.cpp: the flags that say which model to load, with a value ...
_SOURCE_FLAGS = frozenset(
    {"-m", "--model", "-mu", "--model-url", "-dr", "--docker-repo", "-hf", "-hfr", "--hf-repo"}
)
_HUB_FLAGS = frozenset({"-hf", "-hfr", "--hf-repo"})
_HUB_FILE_FLAGS = frozenset({"-hff", "--hf-file"})
# ... and the presets that name one of llama.cpp's own choice (`--gpt-oss-20b-default`).
_PRESET = re.compile(r"--(embd|fim|gpt-oss|vision)-[a-z0-9.-]+-default")
_EMBEDDING_FLAGS = frozenset({"--embedding", "--embeddings"})
_RERANK_FLAGS = frozenset({"--rerank", "--reranking"})
_API_KEY = "--api-key"
# Read here or where the child's command line is put together: written with `=`, they would be missed.
_INTERPRETED = (
    _SOURCE_FLAGS
    | _HUB_FILE_FLAGS
    | _EMBEDDING_FLAGS
    | _RERANK_FLAGS
    | {_API_KEY, "-c", "--ctx-size", "--fit", "--host", "--port", "-np", "--parallel"}
)


class Complaint(NamedTuple):
    """What is wrong with the arguments, and what would be right."""

    message: str
    hint: str


@dataclass(frozen=True, slots=True)
class FromArguments:
    """The model is named by a flag among the arguments, as written there; presets have no value."""

    flag: str
    value: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """The arguments without `--api-key K`, and what they say. `complaints` empty: usable."""

    words: tuple[str, ...] = ()
    sources: tuple[FromArguments, ...] = ()
    kind: Kind = "text"
    api_key: str | None = field(default=None, repr=False)
    complaints: tuple[Complaint, ...] = ()


def read_arguments(text: str) -> Arguments:
    """Split and read the arguments. Never raises: what is wrong is in `complaints`, without values."""
    try:
        words = shlex.split(text)
    except ValueError:
        # shlex says "No closing quotation" or "No escaped character".
        message = "a backslash at the end escapes nothing" if text.endswith("\\") else "a quote isn't closed"
        return Arguments(
            complaints=(Complaint(message, "close it, or escape a literal one with a backslash"),)
        )
    if any(ord(letter) < 32 and letter not in "\t\n" for word in words for letter in word):
        return Arguments(complaints=(Complaint("holds a control character", "plain text"),))
    return _read(words)


def _read(words: list[str]) -> Arguments:
    kept: list[str] = []
    sources: list[FromArguments] = []
    complaints: list[Complaint] = []
    seen: set[str] = set()
    keys: list[str] = []
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        # llama-server takes --hf_repo for --hf-repo.
        flag = word.replace("_", "-") if word.startswith("--") else word
        name, equals, _ = flag.partition("=")
        if equals and name in _INTERPRETED:
            complaints.append(
                Complaint(f"llama-server doesn't take {name}=VALUE", f"{name} VALUE, with a blank")
            )
            continue
        seen.add(flag)
        if flag == _API_KEY:
            if position == len(words):
                complaints.append(Complaint(f"{flag} has no value", f"{flag} KEY"))
            keys += words[position : position + 1]
            position += 1
        elif flag in _SOURCE_FLAGS:
            if position == len(words) or words[position].startswith("-"):
                complaints.append(Complaint(f"{word} has no value", f"{word} and the model after it"))
                kept.append(word)
                continue
            sources.append(FromArguments(word, words[position]))
            kept += [word, words[position]]
            position += 1
        else:
            if _PRESET.fullmatch(flag):
                sources.append(FromArguments(word, ""))
                if flag.startswith("--embd-"):
                    seen.add("--embedding")  # the preset switches it on as well
            kept.append(word)
    if seen & _HUB_FILE_FLAGS and not seen & _HUB_FLAGS:
        complaints.append(
            Complaint("-hff has no -hf beside it", "give the file as `hf_file:` beside `hf_repo:`")
        )
    complaints += _key_complaints(keys)
    kind: Kind = "rerank" if seen & _RERANK_FLAGS else "embedding" if seen & _EMBEDDING_FLAGS else "text"
    return Arguments(tuple(kept), tuple(sources), kind, keys[0] if keys else None, tuple(complaints))


def _key_complaints(keys: list[str]) -> list[Complaint]:
    if len(keys) > 1 or any("," in key for key in keys):
        return [
            Complaint(f"{_API_KEY} names more than one key", "one key: only this node calls the instance")
        ]
    # It goes into an HTTP header towards the instance.
    if any(not key or not key.isascii() or not key.isprintable() or " " in key for key in keys):
        return [Complaint(f"{_API_KEY} can't travel in a header", "printable ASCII without blanks")]
    return []
