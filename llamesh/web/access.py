"""Who may use the node: keys by header or Bearer, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from llamesh.config.settings import Settings
from llamesh.errors import Forbidden, LlameshError, NotAuthenticated
from llamesh.net.exchange import Headers
from llamesh.web.caller import Caller
from llamesh.web.sites import Sites


class Access:
    """The keys of `auth` in config.yaml, as digests. Without auth everyone may infer, and only
    this machine may administer.
    """

    def __init__(self, settings: Settings) -> None:
        self.sites = Sites(settings)
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        """Take over settings, at the start and after a reload."""
        auth = settings.auth
        self._enabled = auth.enabled
        self._header = auth.required_header.lower().encode()
        self._keys = _digests(auth.allowed_keys)
        self._admins = _digests(auth.admin_keys) or self._keys
        self.sites.configure(settings)

    def check(self, headers: Headers) -> Caller:
        """Raises NotAuthenticated unless a valid key (of either kind) is presented; without auth Forbidden
        for a web page that has no business here, see `web.sites`.
        """
        if not self._enabled:
            self.sites.check(headers)
            return Caller()
        presented = self._presented(headers)
        if not _holds(self._keys, presented) and not _holds(self._admins, presented):
            raise NotAuthenticated(self._hint("the API key that was sent isn't valid"))
        return Caller()

    def who(self, headers: Headers) -> Caller:
        """Whose request it is that was refused: nobody's, without a valid key."""
        try:
            return self.check(headers)
        except LlameshError:
            return Caller()

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
        """Raises NotAuthenticated or Forbidden unless the caller may administer."""
        if not self._enabled:
            if not loopback:
                raise Forbidden("without auth.enabled, administration is possible only from this machine")
            self.sites.check_admin(headers)
            return Caller()
        presented = self._presented(headers)
        if _holds(self._admins, presented):
            self.sites.check_keyed(headers)
            return Caller()
        if _holds(self._keys, presented):
            raise Forbidden("this key may not administer; use one of auth.admin_keys")
        raise NotAuthenticated(self._hint("the API key that was sent isn't valid"))

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
        return [hashlib.sha256(key).digest() for key in keys]

    def _hint(self, what: str) -> str:
        header = self._header.decode()
        return f"{what}; send it as `Authorization: Bearer KEY` or `{header}: KEY`"


def _digests(keys: Iterable[object]) -> tuple[bytes, ...]:
    """`sha256:HEX` or the key itself; pydantic's SecretStr is unwrapped."""
    texts = [getattr(key, "get_secret_value", lambda key=key: str(key))() for key in keys]
    return tuple(
        bytes.fromhex(text[7:]) if text.startswith("sha256:") else hashlib.sha256(text.encode()).digest()
        for text in texts
    )


def _holds(digests: tuple[bytes, ...], presented: list[bytes]) -> bool:
    found = False
    for known in digests:  # all of them, always: the time says nothing about which
        for digest in presented:
            found |= hmac.compare_digest(known, digest)
    return found
