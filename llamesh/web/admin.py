"""What an operator can tell a node to do: `POST /admin/...`, some also by the names of llama.cpp's router."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec
import trio
from quart_trio import QuartTrio

from llamesh.config.cookbook import Profile
from llamesh.config.problems import ConfigError
from llamesh.config.store import Store
from llamesh.core.cost import Features
from llamesh.core.lifecycle import State
from llamesh.core.routing import route
from llamesh.dispatch import Dispatch
from llamesh.errors import (
    Draining,
    InvalidRequest,
    LlameshError,
    ModelNotFound,
    NoCapacity,
    QueueFull,
    QueueTimeout,
    SpawnFailed,
    UpstreamError,
    UpstreamTimeout,
)
from llamesh.local.builds.manager import BuildManager
from llamesh.local.keeper import Keeper
from llamesh.local.pool import Pool
from llamesh.net.exchange import UpstreamBroken
from llamesh.telemetry.logs import get_logger
from llamesh.web.prewarm import Prewarm

if TYPE_CHECKING:
    from llamesh.mesh.mesh import Mesh

log = get_logger("admin")

Document = dict[str, Any]

# status, answer
Answer = tuple[int, Document]

Act = Callable[[Document], Awaitable[Answer]]

# States in which an instance can be told to leave.
_THERE = (State.STARTING, State.READY, State.DRAINING)

# The longest load that anybody waits for over the mesh.
_PREWARM_SECONDS = 3600.0

_FOREVER_SECONDS = 100 * 365 * 86400

# What a prewarm may come to at a peer.
_ERRORS: tuple[type[LlameshError], ...] = (
    InvalidRequest,
    ModelNotFound,
    QueueFull,
    QueueTimeout,
    Draining,
    NoCapacity,
    SpawnFailed,
    UpstreamError,
    UpstreamTimeout,
)


class Administration:
    """The acts, each a method from the request's JSON object to status and answer. Raises LlameshError."""

    def __init__(
        self,
        store: Store,
        pool: Pool,
        dispatch: Dispatch,
        prewarm: Prewarm,
        keeper: Keeper,
        builds: BuildManager,
    ) -> None:
        self._store = store
        self._pool = pool
        self._dispatch = dispatch
        self._prewarm = prewarm
        self._keeper = keeper
        self.mesh: Mesh | None = None
        self._builds = builds

    async def prewarm(self, document: Document) -> Answer:
        """`{"model", "wait": true}`: load it; answers when it is ready, or at once with 202. With `"node"`
        there; a model that only peers have is loaded at one of them.
        """
        wait = document.get("wait", True)
        if not isinstance(wait, bool):
            raise InvalidRequest("`wait` must be true or false", param="wait")
        node = self._node_for(document)
        if node is not None:
            return await self._ask_peer(node, document)
        outcome = await self._prewarm.run(self._wanted(document), wait=wait)
        return (200 if outcome["status"] == "loaded" else 202), outcome

    def _node_for(self, document: Document) -> str | None:
        """The peer that is to load it, None for this node."""
        current, node, name = self._store.current, document.get("node"), document.get("model")
        if node is not None and (not isinstance(node, str) or not node):
            raise InvalidRequest("`node` must be the id of a node, see GET /cluster/nodes", param="node")
        if node is not None:
            return None if node == current.settings.node_id else node
        if self.mesh is None or not isinstance(name, str):
            return None
        profile = current.cookbook.find(name)
        if profile is not None and profile.max_instances != 0:
            return None
        profile = profile or self.mesh.peers.find(name)
        if profile is None or not self.mesh.peers.has(profile.key):
            return None
        choice = route(None, self.mesh.peers.outlooks(profile.key, ()), Features())
        if not choice.node:
            why = self.mesh.peers.explain(profile.key) or "no node that has it runs it"
            raise NoCapacity(f"{profile.key} can't be loaded anywhere now: {why}", param="model")
        return choice.node

    async def _ask_peer(self, node: str, document: Document) -> Answer:
        peer = self.mesh.peers.get(node) if self.mesh is not None else None
        if self.mesh is None or peer is None or not (peer.alive or peer.wake_mac):
            raise InvalidRequest(
                f"there is no node {node[:64]!r} in the mesh now; see GET /cluster/nodes", param="node"
            )
        from llamesh.mesh.calls import call

        body = msgspec.json.encode({name: value for name, value in document.items() if name != "node"})
        try:
            if not peer.alive:
                await self.mesh.peers.wake(peer)
            status, data = await call(peer.links, "POST", "/mesh/prewarm", body, seconds=_PREWARM_SECONDS)
            answer = msgspec.json.decode(data, type=dict[str, Any])
        except (UpstreamBroken, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise UpstreamError(f"node {node} didn't take the prewarm: {error}") from None
        if status not in (200, 202):
            raise _passed_on(node, status, answer)
        return status, {**answer, "node": node}

    async def load_one(self, document: Document) -> Answer:
        """The same as llama.cpp's router says it: it answers at once, and with `success`."""
        _, outcome = await self.prewarm({"wait": False, **document})
        return 200, {"success": True, **outcome}

    async def unload(self, document: Document) -> Answer:
        """`{"model"}`, or `{}` for all: their instances end after their requests."""
        if document and "model" not in document:
            # A slip of the pen must not mean all of them.
            raise InvalidRequest(
                "`model` must name a model; without any member, all are meant", param="model"
            )
        if document:
            key = self._wanted(document).key
            leaving = [i for i in self._pool.instances(key) if i.state in _THERE]
        else:
            leaving = [i for i in self._pool.all() if i.state in _THERE]
        ids = tuple(i.id for i in leaving)
        self._pool.drain(ids, "unloaded on request", cause="unload")
        return 200, {"unloading": list(ids)}

    async def unload_one(self, document: Document) -> Answer:
        """The same as llama.cpp's router says it: always one model."""
        self._wanted(document)
        _, outcome = await self.unload(document)
        return 200, {"success": True, **outcome}

    async def drain(self, document: Document) -> Answer:
        """Take no new requests until `undrain`; those that are here are finished."""
        self._dispatch.drained = True
        log.info("drained on request")
        return 200, {"status": "draining"}

    async def undrain(self, document: Document) -> Answer:
        """Take requests again."""
        self._dispatch.drained = False
        log.info("undrained on request")
        return 200, {"status": "draining" if self._dispatch.closed else "ready"}

    async def pause(self, document: Document) -> Answer:
        """`{"seconds": N}`: give the machine back for so long; without it until `{"seconds": 0}`."""
        seconds = document.get("seconds", math.inf)
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds >= 0:
            raise InvalidRequest("`seconds` must be a number, 0 or more", param="seconds")
        if document and "seconds" not in document:
            raise InvalidRequest("`seconds` says for how long; without any member, until the end is told")
        # A hundred years and more are until further notice; what is larger still isn't even a float.
        length = float(seconds) if seconds < _FOREVER_SECONDS else math.inf
        self._keeper.paused_until = trio.current_time() + length
        if length:
            log.info("paused on request", seconds=length if math.isfinite(length) else None)
        else:
            log.info("pause ended on request")
        self._keeper.tick()
        away = self._keeper.away()
        return 200, {"status": "paused" if away else "ready", "reason": away}

    async def reload(self, document: Document) -> Answer:
        """Read the files now; the answer says what changed. A bad file is a 400 that changes nothing."""
        try:
            change = await self._store.reload()
        except ConfigError as error:
            problems = [str(problem) for problem in error.problems[: ConfigError.SHOWN]]
            raise InvalidRequest(
                f"nothing was changed, since there are mistakes: {error}", extra={"problems": problems}
            ) from None
        return 200, {
            "added": list(change.added),
            "removed": list(change.removed),
            "changed": list(change.changed),
            "aliases": list(change.aliases),
            "settings": list(change.settings),
            "needs_restart": list(change.needs_restart),
        }

    async def rebuild(self, document: Document) -> Answer:
        """Look for a newer llama.cpp, build it and move over; answers at once. Raises Conflict."""
        self._builds.request()
        log.info("rebuild requested")
        return 202, {"status": "started"}

    async def builds(self, document: Document) -> Answer:
        """What the build manager does, and what came of the last build."""
        return 200, self._builds.document()

    def _wanted(self, document: Document) -> Profile:
        name = document.get("model")
        if not isinstance(name, str) or not name:
            raise InvalidRequest("`model` must name a model of GET /v1/models", param="model")
        current = self._store.current
        profile = current.cookbook.find(name)
        if profile is None:
            node = current.settings.node_id
            raise ModelNotFound(f"node {node} knows no model {name[:120]!r}", param="model")
        return profile


def _passed_on(node: str, status: int, answer: Document) -> LlameshError:
    """A peer's error, as ours: the same status, type and words."""
    error = answer.get("error")
    told = error if isinstance(error, dict) else {}
    message, kind, param = told.get("message"), told.get("type"), told.get("param")
    if not isinstance(message, str) or not isinstance(kind, str):
        return UpstreamError(f"node {node} answered the prewarm with status {status} and no reason")
    known = {one.type: one for one in _ERRORS if one.status == status}
    face = known.get(kind)
    if face is None:
        return UpstreamError(f"node {node} didn't take the prewarm ({kind[:64]}): {message[:2000]}")
    return face(message[:2000], param=param if isinstance(param, str) else None, extra={"node": node})


def routes_of(acts: Administration) -> dict[str, tuple[str, Act]]:
    """Every path of administration: its method, and the act."""
    return {
        "/admin/prewarm": ("POST", acts.prewarm),
        "/admin/unload": ("POST", acts.unload),
        "/admin/drain": ("POST", acts.drain),
        "/admin/undrain": ("POST", acts.undrain),
        "/admin/pause": ("POST", acts.pause),
        "/admin/reload": ("POST", acts.reload),
        "/admin/rebuild-llama": ("POST", acts.rebuild),
        "/admin/builds": ("GET", acts.builds),
        # By the names of llama.cpp's router, and of llama-swap.
        "/models/load": ("POST", acts.load_one),
        "/models/unload": ("POST", acts.unload_one),
        "/unload": ("GET", acts.unload),
    }


def add_admin_routes(app: QuartTrio, acts: Administration, perform: Callable[[Act], Awaitable[Any]]) -> None:
    """`perform` checks the caller, reads the JSON object, calls the act and makes the response."""
    add_acts(app, routes_of(acts), perform)


def add_acts(
    app: QuartTrio, acts: Mapping[str, tuple[str, Act]], perform: Callable[[Act], Awaitable[Any]]
) -> None:
    """The same for acts that others bring: path -> method and act."""
    for path, (method, act) in acts.items():

        async def view(act: Act = act) -> Any:
            return await perform(act)

        app.add_url_rule(path, endpoint=path, view_func=view, methods=[method])
