"""One small request to a peer: news of the mesh, probes, administration. Not for inference."""

from __future__ import annotations

import trio

from llamesh.mesh.links import Links
from llamesh.net.exchange import UpstreamBroken

# More than any answer of the mesh's own routes.
_MOST_BYTES = 4 << 20


class NotSent(UpstreamBroken):
    """There is no connection to be had: the peer has heard nothing of it."""


async def call(
    links: Links, method: str, path: str, body: bytes = b"", *, seconds: float
) -> tuple[int, bytes]:
    """Status and body of the peer's answer. Raises UpstreamBroken, also when `seconds` have passed; NotSent
    when it certainly didn't get there.
    """
    try:
        with trio.fail_after(seconds):
            return await _call(links, method, path, body)
    except trio.TooSlowError as error:
        raise UpstreamBroken(
            f"node {links.node} didn't answer {path} within {seconds:g} s", started=False
        ) from error


async def _call(links: Links, method: str, path: str, body: bytes) -> tuple[int, bytes]:
    head = f"{method} {path} HTTP/1.1\r\nhost: llamesh\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    try:
        connection = await links.take()
    except UpstreamBroken as error:
        raise NotSent(str(error), started=False) from error
    complete = False
    try:
        try:
            await connection.send(head, [body] if body else [])
            await connection.read()
        except UpstreamBroken as error:
            if error.started or not connection.served:
                raise
            # It was closed under us before it took the request.
            links.close(connection)
            connection = await links.take(fresh=True)
            await connection.send(head, [body] if body else [])
            await connection.read()
        response = connection.response
        data = response.take()
        while not response.complete:
            await connection.read()
            data += response.take()
            if len(data) > _MOST_BYTES:
                raise UpstreamBroken(f"node {links.node} answers {path} without end", started=True)
        complete = True
        return response.status, data
    finally:
        if complete:
            links.keep(connection)
        else:
            links.close(connection)
