"""Who may use the node: keys by header or Bearer, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

from llamesh.config.settings import Settings
from llamesh.errors import Forbidden, NotAuthenticated
from llamesh.net.exchange import Headers


class Access:
    """The keys of `auth` in config.yaml, as digests. Without auth everyone may infer, and only
    this machine may administer.
    """

    def __init__(self, settings: Settings) -> None:
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        """Take over settings, at the start and after a reload."""
        auth = settings.auth
        self._enabled = auth.enabled
        self._header = auth.required_header.lower().encode()
        self._keys = _digests(auth.allowed_keys)
        self._admins = _digests(auth.admin_keys) or self._keys
        self._origins = {origin.lower() for origin in settings.http.cors_allowed_origins}

    def check(self, headers: Headers) -> None:
        """Raises NotAuthenticated unless a valid key (of either kind) is presented."""
        if not self._enabled:
            return
        presented = self._presented(headers)
        if not _holds(self._keys, presented) and not _holds(self._admins, presented):
            raise NotAuthenticated(self._hint("the API key that was sent isn't valid"))

    def check_admin(self, headers: Headers, *, loopback: bool) -> None:
        """Raises NotAuthenticated or Forbidden unless the caller may administer."""
        if not self._enabled:
            if not loopback:
                raise Forbidden("without auth.enabled, administration is possible only from this machine")
            self._check_origin(headers)
            return
        presented = self._presented(headers)
        if _holds(self._admins, presented):
            return
        if _holds(self._keys, presented):
            raise Forbidden("this key may not administer; use one of auth.admin_keys")
        raise NotAuthenticated(self._hint("the API key that was sent isn't valid"))

    def _check_origin(self, headers: Headers) -> None:
        """A browser on this machine sends for any page that it shows: only the node's own page, under
        an address that nobody else's name server can claim, and the allowed origins may administer.
        """
        origin = host = ""
        for name, value in headers:
            if name == b"origin":
                origin = value.decode("latin-1").lower()
            elif name == b"host":
                host = value.decode("latin-1").lower()
        if not origin or origin in self._origins:
            return
        if origin.partition("://")[2] != host or not _is_literal(host):
            raise Forbidden("without auth.enabled, pages of other origins may not administer")

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


def _is_literal(host: str) -> bool:
    """Whether a Host header names an IP address or localhost."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or bool(ipaddress.ip_address(name))
    except ValueError:
        return False
