"""HTTPS on the node's port: both HTTP versions, plain HTTP refused, a new certificate without a restart."""

from __future__ import annotations

import os
import ssl
from datetime import timedelta
from pathlib import Path

import httpx
import trio
from cryptography.hazmat.primitives.asymmetric import ec

from tests.config.test_tls import NOW, write_certificate, write_key
from tests.end_to_end.cookbooks import CHAT, chat, cookbook, profile
from tests.support.node import Node, running_node


def write_pair(folder: Path) -> None:
    """A fresh self-signed pair, put in place as a certificate tool does: whole files, by renaming."""
    key = ec.generate_private_key(ec.SECP256R1())
    day = timedelta(days=1)
    os.replace(write_key(folder / "new-key", key), folder / "key.pem")
    os.replace(
        write_certificate(folder / "new-cert", key, since=NOW - day, until=NOW + day), folder / "cert.pem"
    )


def tls_config(folder: Path) -> dict[str, object]:
    write_pair(folder)
    return {
        "server_tls": {
            "enabled": True,
            "cert_path": str(folder / "cert.pem"),
            "key_path": str(folder / "key.pem"),
        }
    }


def trusting(folder: Path, *, http2: bool) -> httpx.AsyncClient:
    context = ssl.create_default_context(cafile=folder / "cert.pem")
    context.check_hostname = False
    return httpx.AsyncClient(verify=context, http2=http2, trust_env=False, timeout=30)


async def test_both_versions_of_http_answer(tmp_path: Path, tiny_model: Path) -> None:
    book = cookbook(tiny=profile(tiny_model))
    async with running_node(tmp_path, book, tls_config(tmp_path)) as node:
        assert node.url.startswith("https://")
        for http2, version in ((False, "HTTP/1.1"), (True, "HTTP/2")):
            async with trusting(tmp_path, http2=http2) as client:
                whole = await client.post(node.url + CHAT, json=chat())
                assert (whole.status_code, whole.http_version) == (200, version)
                streamed = await client.post(node.url + CHAT, json=chat(stream=True))
                assert streamed.text.endswith("data: [DONE]\n\n")


async def test_plain_http_is_refused_in_plain_words(tmp_path: Path, tiny_model: Path) -> None:
    async with running_node(tmp_path, cookbook(tiny=profile(tiny_model)), tls_config(tmp_path)) as node:
        reply = await node.client.get(node.url.replace("https://", "http://") + "/v1/models")
        assert reply.status_code == 400
        assert "https" in reply.json()["error"]["message"]


async def served_certificate(node: Node) -> str:
    """The certificate of a new connection, as PEM."""
    host, port = node.url.removeprefix("https://").split(":")
    return await trio.to_thread.run_sync(ssl.get_server_certificate, (host, int(port)))


async def test_a_new_certificate_serves_the_next_connection(tmp_path: Path, tiny_model: Path) -> None:
    async with running_node(tmp_path, cookbook(tiny=profile(tiny_model)), tls_config(tmp_path)) as node:
        first = await served_certificate(node)
        assert first.split() == (tmp_path / "cert.pem").read_text().split()
        write_pair(tmp_path)
        second = await served_certificate(node)
        assert second.split() == (tmp_path / "cert.pem").read_text().split()
        assert first != second
        (tmp_path / "cert.pem").write_text("not a certificate")
        assert await served_certificate(node) == second, "a broken file must not replace a working one"
        await node.wait_event("the certificate on disk can't be used; the old one stays")
