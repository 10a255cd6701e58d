"""Asking peers for weights, and giving them.

    POST /mesh/weights            {"sha256": [...]} -> {"have": {sha256: bytes}}
                                  {"repo": "owner/name"} -> {"commit": "...", "files": [{name, size, sha256}]}
    GET /mesh/weights/SHA256      the file, or a range of it

Peers are asked when a download begins and not before: in the steady state this costs nothing. What they say
is checked as if they were strangers, and what they give by its hash.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import Annotated, TypeAlias

import msgspec
import trio

from llamesh.config.model_names import BadName, check_file
from llamesh.core.model_files import RemoteFile
from llamesh.errors import InvalidRequest
from llamesh.local.weights.shared import Shared, SharedFile
from llamesh.local.weights.source import SizedSource
from llamesh.mesh.blocking import BlockingLink
from llamesh.mesh.calls import call
from llamesh.mesh.peer import Peer
from llamesh.mesh.peers import Peers
from llamesh.net.exchange import UpstreamBroken
from llamesh.sharing.peer_source import PeerSource
from llamesh.telemetry.logs import get_logger

log = get_logger("weights")

PATH = "/mesh/weights"

# So many are asked at once, and may take so long. Who is slower has no file quickly either.
_MOST_ASKED = 32
_ASK_SECONDS = 2.0
_DIAL_SECONDS = 5.0
# Between two pieces of an answer. A LAN isn't silent for so long; a node that died is.
_SILENCE_SECONDS = 10.0

# What this node's own disk may take to answer a peer.
_DISK_SECONDS = 10.0

_MOST_FILES = 2_000
_DISTRUST_SECONDS = 3600.0

_COMMIT = re.compile(r"[0-9a-f]{40}")
_Sha256: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
_Size: TypeAlias = Annotated[int, msgspec.Meta(gt=0, le=1 << 44)]


class _Question(msgspec.Struct):
    sha256: Annotated[list[_Sha256], msgspec.Meta(max_length=64)] = []
    repo: Annotated[str, msgspec.Meta(max_length=200)] = ""


class _File(msgspec.Struct, frozen=True):
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
    size: _Size
    sha256: _Sha256


class _Answer(msgspec.Struct, omit_defaults=True):
    have: Annotated[dict[_Sha256, _Size], msgspec.Meta(max_length=64)] = {}
    commit: Annotated[str, msgspec.Meta(max_length=40)] = ""
    files: Annotated[list[_File], msgspec.Meta(max_length=_MOST_FILES)] = []


_questions = msgspec.json.Decoder(_Question)
_answers = msgspec.json.Decoder(_Answer)


class PeerWeights:
    """See the module: `Neighbours` for the downloads here, answers for those elsewhere."""

    def __init__(self, peers: Peers, shared: Shared, unwilling: Callable[[], str]) -> None:
        """`unwilling()`: why nothing is done for peers, "" when it is."""
        self._peers = peers
        self._shared = shared
        self._unwilling = unwilling
        self._threads = trio.CapacityLimiter(2)
        self._distrusted: dict[tuple[str, str], float] = {}
        self._turn = 0

    # For our downloads.

    async def having(self, sha256: str) -> list[SizedSource]:
        """See `Neighbours.having`."""
        told = await self._ask_all(_Question(sha256=[sha256]))
        token = trio.lowlevel.current_trio_token()
        found: list[SizedSource] = []
        for peer, answer in told:
            size = answer.have.get(sha256)
            if size is None or self._is_distrusted(peer.node, sha256):
                continue
            found.append(PeerSource(f"node {peer.node}", sha256, size, self._opener(peer.node), token))
        # Files that follow each other come from one peer after the other.
        self._turn += 1
        turn = self._turn % len(found) if found else 0
        return [*found[turn:], *found[:turn]]

    async def listings(self, repo: str) -> list[tuple[str, tuple[RemoteFile, ...]]]:
        """See `Neighbours.listings`."""
        votes: dict[str, Counter[_File]] = {}
        nodes = Counter[str]()
        for peer, answer in await self._ask_all(_Question(repo=repo)):
            if not _COMMIT.fullmatch(answer.commit):
                continue
            for file in answer.files:
                try:
                    check_file(file.name)
                except BadName as error:
                    log.warning("a peer tells of a file that can't be", peer=peer.node, problem=error.message)
                    continue
                votes.setdefault(answer.commit, Counter())[file] += 1
            nodes[answer.commit] += 1
        found = []
        for commit, _ in nodes.most_common():
            # Of two that have the same name, what more peers say.
            files: dict[str, _File] = {}
            for file, _ in votes.get(commit, Counter[_File]()).most_common():
                files.setdefault(file.name, file)
            if files:
                remote = [RemoteFile(one.name, one.size, sha256=one.sha256) for one in files.values()]
                found.append((commit, tuple(sorted(remote, key=lambda one: one.name))))
        return found

    def distrust(self, names: Iterable[str], sha256: str) -> None:
        """See `Neighbours.distrust`."""
        until = trio.current_time() + _DISTRUST_SECONDS
        now = trio.current_time()
        self._distrusted = {key: when for key, when in self._distrusted.items() if when > now}
        for name in names:
            self._distrusted[name, sha256] = until

    def _is_distrusted(self, node: str, sha256: str) -> bool:
        return self._distrusted.get((f"node {node}", sha256), 0.0) > trio.current_time()

    def _opener(self, node: str) -> Callable[[bool], Awaitable[BlockingLink]]:
        async def open_link(fresh: bool) -> BlockingLink:
            peer = self._peers.get(node)
            if peer is None or not peer.alive:
                raise OSError(f"node {node} is gone")
            try:
                with trio.fail_after(_DIAL_SECONDS):
                    connection = await peer.links.take(fresh=fresh)
                    stream = peer.links.lend(connection)
            except (UpstreamBroken, trio.TooSlowError) as error:
                raise OSError(f"node {node} can't be reached: {error}") from None
            return BlockingLink(stream, _SILENCE_SECONDS)

        return open_link

    async def _ask_all(self, question: _Question) -> list[tuple[Peer, _Answer]]:
        """What those say that answer in time; nearest first."""
        body = msgspec.json.encode(question)
        near = sorted(
            (peer for peer in self._peers if peer.alive and peer.direct and peer.links.reachable),
            key=lambda peer: peer.rtt_ms,
        )[:_MOST_ASKED]
        found: dict[str, _Answer] = {}

        async def ask(peer: Peer) -> None:
            try:
                status, data = await call(peer.links, "POST", PATH, body, seconds=_ASK_SECONDS)
                if status == 200:
                    found[peer.node] = _answers.decode(data)
            except (UpstreamBroken, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                log.debug("a peer didn't say what weights it has", peer=peer.node, error=str(error))

        async with trio.open_nursery() as nursery:
            for peer in near:
                nursery.start_soon(ask, peer)
        return [(peer, found[peer.node]) for peer in near if peer.node in found]

    # For downloads of others.

    async def answer(self, body: bytes) -> tuple[int, bytes]:
        """What is here of what a peer asks for. Raises InvalidRequest."""
        try:
            question = _questions.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidRequest(f"not a question about weights: {error}") from None
        answer = _Answer()
        if not self._unwilling():
            with trio.move_on_after(_DISK_SECONDS):
                answer = await trio.to_thread.run_sync(
                    self._look, question, abandon_on_cancel=True, limiter=self._threads
                )
        return 200, msgspec.json.encode(answer)

    async def open(self, sha256: str) -> SharedFile | None:
        """A file for `PeerFiles`."""
        abandoned = False

        def in_thread() -> SharedFile | None:
            file = self._shared.open(sha256)
            if abandoned and file is not None:
                file.close()
                return None
            return file

        try:
            return await trio.to_thread.run_sync(in_thread, abandon_on_cancel=True, limiter=self._threads)
        except BaseException:
            abandoned = True
            raise

    def _look(self, question: _Question) -> _Answer:
        sizes = {sha256: self._shared.size(sha256) for sha256 in question.sha256}
        have = {sha256: size for sha256, size in sizes.items() if size}
        if not question.repo:
            return _Answer(have)
        commit, files = self._shared.files(question.repo)
        shown = [_File(one.name, one.size, one.sha256 or "") for one in files[:_MOST_FILES]]
        return _Answer(have, commit, shown)
