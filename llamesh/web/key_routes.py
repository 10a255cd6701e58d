"""`GET /api/v1/keys`: which keys there are, what they may do, and what they have used."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from quart import Response
from quart_trio import QuartTrio

from llamesh.web.access import Access


def add_key_routes(app: QuartTrio, access: Access, check: Callable[[], object]) -> None:
    """`check` raises LlameshError unless the caller of the present request may administer."""

    @app.get("/api/v1/keys")
    async def keys() -> Response:
        check()
        return Response(msgspec.json.encode(access.document()), content_type="application/json")
