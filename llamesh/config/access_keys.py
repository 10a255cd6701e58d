"""An entry of `auth.allowed_keys` or `auth.admin_keys`: a key, or a mapping that says more about it."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

from llamesh.config.problems import Finding, shown
from llamesh.config.values import Count, Section, Text, listed, reject

#: More entries than this in one list are refused: each costs a comparison a request, and lines of metrics.
MOST_KEYS = 1000

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_HASHED = "sha256:"


def _api_key(value: Any) -> Any:
    # Checked before it becomes a secret. The messages never repeat it.
    text = value.get_secret_value() if isinstance(value, SecretStr) else value
    if not isinstance(text, str):
        raise reject("a key isn't text", "put it in quotes")
    if not text or not text.isascii() or not text.isprintable() or text != text.strip():
        raise reject("a key can't travel in a header", "printable ASCII, without blanks around it")
    if text.startswith(_HASHED) and not _SHA256.fullmatch(text.removeprefix(_HASHED)):
        raise reject("a hashed key isn't a SHA-256", "sha256: and 64 hexadecimal digits, or the key itself")
    return value


def _name(value: str) -> str:
    # Not repeated: somebody may have put the key here.
    if not _NAME.fullmatch(value):
        raise reject("isn't a name for a key", "1 to 64 letters, digits, `.`, `_` or `-`")
    return value


def _pattern(value: str) -> str:
    model, colon, profile = value.partition(":")
    if not model or ":" in profile or bool(colon) != bool(profile):
        hint = "`model` for all of its profiles, or `model:profile`; `*` stands for anything"
        raise reject(f"not the name of a model: {shown(value)}", hint)
    return value


Pattern = Annotated[Text, AfterValidator(_pattern)]


class AccessKey(Section):
    """Who may call, as what, for which models and how much. 0 means no limit of this kind.

    `models`: None for all; otherwise patterns of `model` (with all of its profiles) or `model:profile`.
    """

    name: Annotated[str, AfterValidator(_name)]
    key: Annotated[SecretStr, BeforeValidator(_api_key)]
    models: Annotated[tuple[Pattern, ...], BeforeValidator(listed), Field(min_length=1)] | None = None
    requests_per_minute: Count = 0
    requests_per_day: Count = 0
    tokens_per_minute: Count = 0
    tokens_per_day: Count = 0
    max_concurrent_requests: Count = 0

    def get_secret_value(self) -> str:
        """The key as it was written: itself, or `sha256:` and its digest."""
        return self.key.get_secret_value()

    @property
    def is_plain(self) -> bool:
        """Whether the key stands alone in its list: a text, named by its place."""
        return "name" not in self.model_fields_set

    @property
    def is_restricted(self) -> bool:
        """Whether there is something that it may not."""
        return bool(
            self.models is not None
            or self.requests_per_minute
            or self.requests_per_day
            or self.tokens_per_minute
            or self.tokens_per_day
            or self.max_concurrent_requests
        )

    def digest(self) -> bytes:
        """SHA-256 of the key."""
        text = self.get_secret_value()
        if text.startswith(_HASHED):
            return bytes.fromhex(text.removeprefix(_HASHED))
        return hashlib.sha256(text.encode()).digest()

    def models_pattern(self) -> re.Pattern[str] | None:
        """Matches `model:profile` in lower case, where the key may use that; None: it may use all."""
        if self.models is None:
            return None
        return re.compile("|".join(map(_expression, self.models)))


def _expression(pattern: str) -> str:
    model, _, profile = pattern.casefold().partition(":")
    both = (re.escape(part).replace(r"\*", "[^:]*") for part in (model, profile or "*"))
    return f"(?:{':'.join(both)})"


def _entry(value: Any) -> Any:
    """A text is an entry that says no more. Unknown keys are repeated only where they look like ours."""
    if isinstance(value, AccessKey):
        return value
    if isinstance(value, dict):
        for word in value:
            if word not in AccessKey.model_fields and not _resembles(word):
                hint = f"it takes {', '.join(AccessKey.model_fields)}"
                raise reject("holds an unknown key, which isn't repeated here: it may be a secret", hint)
        return value
    secret = value if isinstance(_api_key(value), SecretStr) else SecretStr(value)
    return AccessKey.model_construct({"key"}, name="", key=secret)


def _resembles(word: object) -> bool:
    text = str(word)[:100].casefold()
    return bool(difflib.get_close_matches(text, AccessKey.model_fields, n=1, cutoff=0.6))


KeyEntry = Annotated[AccessKey, BeforeValidator(_entry, json_schema_input_type=str | AccessKey)]


def named(entries: Sequence[AccessKey], word: str) -> tuple[AccessKey, ...]:
    """The same with a name for each: one that has none is called by its place, as `key-2`."""
    if len(entries) > MOST_KEYS:
        raise reject(f"holds {len(entries)} keys", f"at most {MOST_KEYS}")
    return tuple(
        AccessKey.model_construct({"key"}, name=f"{word}-{number}", key=entry.key)
        if entry.is_plain
        else entry
        for number, entry in enumerate(entries, 1)
    )


def contradictions(lists: Iterable[tuple[str, Sequence[AccessKey]]]) -> Iterator[Finding]:
    """Names and keys that are there twice. A plain key may be: what stands in both lists administers."""
    names: dict[str, str] = {}
    keys: dict[bytes, tuple[str, AccessKey]] = {}
    for where, entries in lists:
        for index, entry in enumerate(entries):
            here = f"auth.{where}[{index}]"
            digest = entry.digest()
            before = keys.setdefault(digest, (here, entry))
            if before[1] is not entry and not (before[1].is_plain and entry.is_plain):
                yield Finding(
                    (where, index, "key"),
                    f"the same key as {before[0]}",
                    "one entry for each key; one of admin_keys may do all that allowed_keys may",
                )
                continue
            taken = names.setdefault(entry.name.casefold(), here)
            if taken != here:
                yield Finding(
                    (where, index, *(() if entry.is_plain else ("name",))),
                    f"has the same name as {taken}: {entry.name}",
                    "a name for each key of both lists; one without is called by its place, such as key-2",
                )
