"""Several real nodes that know each other, for tests from outside.

    async with running_mesh(tmp_path, {"node-a": {}, "node-b": cookbook(m=...)}, binary_path=FAKE) as mesh:
        await mesh.wait_joined()
        answer = await mesh["node-a"].ask("m", stream=True)
        assert answer.node == "node-b"
        mesh["node-b"].freeze()
        await mesh.wait_gone("node-b")

Every node has its own directory, keys and address, and keeps them when it is restarted. They listen on
loopback, or each in a network namespace (see `netns`), and find each other by static addresses, without
multicast, unless the test says otherwise. Nothing of them outlives the block.
"""

from __future__ import annotations

import base64
import contextlib
import json
import secrets
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import trio

from tests.support.chats import Answer, Talk, read_answer, reading
from tests.support.netns import Host, Network
from tests.support.node import PATIENCE_SECONDS, POLL_SECONDS, Node, overlay, prepare, wait_until
from tests.support.tap import Tap

CHAT = "/v1/chat/completions"
NETWORK_PORT = 8080
"""Where nodes in namespaces listen: there everybody has all ports."""

NO_MODELS: dict[str, Any] = {"models": []}


@dataclass(frozen=True)
class Place:
    """Where a node runs: where it listens and what peers dial (both "host:port"), what goes before its
    command, and the URL that the test reaches it by, None where that is the one that it prints."""

    listen: str
    address: str
    prefix: tuple[str, ...] = ()
    url: str | None = None


class Member:
    """One node of a mesh through all its lives. `node` is the present life, or the last one."""

    def __init__(self, name: str, directory: Path, place: Place, start: Mapping[str, Any]) -> None:
        self.id = name
        self.directory = directory
        self.place = place
        self.lives: list[Node] = []
        # What `prepare` takes.
        self._start = dict(start)

    @property
    def node(self) -> Node:
        """The newest life."""
        return self.lives[-1]

    @property
    def keys(self) -> Path:
        """Its key store."""
        return self.directory / "keys"

    @property
    def running(self) -> bool:
        """Whether it lives (it may be frozen)."""
        return bool(self.lives) and self.node.returncode is None

    def change(self, config: Mapping[str, Any] | None = None, **more: Any) -> None:
        """Change what its next life starts with: a document over its `config`, or others of `prepare`."""
        self._start["config"] = overlay(self._start["config"], config or {})
        self._start.update(more)

    async def start(self) -> Node:
        """Begin a life, and wait until it listens."""
        assert not self.running, f"{self.id} runs already"
        command, directory, environment = prepare(self.directory, **self._start)
        node = Node([*self.place.prefix, *command], directory, environment)
        self.lives.append(node)
        told = str((await node.wait_event("listening"))["url"])
        node.url = self.place.url or told
        node.client.base_url = httpx.URL(node.url)
        return node

    async def stop(self, number: int = signal.SIGTERM) -> int:
        """Ask it to end, and wait for it; the exit code."""
        return await self.node.stop(number)

    async def kill(self) -> None:
        """Pull its plug. Its children go with it."""
        children = self.node.children()
        self.node.send_signal(signal.SIGKILL)
        await self.node.wait_end(children)

    async def restart(self, number: int = signal.SIGTERM) -> Node:
        """End this life with a signal and begin the next, in the same directory, at the same address."""
        if self.running:
            await self.stop(number)
        return await self.start()

    def freeze(self) -> None:
        """Stop it (not its children) in the middle of whatever it does; connections stay."""
        self.node.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self.node.send_signal(signal.SIGCONT)

    async def get(self, path: str) -> Any:
        """The document of a GET that must succeed."""
        reply = await self.node.client.get(path)
        assert reply.status_code == 200, (self.id, path, reply.text)
        return reply.json()

    async def ask(self, model: str, *, stream: bool = False, **more: Any) -> Answer:
        """One chat, to its end. A stream that is cut raises httpx.RemoteProtocolError.

        `headers` and `words` (the question) are taken out of `more`, the rest goes into the body.
        """
        async with self._posted(model, stream=stream, **more) as reply:
            body = await reply.aread()
        return read_answer(reply.status_code, reply.headers, body)

    @contextlib.asynccontextmanager
    async def talking(self, model: str, **more: Any) -> AsyncIterator[Talk]:
        """A streamed chat that was accepted, to read word by word. Leaving the block closes the connection.

        Takes what `ask` takes.
        """
        async with self._posted(model, stream=True, **more) as reply:
            assert reply.status_code == 200, (self.id, (await reply.aread()).decode())
            async with reading(reply) as talk:
                yield talk

    @contextlib.asynccontextmanager
    async def _posted(self, model: str, *, stream: bool, **more: Any) -> AsyncIterator[httpx.Response]:
        headers, words = more.pop("headers", {}), more.pop("words", "hi")
        messages = [{"role": "user", "content": words}]
        body = {"model": model, "messages": messages, "max_tokens": 5, "temperature": 0, **more}
        if stream:
            body["stream"] = True
        async with self.node.client.stream("POST", CHAT, json=body, headers=headers) as reply:
            yield reply

    async def nodes(self) -> dict[str, dict[str, Any]]:
        """What its `/cluster/nodes` says of each."""
        document: dict[str, dict[str, Any]] = (await self.get("/cluster/nodes"))["nodes"]
        return document

    async def models(self) -> dict[str, dict[str, Any]]:
        """The entries of its `/v1/models`, by id."""
        return {entry["id"]: entry for entry in (await self.get("/v1/models"))["data"]}

    async def wait_said(self, *parts: str, level: str | None = None) -> dict[str, Any]:
        """The first line that its present life logs (at that level) with all of these in it."""
        found: list[dict[str, Any]] = []

        def said() -> bool:
            found.extend(
                entry
                for entry in self.node.events
                if entry.get("level") == (level or entry.get("level"))
                and all(part in json.dumps(entry) for part in parts)
            )
            return bool(found)

        await wait_until(said, lambda: f"{self.id} never says {parts}:\n{self.said()[-4000:]}")
        return found[0]

    def said(self) -> str:
        """All that its lives wrote on stdout and stderr."""
        return "\n".join(
            line for node in self.lives for line in (*map(json.dumps, node.events), *node.errors)
        )


class Mesh:
    """Members by node id, and what is to hold between them. `taps` are those in front of them, if any."""

    def __init__(self, members: Mapping[str, Member], taps: Mapping[str, Tap], token: str | None) -> None:
        self.members = dict(members)
        self.taps = dict(taps)
        self.token = token

    def __getitem__(self, name: str) -> Member:
        return self.members[name]

    def __iter__(self) -> Iterator[Member]:
        return iter(self.members.values())

    @property
    def running(self) -> list[Member]:
        """Those who live."""
        return [member for member in self if member.running]

    async def start(self, *names: str) -> None:
        """Start these, all at once."""
        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(self[name].start)

    async def wait_joined(self, *names: str) -> None:
        """Wait until each of these (all who live) says that exactly these are there, and ready."""
        group = set(names) or {member.id for member in self.running}

        async def joined(member: Member) -> bool:
            nodes = await member.nodes()
            return set(nodes) == group and all(status["ready"] for status in nodes.values())

        for name in group:
            await self._wait(self[name], joined, f"sees {sorted(group)}, ready")

    async def wait_gone(self, *gone: str, by: Collection[str] = ()) -> None:
        """Wait until none of `by` (all others who live) names one of these any more."""
        for name in by or [member.id for member in self.running if member.id not in gone]:

            async def rid(member: Member) -> bool:
                return not set(gone) & set(await member.nodes())

            await self._wait(self[name], rid, f"is rid of {sorted(gone)}")

    async def wait_listed(self, model: str, *, at: str, by: str | None) -> dict[str, Any]:
        """Wait until `at` lists a model that node `by` has (None: until it lists it no more); the entry."""
        entries: dict[str, Any] = {}

        async def listed(member: Member) -> bool:
            entries.clear()
            entries.update(await member.models())
            entry = entries.get(model)
            if entry is None or by is None:
                return entry is None and by is None
            return by in (entry["owned_by"], *entry["metadata"].get("nodes", ()))

        await self._wait(self[at], listed, f"lists {model} of {by}")
        entry: dict[str, Any] = entries.get(model, {})
        return entry

    def secrets(self) -> list[bytes]:
        """What nobody may find anywhere: token and private keys, as text and as bytes."""
        found = set[bytes]()
        for member in self:
            for path in member.keys.glob("*") if member.keys.is_dir() else ():
                if path.name.startswith(("node.key", "cluster_token")) and not path.name.endswith(".lock"):
                    found.add(path.read_bytes().strip())
        if self.token is not None:
            found.add(self.token.encode())
        with contextlib.suppress(ValueError):
            found |= {base64.b64decode(text, validate=True) for text in tuple(found)}
        return sorted(found)

    async def _wait(self, member: Member, condition: Callable[[Member], Awaitable[bool]], what: str) -> None:
        with trio.move_on_after(PATIENCE_SECONDS):
            while not await condition(member):
                await trio.sleep(POLL_SECONDS)
            return
        seen = {
            other.id: {name: status["ready"] for name, status in (await other.nodes()).items()}
            for other in self.running
        }
        raise AssertionError(
            f"never: {member.id} {what}; who sees whom, ready: {seen}\n{member.said()[-4000:]}"
        )


@contextlib.asynccontextmanager
async def running_mesh(
    directory: Path,
    cookbooks: Mapping[str, Mapping[str, Any]],
    config: Mapping[str, Any] | None = None,
    *,
    each: Mapping[str, Mapping[str, Any]] | None = None,
    peers: Mapping[str, Sequence[str]] | None = None,
    token: str | None = "fresh",
    env: Mapping[str, str] | None = None,
    binary_path: Path | None = None,
    net: Network | None = None,
    tapped: bool = False,
    start: Collection[str] | None = None,
) -> AsyncIterator[Mesh]:
    """Start a node for each cookbook, by node id, and wait until all listen (not until they have met).

    `config` is laid over the default of all, `each` over that of single ones, by node id. `peers` says whose
    addresses a node is given (ids, or addresses as they are), by default all others'. `token` goes into each
    key store; None lets each node make one of its own. With `net` each node runs on the host of its id
    there, else on loopback. `tapped` puts a tap in front of each node, which is the address that its peers
    get; reaching a node past its tap is possible, so don't tell anybody. `start` names those who start now.
    """
    token = base64.b64encode(secrets.token_bytes(32)).decode() if token == "fresh" else token
    async with contextlib.AsyncExitStack() as stack:
        places = {name: _place(name, net, stack) for name in cookbooks}
        taps = {name: stack.enter_context(Tap(places[name].address)) for name in cookbooks if tapped}
        addresses = {name: places[name].address for name in cookbooks}
        addresses |= {name: tap.address for name, tap in taps.items()}
        members: dict[str, Member] = {}
        for name, recipes in cookbooks.items():
            known = [other for other in cookbooks if other != name] if peers is None else peers.get(name, ())
            settings: dict[str, Any] = {
                "node_id": name,
                "listen_addr": places[name].listen,
                # A frozen or dead peer is to be noticed in the time of a test.
                "cluster": {
                    "enabled": True,
                    "peers": [addresses.get(peer, peer) for peer in known],
                    "gossip_interval_seconds": 0.2,
                    "discovery": {"mdns": False},
                },
            }
            if tapped:
                settings["public_url"] = f"http://{addresses[name]}"
            for top in (config or {}, (each or {}).get(name, {})):
                settings = overlay(settings, top)
            given = {"cookbook": recipes, "config": settings, "binary_path": binary_path, "env": env}
            members[name] = Member(name, directory / name, places[name], given)
            if token is not None:
                write_token(members[name].keys, token)
        mesh = Mesh(members, taps, token)
        stack.push_async_callback(_close, mesh)
        await mesh.start(*(cookbooks if start is None else start))
        yield mesh


def write_token(keys: Path, token: str) -> None:
    """Put a cluster token into a key store, with the modes that a node wants."""
    keys.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = keys / "cluster_token"
    path.touch(mode=0o600)
    path.write_text(token + "\n")


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A loopback port that is free for who asks for it by number, and for nobody else, during the block.

    It is bound here and not listened on: with SO_REUSEADDR others may bind it, too, but the system gives it
    to nobody who asks for any.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield int(holder.getsockname()[1])


def _place(name: str, net: Network | None, stack: contextlib.AsyncExitStack) -> Place:
    if net is None:
        address = f"127.0.0.1:{stack.enter_context(reserved_port())}"
        return Place(address, address)
    host = net[name]
    # To the node a request of the test comes from its own loopback, so it may administer.
    door = stack.enter_context(Tap(connect=lambda: _knock(host)))
    return Place(
        f"0.0.0.0:{NETWORK_PORT}", f"{host.ip}:{NETWORK_PORT}", host.prefix, f"http://{door.address}"
    )


def _knock(host: Host) -> socket.socket:
    try:
        return host.connect(NETWORK_PORT)
    except OSError:
        return host.connect(NETWORK_PORT, "::1")


async def _close(mesh: Mesh) -> None:
    with trio.CancelScope(shield=True):
        for member in mesh:
            for node in member.lives:
                await node.close()
