"""Ranges over real sockets: redirects, tokens, and servers that lie."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import ssl
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from llamesh.local.weights.errors import Hostile, NotAllowed, NotFound, Unreachable, WholeOnly, WrongContent
from llamesh.local.weights.web_source import WebSource
from tests.config.test_tls import NOW, write_certificate, write_key
from tests.support.hub import Hub, running_hub

CONTENT = bytes(range(256)) * 1000
SIZE = len(CONTENT)
FILE = "m.gguf"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as found:
        found.add("o/n", {FILE: CONTENT})
        yield found


def source_of(hub: Hub, size: int = SIZE, **more: object) -> WebSource:
    return WebSource(f"{hub.url}/o/n/resolve/main/{FILE}", size, what="o/n/m.gguf", **more)  # type: ignore[arg-type]


def fetch(source: WebSource, start: int = 0, end: int = SIZE) -> bytes:
    channel = source.channel()
    try:
        return take(channel.open(start, end))
    finally:
        channel.close()


def take(body: object) -> bytes:
    found, buffer = b"", memoryview(bytearray(10_000))
    while count := body.readinto(buffer):  # type: ignore[attr-defined]
        found += buffer[:count]
    return found


def test_ranges_come_over_one_connection_and_the_redirect_is_followed_once(hub: Hub) -> None:
    source = source_of(hub, token="secret-token")
    channel = source.channel()
    for start, end in ((0, 10), (10, 100_000), (SIZE - 1, SIZE)):
        assert take(channel.open(start, end)) == CONTENT[start:end]
    channel.close()
    assert len(hub.asked("hub")) == 1
    assert [one.range for one in hub.asked("store")] == [
        "bytes=0-9",
        "bytes=10-99999",
        f"bytes={SIZE - 1}-{SIZE - 1}",
    ]


def test_the_token_goes_to_the_hub_and_nowhere_else(hub: Hub) -> None:
    assert fetch(source_of(hub, token="secret-token")) == CONTENT
    assert [one.authorization for one in hub.asked("hub")] == ["Bearer secret-token"]
    assert [one.authorization for one in hub.asked("store")] == [None]


def test_an_address_that_expired_is_asked_for_anew(hub: Hub) -> None:
    hub.fault(FILE, uses=1)
    channel = source_of(hub).channel()
    assert take(channel.open(0, 10)) == CONTENT[:10]
    assert take(channel.open(10, 20)) == CONTENT[10:20]
    channel.close()
    assert len(hub.asked("hub")) == 2


def test_how_long_a_file_is(hub: Hub) -> None:
    assert source_of(hub, 0).channel().size() == SIZE
    hub.fault(FILE, ranges=False)
    assert source_of(hub, 0).channel().size() == SIZE


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ({"served": CONTENT + b"x"}, WrongContent, rf"is {SIZE + 1} bytes long there, not {SIZE}"),
        ({"served": CONTENT[:-1]}, WrongContent, rf"is {SIZE - 1} bytes long there, not {SIZE}"),
        ({"cut_after": 1000}, Unreachable, r"localhost broke off, \d+ bytes before the end"),
        ({"statuses": [503] * 9}, Unreachable, "localhost answers 503"),
        ({"statuses": [429] * 9}, Unreachable, "localhost answers 429"),
        ({"statuses": [403] * 9}, NotAllowed, "localhost refuses it"),
        ({"statuses": [404] * 9}, NotFound, "localhost doesn't have it"),
        ({"statuses": [418] * 9}, WrongContent, "localhost answers 418"),
        ({"redirect": "ftp://localhost/x"}, Hostile, "redirects to what isn't an address"),
        ({"redirect": "http://user:pw@localhost/x"}, Hostile, "redirects to what isn't an address"),
        ({"redirect": "http://localhost:99999/x"}, Hostile, "redirects to no address"),
        ({"redirect": "http://models.invalid/x"}, Hostile, "redirects to plain http at models.invalid"),
        ({"redirect": f"/o/n/resolve/main/{FILE}"}, Hostile, "sends us in circles"),
    ],
)
def test_what_goes_wrong(hub: Hub, fault: dict[str, object], kind: type[Exception], message: str) -> None:
    hub.fault(FILE, **fault)
    with pytest.raises(kind, match=message) as caught:
        fetch(source_of(hub, token="secret-token"))
    assert "secret" not in str(caught.value)


def test_a_server_without_ranges(hub: Hub) -> None:
    hub.fault(FILE, ranges=False)
    source = source_of(hub)
    with pytest.raises(WholeOnly):
        fetch(source, 0, 10)
    assert not source.ranges
    assert fetch(source) == CONTENT


def test_a_silent_server_is_left(hub: Hub) -> None:
    hub.fault(FILE, stall_after=1000)
    with pytest.raises(Unreachable, match="localhost has gone silent"):
        fetch(source_of(hub, silence=0.1))


def test_nobody_there() -> None:
    with running_hub() as gone:
        url = gone.url
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1 can't be reached: Connection refused"):
        fetch(WebSource(f"{url}/x", SIZE, what="x"))


def test_cut_from_elsewhere_it_ends_at_once(hub: Hub) -> None:
    hub.fault(FILE, stall_after=1000)
    channel = source_of(hub).channel()
    body = channel.open(0, SIZE)
    assert body.readinto(memoryview(bytearray(1000))) > 0
    channel.cut()
    with pytest.raises(Unreachable):
        take(body)
    with pytest.raises(Unreachable):
        channel.open(0, 1)
    channel.close()


@pytest.fixture
def tls(tmp_path: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Contexts of a server, and of a client that trusts it."""
    key, day = ec.generate_private_key(ec.SECP256R1()), timedelta(days=1)
    write_key(tmp_path / "key.pem", key)
    write_certificate(tmp_path / "cert.pem", key, since=NOW - day, until=NOW + day)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    client = ssl.create_default_context(cafile=tmp_path / "cert.pem")
    client.check_hostname = False
    return server, client


def test_https_and_its_token(tls: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    with running_hub(tls[0]) as hub:
        hub.add("o/n", {FILE: CONTENT})
        assert fetch(source_of(hub, token="t", context=tls[1])) == CONTENT
        assert [one.authorization for one in hub.asked("hub")] == ["Bearer t"]


def test_no_redirect_leads_out_of_https(tls: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    with running_hub(tls[0]) as hub, running_hub() as plain:
        hub.add("o/n", {FILE: CONTENT})
        plain.add("o/n", {FILE: CONTENT})
        hub.fault(FILE, redirect=f"{plain.store_url}/o/n/{FILE}?signature=secret")
        with pytest.raises(Hostile, match="redirects to plain http at localhost, which isn't followed"):
            fetch(source_of(hub, context=tls[1]))
        assert plain.seen == []


class Proxy(socketserver.ThreadingTCPServer):
    """Does CONNECT, and notes to where."""

    daemon_threads, block_on_close = True, False

    def __init__(self) -> None:
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), Tunnel)


class Tunnel(socketserver.StreamRequestHandler):
    server: Proxy

    def handle(self) -> None:
        asked = self.rfile.readline().decode().strip()
        self.server.asked.append(asked)
        while (line := self.rfile.readline().strip()) and line:
            if line.lower().startswith(b"proxy-authorization"):
                self.server.asked.append(line.decode())
        host, port = asked.split()[1].rsplit(":", 1)
        with socket.create_connection((host, int(port))) as there:
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            pump = threading.Thread(target=copy, args=(there, self.connection), daemon=True)
            pump.start()
            copy(self.connection, there)
            pump.join(20)


def copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


def test_https_through_the_system_s_proxy(
    tls: tuple[ssl.SSLContext, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = Proxy()
    threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True).start()
    try:
        for name in ("no_proxy", "NO_PROXY", "HTTPS_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("https_proxy", f"http://me:pass%21@127.0.0.1:{proxy.server_address[1]}")
        with running_hub(tls[0]) as hub:
            hub.add("o/n", {FILE: CONTENT})
            assert fetch(source_of(hub, context=tls[1])) == CONTENT
            port = urlsplit(hub.url).port
            assert proxy.asked[0] == f"CONNECT 127.0.0.1:{port} HTTP/1.0"
            assert proxy.asked[1] == "Proxy-Authorization: Basic bWU6cGFzcyE="
            monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
            asked = len(proxy.asked)
            assert fetch(source_of(hub, context=tls[1])) == CONTENT
            assert len(proxy.asked) == asked
    finally:
        proxy.shutdown()
        proxy.server_close()


def test_a_certificate_that_nobody_vouches_for(tls: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    with running_hub(tls[0]) as hub:
        hub.add("o/n", {FILE: CONTENT})
        with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED"):
            fetch(source_of(hub))
