"""HTTPS on the node's port: both HTTP versions, plain HTTP refused, a new certificate without a restart."""

from __future__ import annotations

import os
import ssl
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
import trio
from cryptography.hazmat.primitives.asymmetric import ec

from tests.config.test_tls import NOW, write_certificate, write_key
from tests.end_to_end.cookbooks import CHAT, chat, cookbook, profile
from tests.support.fake import FAKE_LLAMA_SERVER, fake_profile_file
from tests.support.node import Node, running_node


def write_pair(folder: Path, *, days: int = 90, only: str = "") -> None:
    """A fresh self-signed pair, put in place as a certificate tool does: whole files, by renaming."""
    key = ec.generate_private_key(ec.SECP256R1())
    day = timedelta(days=1)
    if only != "cert":
        os.replace(write_key(folder / "new-key", key), folder / "key.pem")
    os.replace(
        write_certificate(folder / "new-cert", key, since=NOW - day, until=NOW + days * day),
        folder / "cert.pem",
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


@pytest.mark.parametrize("http2", [False, True])
async def test_a_stream_goes_on_while_the_certificate_changes(tmp_path: Path, http2: bool) -> None:
    gate = tmp_path / "go-on"
    wish = {"tokens": 6, "gate": str(gate), "gate_after": 3}
    fakes = cookbook(m=profile(fake_profile_file(tmp_path, "m", slots=2)))
    async with (
        running_node(tmp_path, fakes, tls_config(tmp_path), binary_path=FAKE_LLAMA_SERVER) as node,
        trusting(tmp_path, http2=http2) as old,
    ):
        body = {**chat("m", stream=True), "fake": wish}
        async with old.stream("POST", node.url + CHAT, json=body) as reply:
            pieces = reply.aiter_text()
            assert "data:" in await anext(pieces)
            first = await served_certificate(node)
            write_pair(tmp_path)
            second = await served_certificate(node)
            assert first != second
            assert second.split() == (tmp_path / "cert.pem").read_text().split()
            async with trusting(tmp_path, http2=http2) as new:
                assert (await new.post(node.url + CHAT, json=chat("m"))).status_code == 200
            gate.touch()
            assert "".join([piece async for piece in pieces]).endswith("data: [DONE]\n\n")


async def concern(node: Node, client: httpx.AsyncClient) -> str:
    """What the node says of its certificate to whoever asks what is wrong."""
    state = (await client.get(f"{node.url}/api/v1/state")).json()
    return "".join(one["text"] for one in state["attention"] if one["what"] == "certificate")


async def test_a_certificate_that_cant_be_used_is_shown_until_it_is_mended(tmp_path: Path) -> None:
    config = tls_config(tmp_path)
    async with (
        running_node(tmp_path, cookbook(), config, binary_path=FAKE_LLAMA_SERVER) as node,
        trusting(tmp_path, http2=True) as client,
    ):
        assert await concern(node, client) == ""
        good = (tmp_path / "cert.pem").read_text()
        for spoil in (
            lambda: (tmp_path / "cert.pem").write_text("not a certificate"),
            lambda: (tmp_path / "cert.pem").unlink(),
            lambda: write_pair(tmp_path, only="cert"),  # its key is yet to come
        ):
            spoil()
            told = await concern(node, client)
            assert "can't be used, and the old one stays" in told
            assert str(tmp_path) not in told
            assert (await served_certificate(node)).split() == good.split()
            assert await concern(node, client) == told, "for as long as it is so"
        write_pair(tmp_path)
        assert await concern(node, client) == ""
        assert (await served_certificate(node)).split() == (tmp_path / "cert.pem").read_text().split()


async def test_a_certificate_that_nobody_renews_is_shown(tmp_path: Path) -> None:
    config = tls_config(tmp_path)
    write_pair(tmp_path, days=3)
    async with (
        running_node(tmp_path, cookbook(), config, binary_path=FAKE_LLAMA_SERVER) as node,
        trusting(tmp_path, http2=False) as client,
    ):
        assert "expires on" in await concern(node, client)
