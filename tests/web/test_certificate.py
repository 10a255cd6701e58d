"""What is known of the certificate that a node serves with."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from llamesh.config.sections import ServerTls
from llamesh.web.tls import Certificate
from tests.config.test_tls import NOW, write_certificate, write_key


def test_its_end_is_that_of_the_file(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    cert, day = tmp_path / "cert.pem", timedelta(days=1)
    key_path = write_key(tmp_path / "key.pem", key)
    write_certificate(cert, key, since=NOW - day, until=NOW + 5 * day)
    certificate = Certificate(ServerTls(enabled=True, cert_path=cert, key_path=key_path))
    assert certificate.expiry == int((NOW + 5 * day).timestamp())
    write_certificate(cert, key, since=NOW - day, until=NOW + 90 * day)
    assert certificate.expiry == int((NOW + 90 * day).timestamp())
    # The one that was read last still serves.
    cert.write_text("not a certificate")
    assert certificate.expiry == int((NOW + 90 * day).timestamp())
    cert.unlink()
    assert certificate.expiry == int((NOW + 90 * day).timestamp())
