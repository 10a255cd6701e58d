"""TLS for clients: the configured certificate, taken in again when its files change."""

from __future__ import annotations

import os
import ssl
from datetime import UTC, datetime

from llamesh.config.sections import ServerTls
from llamesh.config.tls import expiry_of
from llamesh.telemetry.logs import get_logger

log = get_logger("tls")

_DAY = 86_400.0

# Tools that renew certificates do so some weeks before they expire; by then something is wrong with that.
_SOON_DAYS = 7.0


class Certificate:
    """Hands out the context for a handshake. A new certificate on disk serves from the next
    connection on, connections that are open keep theirs; one that can't be used is a warning, and the old one
    stays. `trouble()`: what is wrong now, for people.
    """

    def __init__(self, settings: ServerTls) -> None:
        """Raises OSError or ssl.SSLError when the files can't be used."""
        assert settings.cert_path is not None  # noqa: S101 - the schema wants both when enabled
        assert settings.key_path is not None  # noqa: S101
        self._cert, self._key = settings.cert_path, settings.key_path
        self._trouble = ""
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._context.set_alpn_protocols(["h2", "http/1.1"])
        self._seen = self._stamp()
        self._context.load_cert_chain(self._cert, self._key)
        self._expiry: float | None = None
        self._expiry_of: tuple[int, ...] = ()

    def context(self) -> ssl.SSLContext:
        """The context, with the certificate that is on disk now. Costs two calls of stat."""
        try:
            stamp = self._stamp()
            if stamp != self._seen:
                self._seen = stamp
                # Into a context of its own first: half a pair must not replace a whole one.
                ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(self._cert, self._key)
                self._context.load_cert_chain(self._cert, self._key)
                self._trouble = ""
                log.info("certificate reloaded", file=str(self._cert))
        except (OSError, ssl.SSLError) as error:
            if not self._trouble:
                log.warning("the certificate on disk can't be used; the old one stays", error=str(error))
            # Without the file's path: that is for the log.
            reason = getattr(error, "reason", None) or error.strerror or "it can't be read"
            self._trouble = f"the certificate on disk can't be used, and the old one stays: {reason}"
        return self._context

    def trouble(self) -> str:
        """Looks at the files, and at the calendar. "" when all is well."""
        self.context()
        if self._trouble or self.expiry is None:
            return self._trouble
        ends = datetime.fromtimestamp(self.expiry, UTC)
        left = (ends - datetime.now(UTC)).total_seconds() / _DAY
        if left < 0:
            return f"the certificate has expired on {ends:%Y-%m-%d}: clients refuse it"
        return f"the certificate expires on {ends:%Y-%m-%d}" if left < _SOON_DAYS else ""

    @property
    def expiry(self) -> float | None:
        """When the certificate on disk expires, Unix time; where there is none that can be read, the last one
        that could. None only before there was one.
        """
        try:
            stamp = self._stamp()
            if stamp != self._expiry_of:
                self._expiry_of = stamp
                self._expiry = expiry_of(self._cert.read_bytes()) or self._expiry
        except OSError:
            pass  # `context` says so at the next connection
        return self._expiry

    def _stamp(self) -> tuple[int, ...]:
        stats = (os.stat(self._cert), os.stat(self._key))
        return tuple(value for one in stats for value in (one.st_mtime_ns, one.st_ino, one.st_size))
