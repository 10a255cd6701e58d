"""The official MCP client on a node, and the same requests by hand."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

from tests.support.node import PATIENCE_SECONDS, Node

PATH = "/mcp"
ERAS = ("legacy", "auto")
"""Modes of the client: the handshake of 2025, and 2026's requests that stand alone."""

HEADERS = {"content-type": "application/json", "accept": "application/json, text/event-stream"}


@contextlib.asynccontextmanager
async def mcp_client(
    node: Node, mode: str = "auto", headers: Mapping[str, str] | None = None
) -> AsyncIterator[Client]:
    """The official client, connected as an assistant would be."""
    async with (
        httpx.AsyncClient(trust_env=False, timeout=PATIENCE_SECONDS, headers=headers) as http,
        Client(streamable_http_client(node.url + PATH, http_client=http), mode=mode) as client,
    ):
        yield client


async def use(client: Client, tool: str, **arguments: Any) -> dict[str, Any]:
    """Call a tool that must succeed; its structured answer, which its text must repeat."""
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result.content
    [text] = result.content
    assert json.loads(text.text) == result.structured_content
    answer: dict[str, Any] = result.structured_content
    return answer


async def fail(client: Client, tool: str, **arguments: Any) -> str:
    """Call a tool that must fail; its words."""
    result = await client.call_tool(tool, arguments)
    assert result.is_error, result.content
    assert result.structured_content is None
    [text] = result.content
    return str(text.text)


def call_of(tool: str, id: Any = 1, **arguments: Any) -> dict[str, Any]:  # noqa: A002
    """The JSON-RPC of a call, of the handshake's era."""
    return {
        "jsonrpc": "2.0",
        "id": id,
        "method": "tools/call",
        "params": {"name": tool, "arguments": arguments},
    }


async def post(
    node: Node, document: Any, headers: Mapping[str, str] | None = None, **more: Any
) -> httpx.Response:
    """One request by hand. `document`: JSON, or bytes as they are."""
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return await node.client.post(PATH, content=body, headers={**HEADERS, **(headers or {})}, **more)
