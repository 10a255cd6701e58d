"""Who may use the node: keys by header or Bearer, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from llamesh.config.settings import Settings
from llamesh.errors import Forbidden, NotAuthenticated
from llamesh.net.exchange import Headers


class Access:
    """The keys of `auth` in config.yaml, as digests. Without auth everyone may infer, and only
    this machine may administer.
    """

    def __init__(self, settings: Settings) -> None:
        auth = settings.auth
        self._enabled = auth.enabled
        self._header = auth.required_header.lower().encode()
        self._keys = _digests(auth.allowed_keys)
        self._admins = _digests(auth.admin_keys) or self._keys

    def check(self, headers: Headers) -> None:
        """Raises NotAuthenticated unless a valid key (of either kind) is presented."""
        if not self._enabled:
            return
        digest = self._presented(headers)
        if not _holds(self._keys, digest) and not _holds(self._admins, digest):
            raise NotAuthenticated(self._hint("the API key that was sent isn't valid"))

    def check_admin(self, headers: Headers, *, loopback: bool) -> None:
        """Raises NotAuthenticated or Forbidden unless the caller may administer."""
        if not self._enabled:
            if not loopback:
                raise Forbidden("without auth.enabled, administration is possible only from this machine")
            return
        digest = self._presented(headers)
        if _holds(self._admins, digest):
            return
        if _holds(self._keys, digest):
            raise Forbidden("this key may not administer; use one of auth.admin_keys")
        raise NotAuthenticated(self._hint("the API key that was sent isn't valid"))

    def _presented(self, headers: Headers) -> bytes:
        for name, value in headers:
            if name == self._header and value:
                return hashlib.sha256(value).digest()
            if name == b"authorization" and value[:7].lower() == b"bearer ":
                return hashlib.sha256(value[7:].strip()).digest()
        raise NotAuthenticated(self._hint("no API key was sent"))

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


def _holds(digests: tuple[bytes, ...], digest: bytes) -> bool:
    found = False
    for known in digests:  # all of them, always: the time says nothing about which
        found |= hmac.compare_digest(known, digest)
    return found
