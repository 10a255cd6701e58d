"""What this node says of itself when it meets another, and what it makes of the other's words."""

from __future__ import annotations

import ipaddress
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

import trio

import llamesh
from llamesh.config.settings import Settings
from llamesh.config.values import Address
from llamesh.core.offers import NodeEntry
from llamesh.mesh.dialler import outcome_of
from llamesh.mesh.hello import Hello, Welcome
from llamesh.mesh.identity import Identity
from llamesh.mesh.interfaces import announceable
from llamesh.mesh.mentions import Mentions
from llamesh.mesh.noise import HandshakeFailed
from llamesh.mesh.noise_transport import NoiseTransport
from llamesh.mesh.stream import accept
from llamesh.mesh.trust import Claim, ItsMe, NotTrusted
from llamesh.telemetry.logs import get_logger

log = get_logger("mesh")

# Addresses that others saw us come from, the latest ones: of a home with a forwarded port there is one.
_MOST_SEEN = 4

# An interface comes or goes; looking costs some milliseconds.
_LOOK_SECONDS = 10.0

# Of "host:port": a stranger that knocks again has another port.
_PORT = re.compile(r":\d{1,5}\b")


class Greeting:
    """See the module. `port` is set when the node listens; 0: nobody can dial it. `url`: of its API,
    as its own listener has it."""

    def __init__(self, settings: Settings, identity: Identity, epoch: int) -> None:
        self.port = 0
        self.engine = self.engine_version = self.url = ""
        self._settings = settings
        self._identity = identity
        self._epoch = epoch
        self._started = time.time()
        self._listening: tuple[str, ...] = ()
        self._hosts: tuple[str, ...] = ()
        self._looked = float("-inf")
        self._seen: dict[str, None] = {}
        self._outcomes: Counter[str] = Counter()
        self._mentions = Mentions()

    @property
    def outcomes(self) -> Mapping[str, int]:
        """How handshakes went that others began: see `dialler.outcome_of`, and "ok"."""
        return MappingProxyType(self._outcomes)

    def listens(self, addresses: Sequence[Any]) -> None:
        """Where peers may dial: what the listening sockets are bound to, all to the same port."""
        self._listening = tuple(str(address[0]) for address in addresses)
        self.port = int(addresses[0][1]) if addresses else 0
        self._looked = float("-inf")

    def hosts(self) -> tuple[str, ...]:
        """The addresses of this machine under which others may reach it."""
        now = trio.current_time()
        if now - self._looked > _LOOK_SECONDS:
            self._looked = now
            interfaces = self._settings.cluster.discovery.interfaces
            found = [announceable(interfaces, host) for host in self._listening]
            self._hosts = tuple(dict.fromkeys(host for hosts in found for host in hosts))
        return self._hosts

    def addresses(self) -> tuple[str, ...]:
        """The same with the port, the configured public one first, those that others saw last."""
        found: dict[str, None] = {}
        public = self._public()
        if public:
            found[public] = None
        if self.port:
            for host in (*self.hosts(), *self._seen):
                found[str(Address(host, self.port))] = None
        return tuple(found)[:32]

    def _public(self) -> str:
        url = self._settings.public_url
        if not url:
            return ""
        parts = urlsplit(str(url))
        own = self._settings.cluster.listen_addr
        port = own.port if own is not None and own.port else parts.port
        return str(Address(parts.hostname or "", port or (443 if parts.scheme == "https" else 80)))

    def seen_from(self, address: str) -> None:
        """A peer says where it sees us: where we dial out from, maybe with a forwarded port behind it."""
        host = address.rpartition(":")[0].strip("[]")
        # A listener on one address hears nobody who dials another.
        if not any(map(_is_wildcard, self._listening)) or not _is_global(host) or host in self.hosts():
            return
        self._seen.pop(host, None)
        while len(self._seen) >= _MOST_SEEN:
            del self._seen[next(iter(self._seen))]
        self._seen[host] = None

    def hello(self, purpose: str) -> Hello:
        """What is said when we dial."""
        return Hello(
            self._identity.node_id,
            purpose,
            llamesh.__version__,
            self._epoch,
            port=self.port,
            addresses=self.addresses(),
        )

    def _welcome(self, hello: Hello, address: str) -> Welcome:
        self.check_version(hello)
        return Welcome(
            self._identity.node_id,
            llamesh.__version__,
            self._epoch,
            seen_from=address,
            port=self.port,
            addresses=self.addresses(),
        )

    def entry(self, cut: tuple[str, ...]) -> NodeEntry:
        """The node's own entry in its gossiped state."""
        return NodeEntry(
            version=llamesh.__version__,
            engine=self.engine,
            engine_version=self.engine_version,
            addresses=self.addresses(),
            url=self.api_url(),
            started=self._started,
            cut=cut,
        )

    def api_url(self) -> str:
        """Where others find this node's API, as far as is known: a listener on all addresses names none."""
        parts = urlsplit(self.url)
        if not _is_wildcard(parts.hostname or ""):
            return self.url
        hosts = self.hosts()
        return f"{parts.scheme}://{Address(hosts[0], parts.port or 80)}" if hosts else ""

    def check_version(self, remote: Hello | Welcome) -> None:
        """`cluster.version_mismatch_action`. Raises NotTrusted."""
        ours, theirs = llamesh.__version__, remote.version
        if ours == theirs:
            return
        action = self._settings.cluster.version_mismatch_action
        major = ours.partition(".")[0] != theirs.partition(".")[0]
        if action == "reject_any" or (action == "reject_major" and major):
            raise NotTrusted(
                f"node {self._identity.node_id} has version {ours}, node {remote.node_id} has {theirs}, and "
                f"cluster.version_mismatch_action is {action}: update the older one"
            )
        self._mention(
            f"version of {remote.node_id}",
            "another version",
            peer=remote.node_id,
            version=theirs,
            ours=ours,
        )

    async def accept(
        self, sock: socket.socket, read_before: bytes, check: Callable[[Claim], None]
    ) -> NoiseTransport | None:
        """The acceptor's side of a handshake. None when it failed, which is logged with a limit."""
        try:
            stream = await accept(sock, read_before, self._identity, self._welcome, check)
        except (NotTrusted, HandshakeFailed, OSError) as error:
            self._outcomes[outcome_of(error)] += 1
            text = str(error)
            if isinstance(error, NotTrusted):
                if not isinstance(error, ItsMe):
                    self._mention(_PORT.sub("", text), "a node wasn't let in", problem=text)
            elif isinstance(error, HandshakeFailed) and error.reason != "closed":
                host = text.partition(": ")[0].rpartition(":")[0]
                self._mention(f"{host} {error.reason}", "a handshake failed", problem=text)
            else:
                log.debug("connection lost", error=text)
            return None
        self._outcomes["ok"] += 1
        return stream

    @staticmethod
    def claim(stream: NoiseTransport) -> Claim:
        """What the handshake proved."""
        remote = stream.remote
        return Claim(remote.node_id, stream.remote_key, remote.previous_key, stream.address)

    def _mention(self, key: str, event: str, **fields: str) -> None:
        if self._mentions.due(key):
            log.warning(event, **fields)


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _is_global(host: str) -> bool:
    """Whether it says anything to other machines."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return not (
        address.is_loopback or address.is_link_local or address.is_unspecified or address.is_multicast
    )
