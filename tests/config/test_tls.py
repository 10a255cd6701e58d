"""server_tls: certificates that can't serve are refused when the node starts."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from llamesh.config.problems import ConfigError
from llamesh.config.settings import Settings, load_settings
from llamesh.config.tls import certificate_findings

NOW = datetime.now(UTC)
Key = ec.EllipticCurvePrivateKey


def write_certificate(path: Path, key: Key, *, since: datetime, until: datetime) -> Path:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(since)
        .not_valid_after(until)
        .sign(key, hashes.SHA256())
    )
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return path


def write_key(path: Path, key: Key, passphrase: bytes | None = None) -> Path:
    sealed: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        sealed = serialization.BestAvailableEncryption(passphrase)
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path.write_bytes(key.private_bytes(pem, form, sealed))
    return path


@pytest.fixture
def key() -> Key:
    return ec.generate_private_key(ec.SECP256R1())


@pytest.fixture
def good_cert(tmp_path: Path, key: Key) -> Path:
    day = timedelta(days=1)
    return write_certificate(tmp_path / "cert.pem", key, since=NOW - day, until=NOW + day)


@pytest.fixture
def good_key(tmp_path: Path, key: Key) -> Path:
    return write_key(tmp_path / "key.pem", key)


def load(tmp_path: Path, cert: Path, key: Path) -> Settings:
    path = tmp_path / "config.yaml"
    path.write_text(f"server_tls:\n  enabled: true\n  cert_path: {cert}\n  key_path: {key}\n")
    return load_settings(path, None, {})


def said(cert: Path | None, key: Path | None, now: datetime = NOW) -> list[tuple[str, str]]:
    return [(str(found.at[0]), found.message) for found in certificate_findings(cert, key, now)]


def test_a_good_pair_is_accepted(tmp_path: Path, good_cert: Path, good_key: Path) -> None:
    assert load(tmp_path, good_cert, good_key).server_tls.cert_path == good_cert


def test_an_expired_one_is_refused_with_file_and_line(tmp_path: Path, key: Key, good_key: Path) -> None:
    since, until = datetime(2020, 1, 1, tzinfo=UTC), datetime(2020, 2, 3, tzinfo=UTC)
    cert = write_certificate(tmp_path / "old.pem", key, since=since, until=until)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, cert, good_key)
    where = f"{tmp_path / 'config.yaml'}:3: server_tls.cert_path"
    assert str(caught.value) == f"{where}: the certificate {cert} expired on 2020-02-03 (renew it)"


def test_dates_are_those_of_the_certificate(good_cert: Path, good_key: Path) -> None:
    assert said(good_cert, good_key) == []
    ((at, message),) = said(good_cert, good_key, NOW + timedelta(days=2))
    assert at == "cert_path"
    assert "expired on" in message
    ((at, message),) = said(good_cert, good_key, NOW - timedelta(days=2))
    assert at == "cert_path"
    assert "isn't valid before" in message


def test_files_that_are_not_there_are_told_together(tmp_path: Path, good_key: Path) -> None:
    assert said(None, None) == [
        ("cert_path", "is missing while server_tls is enabled"),
        ("key_path", "is missing while server_tls is enabled"),
    ]
    assert said(tmp_path / "none.pem", tmp_path) == [
        ("cert_path", f"{tmp_path / 'none.pem'} isn't a file"),
        ("key_path", f"{tmp_path} isn't a file"),
    ]


def test_files_that_hold_something_else(tmp_path: Path, good_cert: Path, good_key: Path) -> None:
    garbage = tmp_path / "garbage.pem"
    for content in (b"", b"hello", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"):
        garbage.write_bytes(content)
        assert said(garbage, good_key) == [("cert_path", f"{garbage} holds no certificate")]
        assert said(good_cert, garbage) == [("key_path", f"{garbage} holds no private key")]
    # Taken for each other.
    assert [at for at, _ in said(good_key, good_cert)] == ["cert_path", "key_path"]


def test_a_key_with_a_passphrase_is_refused_instead_of_asked_for(
    tmp_path: Path, key: Key, good_cert: Path
) -> None:
    sealed = write_key(tmp_path / "sealed.pem", key, b"hunter2")
    assert said(good_cert, sealed) == [("key_path", f"the key {sealed} has a passphrase")]


def test_a_key_of_another_certificate(tmp_path: Path, good_cert: Path) -> None:
    other = write_key(tmp_path / "other.pem", ec.generate_private_key(ec.SECP256R1()))
    assert said(good_cert, other) == [("key_path", f"the key {other} isn't the certificate's")]


def test_files_that_can_not_be_opened(
    good_cert: Path, good_key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert [message for _, message in said(good_cert, good_key)] == [
        f"{good_cert} can't be read: Permission denied",
        f"{good_key} can't be read: Permission denied",
    ]
