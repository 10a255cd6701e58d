"""Links that somebody harms, and peers that aren't what they seem."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path

import httpx
import pytest
import trio

import llamesh
from llamesh.mesh.cluster_token import derive
from llamesh.mesh.identity import Identity
from llamesh.mesh.stream import HandshakeFailed, Hello, NoiseTransport, Refused, dial
from llamesh.net.transport import connect
from tests.end_to_end.mesh.parts import NO_MODELS, fakes, stats, wait_stats
from tests.support.fake import FAKE_LLAMA_SERVER
from tests.support.mesh import Member, Mesh, running_mesh
from tests.support.tap import Flow, Link, Tap, replay


def rogue(mesh: Mesh, name: str) -> Identity:
    """Somebody who knows the token and has a key of its own."""
    assert mesh.token is not None
    return Identity(name, secrets.token_bytes(32), derive(mesh.token))


async def open_link(
    address: str,
    identity: Identity,
    *,
    purpose: str = "send",
    version: str = llamesh.__version__,
    epoch: int = 1,
) -> NoiseTransport:
    """A connection to a node by somebody who believes whoever answers."""
    host, _, port = address.rpartition(":")
    transport = await connect(host, int(port))
    hello = Hello(identity.node_id, purpose, version, epoch)
    return await dial(transport.detach(), identity, hello, lambda claim: None)


async def say(link: NoiseTransport, request: bytes) -> bytes:
    """Send a request and read what there is of an answer until it has been silent for a moment, or ends."""
    await link.send(request)
    answer = b""
    with trio.move_on_after(20), contextlib.suppress(OSError):
        while b"\r\n\r\n" not in answer and (piece := await link.receive()):
            answer += piece
    return answer


@contextlib.contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a server that does this to each connection, in a thread of its own."""
    listener = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []

    def serve(sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            sock.settimeout(20)
            answer(sock)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                threads.append(threading.Thread(target=serve, args=(sock,), daemon=True))
                threads[-1].start()

    acceptor = threading.Thread(target=accept, daemon=True)
    acceptor.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        acceptor.join(5)


@contextlib.asynccontextmanager
async def tapped_pair(tmp_path: Path, **behaviour: object) -> AsyncIterator[tuple[Mesh, Member, Member, Tap]]:
    """Node a, without models, and b, that has m, and the tap before b through which a dials it.

    b never dials a, so whatever passes between them passes there.
    """
    cookbooks = {"node-a": NO_MODELS, "node-b": fakes(tmp_path, m=behaviour)}
    async with running_mesh(
        tmp_path, cookbooks, tapped=True, peers={"node-a": ["node-b"]}, binary_path=FAKE_LLAMA_SERVER
    ) as mesh:
        await mesh.wait_joined()
        await mesh.wait_listed("m", at="node-a", by="node-b")
        yield mesh, mesh["node-a"], mesh["node-b"], mesh.taps["node-b"]


async def test_a_harmed_link_is_an_error_to_who_uses_it_and_no_more(tmp_path: Path) -> None:
    """A bit is flipped, or a stream ends in order and too soon: only the encryption can tell the latter."""
    gate = tmp_path / "gate"
    async with tapped_pair(tmp_path, slots=2, gate=str(gate), gate_after=1) as (mesh, a, b, tap):
        for harm in (Flow.flip, Flow.truncate):
            async with a.talking("m") as talk:
                assert await talk.word() == "t0 "
                for link in tap.alive:
                    harm(link.to_dialler)
                gate.touch()
                with pytest.raises(httpx.RemoteProtocolError):
                    await talk.rest()
            await wait_stats(b, "m", lambda s: s["running"] == 0)
            assert (await a.ask("m", stream=True)).text == "t0 t1 t2 t3 t4 "
            gate.unlink()

        # What was recorded is worth nothing later.
        served = (await stats(b, "m"))["requests"]
        recordings = [link.to_target.recorded for link in tap.links]
        assert max(map(len, recordings)) > 500
        for recording in recordings:
            answer = await trio.to_thread.run_sync(replay, recording, b.place.address)
            # The handshake's second message, perhaps a hint, and no word more.
            assert len(answer) < 200
        assert (await stats(b, "m"))["requests"] == served
        await mesh.wait_joined()
        assert "Traceback" not in a.said() + b.said()


async def test_handshakes_that_are_harmed_or_nonsense_come_to_nothing(tmp_path: Path) -> None:
    """A bit flipped, or the end, anywhere in either direction: nobody is let in, nobody is known then."""
    async with running_mesh(tmp_path, {"node-a": NO_MODELS}) as mesh:
        a = mesh["node-a"]
        stranger = Identity("node-s", secrets.token_bytes(32), secrets.token_bytes(32))
        with pytest.raises(HandshakeFailed, match="token"):
            await open_link(a.place.address, stranger)
        for garbage in (b"\x00", b"\x00llamesh", b"\x00llamesh\x01\xff\xff" + b"x" * 100, b"\x00" * 3000):
            sock = socket.create_connection(("127.0.0.1", a.node.port), 20)
            with sock, contextlib.suppress(ConnectionError):
                sock.sendall(garbage)
                sock.shutdown(socket.SHUT_WR)
                answer = await trio.to_thread.run_sync(sock.recv, 1000)
                assert len(answer) < 200
        assert not (a.keys / "known_peers").exists()

        with Tap(a.place.address) as tap:
            link = await open_link(tap.address, rogue(mesh, "node-x"))
            link.close()
            to_target, to_dialler = tap.links[0].to_target.passed, tap.links[0].to_dialler.passed
            for direction, size in (("to_target", to_target), ("to_dialler", to_dialler)):
                for harm in ("flip", "truncate"):
                    for place in (*range(0, size - 1, 11), size - 1):
                        tap.on_each(partial(harmed, direction=direction, harm=harm, place=place))
                        with pytest.raises((OSError, HandshakeFailed)):
                            await open_link(tap.address, rogue(mesh, f"{direction}-{harm}-{place}"))
        # Of what it has answered itself it can't know whether it came through; of the rest it does.
        await a.wait_said("a handshake failed")
        known = (a.keys / "known_peers").read_text() if (a.keys / "known_peers").exists() else ""
        assert "to_target" not in known
        assert not [name for name in await a.nodes() if name.startswith("to_target")]
        assert "Traceback" not in a.said()


def harmed(link: Link, *, direction: str, harm: str, place: int) -> None:
    """Flip or end a link's direction there."""
    getattr(getattr(link, direction), harm)(place)


async def test_a_stalled_link_is_given_up_and_another_way_taken(tmp_path: Path) -> None:
    """Nothing closes and nothing moves: who waits on it is served all the same, elsewhere or by a new one."""
    cookbooks = {
        "node-a": NO_MODELS,
        "node-b": fakes(tmp_path / "b", m={}),
        "node-c": fakes(tmp_path / "c", m={}),
    }
    # Longer than the second after which a peer that waits says so.
    config = {"upstream_read_timeout_ms": 3000}
    async with running_mesh(tmp_path, cookbooks, config, tapped=True, binary_path=FAKE_LLAMA_SERVER) as mesh:
        a = mesh["node-a"]
        await mesh.wait_joined()
        for name in ("node-b", "node-c"):
            await mesh.wait_listed("m", at="node-a", by=name)
        taps = (mesh.taps["node-b"], mesh.taps["node-a"])
        for tap in taps:
            tap.stall()
        answers = [await a.ask("m", stream=number % 2 == 1) for number in range(4)]
        assert [answer.status for answer in answers] == [200] * 4
        for tap in taps:
            tap.resume()
        await mesh.wait_joined()
        assert (await a.ask("m")).status == 200


async def test_nobody_takes_the_name_of_another(tmp_path: Path) -> None:
    cookbooks = {"node-a": NO_MODELS, "node-b": fakes(tmp_path, m={})}
    async with running_mesh(tmp_path, cookbooks, binary_path=FAKE_LLAMA_SERVER) as mesh:
        a, b = mesh
        await mesh.wait_joined()
        await mesh.wait_listed("m", at="node-a", by="node-b")
        for purpose in ("send", "park", "tunnel"):
            # A later life of it, too: the key counts.
            with pytest.raises(Refused, match="node-b"):
                await open_link(a.place.address, rogue(mesh, "node-b"), purpose=purpose, epoch=1 << 50)
        with pytest.raises(Refused, match="node-a"):
            await open_link(a.place.address, rogue(mesh, "node-a"))
        await a.wait_said("node-b", "known_peers", level="warning")
        assert (await a.ask("m")).node == "node-b"
        assert (a.keys / "known_peers").read_text().count("node-b ") == 1
        await mesh.wait_joined()

        # A whole node that was given the same id, by mistake or not.
        thief = {"node-b": fakes(tmp_path / "thief", m={})}
        config = {"cluster": {"peers": [a.place.address, b.place.address]}}
        async with running_mesh(
            tmp_path / "other", thief, config, token=mesh.token, binary_path=FAKE_LLAMA_SERVER
        ) as others:
            await others["node-b"].wait_said("known_peers", level="warning")
            assert (await a.ask("m")).headers["x-llamesh-node"] == "node-b"
            assert (await stats(b, "m"))["requests"] == 2
            assert set(await others["node-b"].nodes()) == {"node-b"}


async def test_a_member_may_not_say_anything(tmp_path: Path) -> None:
    """One with the token and a name of its own sends what isn't right: it is told so, and all goes on."""
    config = {"cluster": {"version_mismatch_action": "reject_major"}}
    async with running_mesh(
        tmp_path, {"node-a": fakes(tmp_path, m={})}, config, binary_path=FAKE_LLAMA_SERVER
    ) as mesh:
        a = mesh["node-a"]
        with pytest.raises(Refused, match=r"999\.0\.0"):
            await open_link(a.place.address, rogue(mesh, "node-x"), version="999.0.0")
        await a.wait_said("999.0.0", level="warning")
        assert set(await a.nodes()) == {"node-a"}
        wrong = [
            b"GET /admin/drain HTTP/1.1\r\nhost: x\r\n\r\n",
            b"POST /mesh/gossip HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nnot JSON!",
            b"POST /mesh/gossip HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}",
            b'POST /mesh/gossip HTTP/1.1\r\nhost: x\r\ncontent-length: 7\r\n\r\n{"v":9}',
            b"POST /mesh/park HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n\r\n1e99",
            b"POST /mesh/probe/nobody HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"\x00llamesh\x01" + secrets.token_bytes(400),
            b"GET / HTTP/1.1\r\n" + b"x: " + b"y" * 100_000 + b"\r\n\r\n",
        ]
        for number, request in enumerate(wrong):
            link = await open_link(a.place.address, rogue(mesh, f"node-x{number}"))
            answer = await say(link, request)
            assert not answer.startswith(b"HTTP/1.1 200"), (request[:60], answer)
            assert not answer.startswith(b"HTTP/1.1 500"), (request[:60], answer)
            link.close()
        assert (await a.ask("m")).status == 200
        assert "Traceback" not in a.said()
        assert [entry for entry in a.node.events if entry.get("level") == "error"] == []
        assert (await a.get("/readyz"))["status"]


async def test_peers_that_answer_garbage(tmp_path: Path) -> None:
    """Whatever sits at an address that a node was given: a line says so, and all else works."""

    def noise(sock: socket.socket) -> None:
        while True:
            sock.sendall(secrets.token_bytes(65536))

    def http(sock: socket.socket) -> None:
        sock.recv(100)
        sock.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

    def echo(sock: socket.socket) -> None:
        while data := sock.recv(65536):
            sock.sendall(data)

    def leave(sock: socket.socket) -> None:
        sock.recv(1)

    def silence(sock: socket.socket) -> None:
        while sock.recv(65536):
            pass

    with contextlib.ExitStack() as stack:
        addresses = [stack.enter_context(answering(what)) for what in (noise, http, echo, leave, silence)]
        cookbooks = {"node-a": NO_MODELS, "node-b": fakes(tmp_path, m={})}
        each = {"node-a": {"cluster": {"peers": addresses}}}
        async with running_mesh(
            tmp_path, cookbooks, each=each, peers={"node-b": ["node-a"]}, binary_path=FAKE_LLAMA_SERVER
        ) as mesh:
            a = mesh["node-a"]
            await mesh.wait_joined()
            await mesh.wait_listed("m", at="node-a", by="node-b")
            assert (await a.ask("m", stream=True)).node == "node-b"
            # Silence takes two times the patience for a handshake; it isn't waited for.
            for address in addresses[:-1]:
                await a.wait_said(address, level="warning")
            assert "Traceback" not in a.said()
            assert await a.stop() == 0
