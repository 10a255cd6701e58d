"""TLS for clients: the configured certificate, taken in again when its files change."""

from __future__ import annotations

import os
import ssl
from datetime import UTC, datetime
from pathlib import Path

from cryptography.x509 import load_pem_x509_certificate

from llamesh.config.sections import ServerTls
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
        self._ends = _end_of(self._cert)

    def context(self) -> ssl.SSLContext:
        """The context, with the certificate that is on disk now. Costs two calls of stat."""
        try:
            stamp = self._stamp()
            if stamp != self._seen:
                self._seen = stamp
                # Into a context of its own first: half a pair must not replace a whole one.
                ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(self._cert, self._key)
                self._context.load_cert_chain(self._cert, self._key)
                self._trouble, self._ends = "", _end_of(self._cert)
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
        if self._trouble or self._ends is None:
            return self._trouble
        left = (self._ends - datetime.now(UTC)).total_seconds() / _DAY
        if left < 0:
            return f"the certificate has expired on {self._ends:%Y-%m-%d}: clients refuse it"
        return f"the certificate expires on {self._ends:%Y-%m-%d}" if left < _SOON_DAYS else ""

    def _stamp(self) -> tuple[int, ...]:
        stats = (os.stat(self._cert), os.stat(self._key))
        return tuple(value for one in stats for value in (one.st_mtime_ns, one.st_ino, one.st_size))


def _end_of(cert: Path) -> datetime | None:
    """When it expires; None when that can't be read, though OpenSSL takes it."""
    try:
        return load_pem_x509_certificate(cert.read_bytes()).not_valid_after_utc
    except (OSError, ValueError):
        return None
