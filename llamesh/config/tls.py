"""Whether a certificate and its key can serve, asked at the start instead of at the first client."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from llamesh.config.problems import Finding

_PEM = "a PEM file"


def certificate_findings(
    cert_path: Path | None, key_path: Path | None, now: datetime | None = None
) -> list[Finding]:
    """What is wrong with the pair (files, dates, whether they belong together); empty when it can serve.

    Reads both files. `now` is aware, and is the clock where it is left out.
    """
    return list(_findings(cert_path, key_path, now or datetime.now(UTC)))


def _findings(cert_path: Path | None, key_path: Path | None, now: datetime) -> Iterator[Finding]:
    cert, key = _read(cert_path), _read(key_path)
    if isinstance(cert, str):
        yield Finding(("cert_path",), cert, _PEM + " with the certificate and its chain")
    if isinstance(key, str):
        yield Finding(("key_path",), key, _PEM + " with the private key, without a passphrase")

    # Only nodes that serve TLS themselves pay for this import (5 MB).
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

    public: list[bytes] = []
    if isinstance(cert, bytes):
        try:
            leaf = x509.load_pem_x509_certificates(cert)[0]
            public.append(leaf.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
        except (ValueError, TypeError, LookupError):
            yield Finding(("cert_path",), f"{cert_path} holds no certificate", _PEM)
        else:
            if leaf.not_valid_after_utc <= now:
                until = f"{leaf.not_valid_after_utc:%Y-%m-%d}"
                yield Finding(("cert_path",), f"the certificate {cert_path} expired on {until}", "renew it")
            if leaf.not_valid_before_utc > now:
                since = f"{leaf.not_valid_before_utc:%Y-%m-%d}"
                hint = "check this machine's clock, or wait"
                yield Finding(("cert_path",), f"the certificate {cert_path} isn't valid before {since}", hint)
    if isinstance(key, bytes):
        try:
            private = load_pem_private_key(key, None)
            public.append(private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
        except TypeError:
            yield Finding(
                ("key_path",),
                f"the key {key_path} has a passphrase",
                "a key without one",
            )
        except Exception:
            # cryptography has a class of its own for each kind of key that it won't take.
            yield Finding(("key_path",), f"{key_path} holds no private key", _PEM)
    if len(set(public)) == 2:
        yield Finding(
            ("key_path",), f"the key {key_path} isn't the certificate's", "the pair as it was issued"
        )


def expiry_of(pem: bytes) -> float | None:
    """When the first certificate of a PEM file expires, Unix time; None when there is none in it."""
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(pem)[0].not_valid_after_utc.timestamp()
    except (ValueError, TypeError, LookupError):
        return None


def _read(path: Path | None) -> bytes | str:
    """The file, or what is wrong with it."""
    if path is None:
        return "is missing while server_tls is enabled"
    try:
        return path.read_bytes() if path.is_file() else f"{path} isn't a file"
    except OSError as error:
        return f"{path} can't be read: {error.strerror}"
