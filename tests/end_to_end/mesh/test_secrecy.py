"""What others get to see: on the wire, in the logs, in the gossip, in the process list."""

from __future__ import annotations

import json
import random
import secrets
import time
from pathlib import Path

import psutil

from llamesh.core.membership import Membership, Options
from llamesh.mesh.cluster_token import derive
from llamesh.mesh.identity import Identity
from llamesh.mesh.stream import NoiseTransport
from tests.end_to_end.cookbooks import pid_of
from tests.end_to_end.mesh.parts import NO_MODELS, fakes
from tests.end_to_end.mesh.test_harm import open_link
from tests.support.fake import FAKE_LLAMA_SERVER
from tests.support.mesh import Mesh, running_mesh
from tests.support.netns import network

PROMPT = "purple-elephants-on-the-moon"
CLIENT_KEY = "key-of-a-client-9f1c"


async def talk_a_lot(mesh: Mesh) -> None:
    """Chats, whole and streamed, through the first node to the second, with a key of the client."""
    a = mesh["node-a"]
    for stream in (False, True):
        answer = await a.ask("m", words=PROMPT, stream=stream, headers={"x-api-key": CLIENT_KEY})
        assert (answer.status, answer.node) == (200, "node-b")
    embedding = {"model": "m", "prompt": PROMPT, "session_id": "s1"}
    assert (await a.node.client.post("/v1/completions", json=embedding)).status_code == 200


def find(needles: list[bytes], hay: bytes) -> list[bytes]:
    """Those that are in it."""
    return [needle for needle in needles if needle in hay]


async def test_nothing_of_a_chat_and_no_key_gets_out(tmp_path: Path) -> None:
    """Neither on the wire, nor in logs and documents, nor in the gossip as a third member reads it."""
    cookbooks = {"node-a": NO_MODELS, "node-b": fakes(tmp_path, m={})}
    async with running_mesh(tmp_path, cookbooks, tapped=True, binary_path=FAKE_LLAMA_SERVER) as mesh:
        await mesh.wait_joined()
        await mesh.wait_listed("m", at="node-a", by="node-b")
        await talk_a_lot(mesh)
        answer = b"t0 t1 t2"
        needles = [PROMPT.encode(), CLIENT_KEY.encode(), *mesh.secrets()]
        assert len(needles) == 2 + 6, "the token and two private keys, as text and as bytes"
        heard = b"".join(tap.heard() for tap in mesh.taps.values())
        assert len(heard) > 5000
        plain = [answer, b"node-a", b"node-b", b"HTTP/1.1", b'"content"', b"chat"]
        assert find([*needles, *plain], heard) == []
        said = "".join(member.said() for member in mesh).encode()
        assert find([*needles, answer], said) == []
        for member in mesh:
            for path in ("/metrics", "/metrics/json", "/cluster/nodes", "/api/v1/state", "/v1/models"):
                shown = (await member.node.client.get(path)).content
                assert find([*needles, answer], shown) == [], path

        a = mesh["node-a"]
        assert mesh.token is not None
        listener = Identity("node-x", secrets.token_bytes(32), derive(mesh.token))
        link = await open_link(a.place.address, listener)
        membership = Membership("node-x", 1, Options(), random.Random(1))
        gossip = await hear_all(link, membership, "node-a")
        link.close()
        told = {name: dict(member.state) for name, member in membership.members().items()}
        assert {"node-a", "node-b"} <= set(told)
        assert json.loads(told["node-b"]["p:m:default"])["model"] == "m"
        state = b"".join(value for entries in told.values() for value in entries.values())
        assert find([*needles, answer], gossip + state) == []
        assert find([str(tmp_path).encode()], state) == [], "paths are nobody else's business"


async def hear_all(link: NoiseTransport, membership: Membership, name: str) -> bytes:
    """Gossip with a node until both know the same; everything that it said."""
    heard = b""
    membership.introduce(name)
    now = time.monotonic()
    membership.set("node", b'{"version": "0.0.0"}')
    messages = [message for peer, message in membership.start_round(now).gossip if peer == name]
    while messages:
        body = messages.pop()
        head = f"POST /mesh/gossip HTTP/1.1\r\nhost: mesh\r\ncontent-length: {len(body)}\r\n\r\n"
        await link.send(head.encode() + body)
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += await link.receive()
        header, _, reply = answer.partition(b"\r\n\r\n")
        assert header.startswith(b"HTTP/1.1 200"), answer
        [size] = [
            int(line[15:]) for line in header.lower().split(b"\r\n") if line.startswith(b"content-length:")
        ]
        while len(reply) < size:
            reply += await link.receive()
        heard += reply
        following = membership.take_reply(name, reply, now)
        messages += [] if following is None else [following]
    return heard


async def test_children_know_nothing_of_the_mesh(tmp_path: Path) -> None:
    """Token and key may come from the environment; no child inherits them, and no command line shows them."""
    private = "QUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUE="
    env = {"NODE_PRIVATE_KEY": private, "CLUSTER_TOKEN": secrets.token_urlsafe(32)}
    async with running_mesh(
        tmp_path, {"node-a": fakes(tmp_path, m={})}, token=None, env=env, binary_path=FAKE_LLAMA_SERVER
    ) as mesh:
        a = mesh["node-a"]
        assert (await a.ask("m")).status == 200
        child = psutil.Process(pid_of(a.node, "m:default"))
        assert not {"NODE_PRIVATE_KEY", "CLUSTER_TOKEN"} & set(child.environ())
        for process in (child, psutil.Process(a.node.pid)):
            shown = " ".join(process.cmdline())
            assert not [value for value in env.values() if value in shown]
        assert not [value for value in env.values() if value in a.said()]
        # What comes from the environment isn't written down.
        kept = [path.name for path in a.keys.glob("*")] if a.keys.exists() else []
        assert not {"node.key", "cluster_token"} & set(kept)


async def test_a_capture_between_two_machines_shows_nothing(tmp_path: Path) -> None:
    cookbooks = {"node-a": NO_MODELS, "node-b": fakes(tmp_path, m={})}
    with network("node-a", "node-b") as net, net.capture("node-a") as capture:
        async with running_mesh(tmp_path, cookbooks, net=net, binary_path=FAKE_LLAMA_SERVER) as mesh:
            await mesh.wait_joined()
            await mesh.wait_listed("m", at="node-a", by="node-b")
            await talk_a_lot(mesh)
            needles = [PROMPT.encode(), CLIENT_KEY.encode(), b"t0 t1", b"HTTP/1.1", *mesh.secrets()]
        crossed = capture.tcp()
        assert len(crossed) > 5000
        assert capture.lost() == 0
        assert find(needles, crossed) == []
        assert find(needles, b"".join(capture.frames())) == []
