"""Whether the node of a configuration runs, and what it says of itself. Blocking, for seconds at most."""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Mapping
from typing import Any

from llamesh.commands.shared.node import read_state
from llamesh.config.settings import Settings

_SECONDS = 2.0
_BYTES = 65_536


def version_at(settings: Settings) -> str:
    """The version of the llamesh node that answers at listen_addr, "" where none does."""
    address = settings.listen_addr
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)
    if not address.port:
        return ""
    connection = _connection(settings, host, address.port)
    try:
        connection.request("GET", "/version")
        reply = connection.getresponse()
        answer = json.loads(reply.read(_BYTES))
        if reply.status == 200 and isinstance(answer, dict) and "node_id" in answer:
            return str(answer.get("version"))[:40]
    except (OSError, http.client.HTTPException, ValueError, RecursionError):
        pass  # whatever answers there, it is no node
    finally:
        connection.close()
    return ""


def _connection(settings: Settings, host: str, port: int) -> http.client.HTTPConnection:
    if not settings.server_tls.enabled:
        return http.client.HTTPConnection(host, port, timeout=_SECONDS)
    # Nothing secret is sent; whose certificate it is doesn't matter for "does it answer".
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return http.client.HTTPSConnection(host, port, timeout=_SECONDS, context=context)


def state_of(settings: Settings, environ: Mapping[str, str]) -> dict[str, Any]:
    """The state document of the node, empty where it isn't to be had (no node, or no key for it)."""
    return read_state(settings, environ)
