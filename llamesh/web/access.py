"""Who may use the node, and for what: keys by header or Bearer, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterable
from typing import Any

from llamesh.config.access_keys import AccessKey
from llamesh.config.settings import Settings
from llamesh.core.limits import NO_LIMITS, Limits
from llamesh.errors import Forbidden, LlameshError, NotAuthenticated
from llamesh.net.exchange import Headers
from llamesh.telemetry.key_figures import KeyFigures
from llamesh.web.caller import ANYBODY, Caller
from llamesh.web.meters import Meters
from llamesh.web.sites import Sites

# Each is compared with all that there are.
_MOST_PRESENTED = 4


class Access:
    """The keys of `auth` in config.yaml, as digests. Without auth everyone may infer, and only
    this machine may administer.

    `meters`: what was counted of keys with limits; `figures`: of all keys, by name; `aliases_of`: other
    names of a model, here or at peers, by the model and by "model:profile".
    """

    def __init__(self, settings: Settings) -> None:
        self.meters = Meters()
        self.figures: dict[str, KeyFigures] = {}
        self.aliases_of: Callable[[str, str], Iterable[str]] = lambda model, key: ()
        self.sites = Sites(settings)
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        """Take over settings, at the start and after a reload."""
        auth = settings.auth
        self._enabled = auth.enabled
        self._header = auth.required_header.lower().encode()
        # Of a plain key that stands in both lists, the administrator's entry counts.
        entries = (
            {key.digest(): key for key in (*auth.allowed_keys, *auth.admin_keys)} if auth.enabled else {}
        )
        limits = {key.name: one for key in entries.values() if (one := _limits(key)) != NO_LIMITS}
        self.meters.configure(limits)
        before, self.figures = self.figures, {}
        for key in entries.values():
            self.figures[key.name] = before.get(key.name) or KeyFigures()
        self._digests = tuple(entries)
        self._callers = [
            Caller(key.name, key.models_pattern(), self.meters.get(key.name), self.figures[key.name])
            for key in entries.values()
        ]
        administrators = {key.digest() for key in auth.administrators()}
        self._administers = [digest in administrators for digest in self._digests]
        self._listed = [*entries.values()]
        self.sites.configure(settings)

    def check(self, headers: Headers) -> Caller:
        """Who sent this: a key of either kind. Raises NotAuthenticated; without auth Forbidden for a web page
        that has no business here, see `web.sites`.
        """
        if not self._enabled:
            self.sites.check(headers)
            return ANYBODY
        return self._callers[self._found(headers)[0]]

    def who(self, headers: Headers) -> Caller:
        """Whose request it is that was refused: nobody's, without a valid key."""
        try:
            return self.check(headers)
        except LlameshError:
            return ANYBODY

    def check_posted(self, headers: Headers) -> None:
        """For a POST of inference that has an `Origin`, after `check`."""
        if not self._enabled:
            self.sites.check_posted(headers)

    def check_private(self, headers: Headers) -> Caller:
        """`check` for what tells about the node and its users: state, logs, instances' own pages."""
        caller = self.check(headers)
        if not self._enabled:
            self.sites.check_private(headers)
        return caller

    def check_shown(self, headers: Headers) -> None:
        """For the dashboard's page, which holds no data."""
        if not self._enabled:
            self.sites.check_shown(headers)

    def check_admin(self, headers: Headers, *, loopback: bool) -> Caller:
        """Who sent this: a key that may administer. Raises NotAuthenticated or Forbidden."""
        if not self._enabled:
            if not loopback:
                raise Forbidden("without auth.enabled, administration is possible only from this machine")
            self.sites.check_admin(headers)
            return ANYBODY
        found = self._found(headers)
        for index in found:
            if self._administers[index]:
                self.sites.check_keyed(headers)
                return self._callers[index]
        name = self._callers[found[0]].name
        raise Forbidden(f"the key {name} may not administer; use one of auth.admin_keys")

    def check_by_get(self, headers: Headers) -> None:
        """For an act by GET, after `check_admin`."""
        if not self._enabled:
            self.sites.check_by_get(headers)

    def check_model(self, caller: Caller, model: str, profile: str) -> None:
        """Raises Forbidden when the caller's key has a list of models, and this isn't among them."""
        if caller.models is not None and not self.may_use(caller, model, profile):
            if caller.figures is not None:
                caller.figures.refused["models"] += 1
            name = f"{model}:{profile}"[:200]
            raise Forbidden(
                f"the key {caller.name} may not use {name}; GET /v1/models lists what it may", param="model"
            )

    def may_use(self, caller: Caller, model: str, profile: str) -> bool:
        """Whether the caller's key may use a profile of a model, by any of its names."""
        pattern = caller.models
        if pattern is None:
            return True
        names = (model, *self.aliases_of(model, f"{model}:{profile}"))
        return any(pattern.fullmatch(f"{name}:{profile}".casefold()) for name in names)

    def document(self) -> dict[str, Any]:
        """`GET /api/v1/keys`: names, limits, what counts against them now; nothing of the keys themselves."""
        now = self.meters.clock()
        keys = []
        for key, administers in zip(self._listed, self._administers, strict=True):
            meter, figures = self.meters.get(key.name), self.figures[key.name]
            keys.append(
                {
                    "name": key.name,
                    "administers": administers,
                    "models": None if key.models is None else list(key.models),
                    "limits": {name: value or None for name, value in _limits(key)._asdict().items()},
                    "used": None if meter is None else meter.used(now)._asdict(),
                    "here": {
                        "requests": figures.requests,
                        "running": figures.running,
                        "refused": dict(figures.refused),
                        "prompt_tokens": figures.prompt_tokens,
                        "cached_tokens": figures.cached_tokens,
                        "tokens": figures.tokens,
                    },
                }
            )
        return {"time": now, "keys": keys}

    def _found(self, headers: Headers) -> list[int]:
        """Which keys were presented; at least one. Raises NotAuthenticated."""
        found = []
        for digest in self._presented(headers):
            place = 0
            for number, known in enumerate(self._digests, 1):  # all of them, always: the time says nothing
                place += number * hmac.compare_digest(known, digest)
            if place:
                found.append(place - 1)
        if not found:
            raise NotAuthenticated(self._hint("the API key that was sent isn't valid"))
        return found

    def _presented(self, headers: Headers) -> list[bytes]:
        """Digests of all keys that came: clients that must send a Bearer add the real key in the header."""
        keys = []
        for name, value in headers:
            if name == b"authorization" and value[:7].lower() == b"bearer ":
                keys.append(value[7:].strip())
            elif name == self._header and value:
                keys.append(value)
        if not keys:
            raise NotAuthenticated(self._hint("no API key was sent"))
        if len(keys) > _MOST_PRESENTED:
            raise NotAuthenticated(f"{len(keys)} API keys were sent, more than anybody has")
        return [hashlib.sha256(key).digest() for key in keys]

    def _hint(self, what: str) -> str:
        header = self._header.decode()
        return f"{what}; send it as `Authorization: Bearer KEY` or `{header}: KEY`"


def _limits(key: AccessKey) -> Limits:
    return Limits(
        key.requests_per_minute,
        key.requests_per_day,
        key.tokens_per_minute,
        key.tokens_per_day,
        key.max_concurrent_requests,
    )
