"""The inference routes: which paths there are, what each needs, and which model a body asks for.

Only what routing needs is decoded. msgspec skips over the rest (messages, images) without making
objects of it; it still checks that the whole is JSON, so llama-server never sees half of a body.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal
from urllib.parse import parse_qs

import msgspec

from llamesh.config.cookbook import Profile
from llamesh.core.cost import Features
from llamesh.core.prefixes import NOTHING, SHORTEST, Prefix, prefix_of
from llamesh.errors import InvalidRequest, ModelNotFound
from llamesh.web.body import Body

Needs = Literal["text", "embedding", "rerank", "any"]


@dataclass(frozen=True, slots=True)
class Route:
    """One inference path. `upstream`: the path that llama-server knows it by."""

    needs: Needs
    upstream: bytes
    dialect: Literal["openai", "anthropic"] = "openai"


def _routes() -> Iterator[tuple[bytes, Route]]:
    for path in (b"/v1/chat/completions", b"/v1/completions", b"/v1/responses", b"/infill"):
        yield path, Route("text", path)
    yield b"/v1/audio/transcriptions", Route("text", b"/v1/audio/transcriptions")
    yield b"/v1/messages", Route("text", b"/v1/messages", "anthropic")
    yield b"/v1/messages/count_tokens", Route("any", b"/v1/messages/count_tokens", "anthropic")
    yield b"/v1/embeddings", Route("embedding", b"/v1/embeddings")
    for path in (b"/v1/rerank", b"/v1/reranking", b"/rerank"):
        yield path, Route("rerank", b"/v1/rerank")
    for path in (b"/tokenize", b"/detokenize", b"/apply-template"):
        yield path, Route("any", path)


ROUTES: dict[bytes, Route] = dict(_routes())


class _Wanted(msgspec.Struct):
    """The members of a body that routing reads; `Raw` keeps even those undecoded until looked at."""

    model: msgspec.Raw = msgspec.Raw(b"")
    stream: msgspec.Raw = msgspec.Raw(b"")
    max_tokens: msgspec.Raw = msgspec.Raw(b"")
    max_completion_tokens: msgspec.Raw = msgspec.Raw(b"")
    messages: msgspec.Raw = msgspec.Raw(b"")
    prompt: msgspec.Raw = msgspec.Raw(b"")
    input: msgspec.Raw = msgspec.Raw(b"")
    tools: msgspec.Raw = msgspec.Raw(b"")
    n: msgspec.Raw = msgspec.Raw(b"")
    n_cmpl: msgspec.Raw = msgspec.Raw(b"")
    system: msgspec.Raw = msgspec.Raw(b"")
    instructions: msgspec.Raw = msgspec.Raw(b"")
    prompt_cache_key: msgspec.Raw = msgspec.Raw(b"")
    session_id: msgspec.Raw = msgspec.Raw(b"")


_decode_prompts = msgspec.json.Decoder(list[str | list[Any] | dict[str, Any]]).decode
_decode = msgspec.json.Decoder(_Wanted).decode


@dataclass(frozen=True, slots=True)
class Wish:
    """What a request says of itself: `model` as written, None when it names none; `max_tokens`: the longest
    answer that it takes, 0 when it doesn't say; `answers`: how many of them it wants. `wanted`: what else was
    in its body, None for a form.
    """

    model: str | None
    streams: bool
    max_tokens: int = 0
    wanted: _Wanted | None = field(default=None, compare=False, repr=False)
    answers: int = 1


def read_wish(content_type: bytes, query: bytes, body: bytes | memoryview) -> Wish:
    """Read model and stream from a body (JSON, or a form) or from `?model=`. Raises InvalidRequest."""
    if content_type[:20].lower() == b"multipart/form-data;":
        fields = _form_fields(content_type, body)
        model = fields.get("model")
        if model == "":
            raise InvalidRequest("`model` is empty; name a model of GET /v1/models", param="model")
        return Wish(model or _from_query(query), fields.get("stream") == "true")
    try:
        wanted = _decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the request body isn't a JSON object: {error}") from None
    # A Raw equals no bytes object, whatever it holds.
    model_json, streams = bytes(wanted.model), bytes(wanted.stream) == b"true"
    limit = bytes(wanted.max_tokens) or bytes(wanted.max_completion_tokens)
    most = int(limit) if limit.isdigit() and len(limit) < 10 else 0
    answers = _answers(wanted)
    if not model_json:
        return Wish(_from_query(query), streams, most, wanted, answers)
    try:
        model = msgspec.json.decode(model_json)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"`model` can't be read: {error}", param="model") from None
    if not isinstance(model, str) or not model:
        what = "null" if model is None else "empty" if model == "" else "not text"
        raise InvalidRequest(f"`model` is {what}; name a model of GET /v1/models", param="model")
    return Wish(model, streams, most, wanted, answers)


# More than anybody's slots have; what is above is refused by llama-server.
_MOST_CHOICES = 1024


def _answers(wanted: _Wanted) -> int:
    """How many answers llama-server makes of it: `n` for each of the prompts, where `prompt` is a list of
    them. (A list with a number in it is one prompt.)
    """
    prompts = choices = 1
    count = bytes(wanted.n_cmpl) or bytes(wanted.n)
    if count and count != b"null":
        with suppress(ValueError, OverflowError):
            choices = max(1, min(int(float(count)), _MOST_CHOICES))
    if len(wanted.prompt) and bytes(memoryview(wanted.prompt)[:1]) == b"[":
        with suppress(msgspec.MsgspecError):
            prompts = max(1, len(_decode_prompts(wanted.prompt)))
    return prompts * choices


# What clients call the conversation that a request belongs to. (`user` is a person, not a conversation.)
SESSION_HEADERS = frozenset(
    [
        b"x-session-id",
        b"x-conversation-id",
        b"x-openwebui-chat-id",
        b"x-claude-code-session-id",
        b"x-session-affinity",
    ]
)
_LONGEST_SESSION = 256


def read_prefix(wish: Wish, route: Route, key: str, session: bytes) -> Prefix:
    """How the prompt for "model:profile" begins. `session`: what its conversation is called in a header."""
    wanted = wish.wanted
    if wanted is None or route.needs != "text":
        return NOTHING
    if not session and (len(wanted.prompt_cache_key) or len(wanted.session_id)):
        session = bytes(wanted.prompt_cache_key) or bytes(wanted.session_id)
        session = b"" if session in (b"null", b'""') else session
    opening = [one for one in (wanted.tools, wanted.system, wanted.instructions) if len(one)]
    prompt = (
        wanted.messages if len(wanted.messages) else wanted.prompt if len(wanted.prompt) else wanted.input
    )
    if not session and not opening and len(prompt) < SHORTEST:
        return NOTHING  # the hot path
    named = session if len(session) <= _LONGEST_SESSION else b""
    return prefix_of(key, [memoryview(one) for one in opening], memoryview(prompt), named)


# Of English text a token has four bytes of JSON or so.
_BYTES_PER_TOKEN = 4

# No picture worth sending fits into this.
_SURELY_TEXT = 4096
_COLD: Mapping[str, float] = MappingProxyType({})
_NO_TOKENS: Mapping[str, int] = MappingProxyType({})
_NOT_TEXT = (b'"image_url"', b'"input_audio"', b'"input_image"')


def read_features(
    wish: Wish, route: Route, body: Body, number: int, warm: Mapping[str, float] = _COLD
) -> Features:
    """What placement needs to know of a request: a guess at its prompt's tokens from the length of the
    body, 0 where that says nothing, and the most that it wants to have written. `warm`: by node, which share
    of the prompt is in the cache there.
    """
    data = body.view()
    # What was spooled is rather an image or a recording.
    is_text = isinstance(data, bytes) and data.startswith(b"{")
    if is_text and len(data) > _SURELY_TEXT:
        is_text = not any(mark in data for mark in _NOT_TEXT)
    tokens = body.length // _BYTES_PER_TOKEN if is_text else 0
    # What doesn't write has no answer to wait for; 1 is as good as none and is not "unknown".
    output = wish.max_tokens if route.needs == "text" else 1
    cached = {node: int(share * tokens) for node, share in warm.items()} if warm else _NO_TOKENS
    return Features(prompt_tokens=tokens, output_tokens=output, cached=cached, number=number)


def choose_profile(
    find: Callable[[str], Profile | None], wish: Wish, route: Route, default: str | None, node: str
) -> Profile:
    """The profile that is meant; `find` knows them by name. Raises InvalidRequest or ModelNotFound."""
    name = wish.model or default
    if not name:
        raise InvalidRequest(
            "the request names no model and there is no default_model; add `model`, see GET /v1/models",
            param="model",
        )
    profile = find(name)
    if profile is None:
        shown = name if len(name) <= 120 else name[:120] + "…"
        raise ModelNotFound(f"node {node} knows no model {shown!r}; see GET /v1/models", param="model")
    if route.needs in ("any", profile.kind):
        return profile
    if route.needs == "text":
        raise InvalidRequest(
            f"{profile.public_name} is for {_PURPOSE[profile.kind]}; it can't answer on this path",
            param="model",
        )
    raise ModelNotFound(
        f"{profile.public_name} isn't set up for {_PURPOSE[route.needs]}: "
        f"that takes a profile with {_FLAG[route.needs]}",
        param="model",
    )


_PURPOSE = {"embedding": "embeddings", "rerank": "reranking", "text": "text"}
_FLAG = {"embedding": "--embedding", "rerank": "--reranking"}


def _from_query(query: bytes) -> str | None:
    if b"model=" not in query:
        return None
    try:
        values = parse_qs(query.decode("latin-1"), max_num_fields=64).get("model")
    except ValueError as error:
        raise InvalidRequest(f"malformed query: {error}") from None
    return values[0] if values else None


_FORM_PIECE = 65_536
_LONGEST_FIELD = 1024


def _form_fields(content_type: bytes, body: bytes | memoryview) -> dict[str, str]:
    """The short text fields of a form; files are passed over. Raises InvalidRequest."""
    from werkzeug.http import parse_options_header
    from werkzeug.sansio.multipart import Data, Epilogue, Field, MultipartDecoder, NeedData

    _, options = parse_options_header(content_type.decode("latin-1"))
    boundary = options.get("boundary")
    if not boundary:
        raise InvalidRequest("multipart/form-data without a boundary")
    fields: dict[str, bytes] = {}
    name: str | None = None
    try:
        decoder = MultipartDecoder(boundary.encode("latin-1"), max_parts=64)
        at = 0
        while True:
            event = decoder.next_event()
            if isinstance(event, Epilogue):
                return {name: value.decode("utf-8", "replace") for name, value in fields.items()}
            if isinstance(event, NeedData):
                # In pieces: a recording may have 100 MB, and the decoder copies what it is given.
                decoder.receive_data(bytes(body[at : at + _FORM_PIECE]) if at < len(body) else None)
                at += _FORM_PIECE
            elif isinstance(event, Field) and event.name in ("model", "stream"):
                name = event.name
                fields[name] = b""
            elif not isinstance(event, Data):
                name = None
            elif name is not None:
                fields[name] = (fields[name] + event.data)[:_LONGEST_FIELD]
    except (ValueError, RuntimeError) as error:
        raise InvalidRequest(f"malformed form: {error}") from None
    except Exception as error:
        # werkzeug reports limits as its own HTTP exceptions.
        raise InvalidRequest(f"malformed form: {type(error).__name__}") from None
