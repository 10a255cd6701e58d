"""`GET /api/v1/access`: whether the caller may administer, and if not, why. A page asks at first."""

from __future__ import annotations

import ipaddress

import msgspec
from quart import Response, request
from quart_trio import QuartTrio

from llamesh.errors import LlameshError
from llamesh.net.exchange import Headers
from llamesh.web.access import Access


def add_access_route(app: QuartTrio, access: Access) -> None:
    """Answers `{"administer": bool, "why_not": text or null}` to whoever may look, 401 to anybody else."""

    @app.get("/api/v1/access")
    async def may() -> Response:
        headers: Headers = [
            (name.lower().encode("latin-1"), value.encode("latin-1"))
            for name, value in request.headers.items()
        ]
        access.check_private(headers)
        why_not = None
        try:
            access.check_admin(_as_an_act(headers), loopback=_is_loopback(request.remote_addr or ""))
        except LlameshError as error:
            why_not = error.message
        return Response(
            msgspec.json.encode({"administer": why_not is None, "why_not": why_not}),
            content_type="application/json",
        )


def _as_an_act(headers: Headers) -> Headers:
    """A page's own act comes with `Origin`, its question by GET without: as if it came with it."""
    found = dict(headers)
    if found.get(b"sec-fetch-site") == b"same-origin" and b"origin" not in found:
        return [*headers, (b"origin", b"http://" + found.get(b"host", b""))]
    return headers


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
