"""`llamesh pause [TIME]`: tell the node that runs on this machine something, from a shell.

Exit codes: 0 when it did, 1 when it can't be reached or refuses, with the reason on stderr; 2 for a
bad TIME, which argparse tells.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import ssl
import sys
from collections.abc import Mapping
from typing import Any

from llamesh.config.environment import IGNORED as KEY_VARIABLE
from llamesh.config.settings import Settings

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}

# The node is on this machine, and pausing waits for nothing.
_PATIENCE_SECONDS = 10.0

# What a command likes to know besides, and can do without.
_STATE_SECONDS = 2.0
_STATE_BYTES = 64 << 20


def pause_seconds(text: str) -> float:
    """`30m`, `2h`, `1h30m`, `90` (seconds): in seconds; `off`: 0.

    Raises argparse.ArgumentTypeError.
    """
    word = text.strip().lower()
    if word == "off":
        return 0.0
    if not re.fullmatch(r"\d{1,9}(\.\d{1,3})?[smhd]?|(\d{1,9}[smhd])+", word):
        raise argparse.ArgumentTypeError(f"not a time: {text[:40]!r}; such as 90 (seconds), 30m, 2h, or off")
    return sum(float(number) * _UNITS[unit] for number, unit in re.findall(r"([\d.]+)([smhd]?)", word))


def pause(settings: Settings, seconds: float | None, environ: Mapping[str, str]) -> int:
    """Pause the node of these settings: None is until further notice, 0 ends it. The exit code."""
    return _tell(settings, "/admin/pause", {} if seconds is None else {"seconds": seconds}, environ)


def _tell(settings: Settings, path: str, document: Mapping[str, Any], environ: Mapping[str, str]) -> int:
    address = settings.listen_addr
    if not address.port:
        return _fail(
            "listen_addr has port 0, so the node's port isn't known here; "
            "set LLAMESH_LISTEN_ADDR to the address that its log names"
        )
    headers = {"content-type": "application/json"}
    if key := environ.get(KEY_VARIABLE) or _own_key(settings):
        headers["authorization"] = f"Bearer {key}"
    connection: http.client.HTTPConnection | None = None
    try:
        connection = _connect(settings)
        connection.request("POST", path, json.dumps(document), headers)
        reply = connection.getresponse()
        status, answer = reply.status, _decoded(reply.read(1 << 20))
    except (OSError, http.client.HTTPException) as error:
        return _fail(f"no node answers at {address}: {error or type(error).__name__}; is it running?")
    except ValueError:
        return _fail(f"{KEY_VARIABLE} holds what can't be sent as a key")
    finally:
        if connection is not None:
            connection.close()
    if status != 200:
        return _fail(f"the node at {address} refused ({status}): {_reason(answer)}{_hint(status)}")
    words = answer.get("reason") or answer.get("status") or "done"
    sys.stdout.write(f"{settings.node_id}: {words}\n")
    return 0


def read_state(settings: Settings, environ: Mapping[str, str]) -> dict[str, Any]:
    """`GET /api/v1/state` of the node of these settings; empty where none answers within two seconds."""
    headers = {}
    if key := environ.get(KEY_VARIABLE) or _own_key(settings):
        headers["authorization"] = f"Bearer {key}"
    connection: http.client.HTTPConnection | None = None
    try:
        connection = _connect(settings, _STATE_SECONDS)
        connection.request("GET", "/api/v1/state", headers=headers)
        reply = connection.getresponse()
        return _decoded(reply.read(_STATE_BYTES)) if reply.status == 200 else {}
    except (OSError, http.client.HTTPException, ValueError):
        return {}
    finally:
        if connection is not None:
            connection.close()


def _connect(settings: Settings, seconds: float = _PATIENCE_SECONDS) -> http.client.HTTPConnection:
    host, port = settings.listen_addr.host, settings.listen_addr.port
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    tls = settings.server_tls
    if not tls.enabled:
        return http.client.HTTPConnection(host, port, timeout=seconds)
    # It is the node's own certificate or nobody's; the name in it is for others.
    context = ssl.create_default_context(cafile=str(tls.cert_path))
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return http.client.HTTPSConnection(host, port, timeout=seconds, context=context)


def _own_key(settings: Settings) -> str | None:
    """The first key that may administer and isn't only known by its digest."""
    if not settings.auth.enabled:
        return None
    for key in settings.auth.administrators():
        text = key.get_secret_value()
        if not text.startswith("sha256:"):
            return text
    return None


def _decoded(body: bytes) -> dict[str, Any]:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _reason(answer: Mapping[str, Any]) -> str:
    error = answer.get("error")
    message = error.get("message") if isinstance(error, dict) else None
    return str(message or "it isn't a llamesh node")


def _hint(status: int) -> str:
    return f"; set {KEY_VARIABLE}" if status in (401, 403) else ""


def _fail(reason: str) -> int:
    sys.stderr.write(f"llamesh: {reason}\n")
    return 1
