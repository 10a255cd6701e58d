"""What an operator sees, put together: the state, its stream, logs, and instances spoken to directly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import trio

from llamesh.config.store import Store
from llamesh.dispatch import Dispatch
from llamesh.local.pool import Pool
from llamesh.telemetry import logs
from llamesh.telemetry.feed import TOLD
from llamesh.telemetry.learned import LearnedValues
from llamesh.telemetry.stats import NodeStats
from llamesh.web import logs_stream, upstream
from llamesh.web.admin import Administration
from llamesh.web.direct import Direct
from llamesh.web.gateway import Gateway
from llamesh.web.logs_stream import LogStream
from llamesh.web.mcp import endpoint
from llamesh.web.mesh_pages import MeshPages
from llamesh.web.mesh_state import MeshRoute, PeerStates
from llamesh.web.pages import CREATED
from llamesh.web.prewarm import Prewarm
from llamesh.web.state import OwnState
from llamesh.web.state_routes import StateApi, StreamHandler
from llamesh.web.upstream import OfModel, Upstream

if TYPE_CHECKING:
    from llamesh.mesh.mesh import Mesh


class _Cluster(Protocol):
    """What is needed of the mesh's side of the node."""

    mesh: Mesh
    routes: dict[str, MeshRoute]


class Views:
    """See the module."""

    def __init__(
        self,
        store: Store,
        pool: Pool,
        dispatch: Dispatch,
        stats: NodeStats,
        learned: LearnedValues,
        gateway: Gateway,
        prewarm: Prewarm,
        administration: Administration,
    ) -> None:
        access, recorder = gateway.access, gateway.recorder
        self.own = OwnState(store, pool, dispatch, stats, learned, recorder)
        self.api = StateApi(self.own, access)
        self.logs = LogStream(pool, dispatch, access, lambda: self.own.node_id)
        self.mcp = endpoint.McpEndpoint(access, self.api, self.logs, administration, gateway.audit)
        raw = Upstream(store, pool, dispatch, prewarm, access, gateway.audit)
        self.own.attention.audit = gateway.audit
        self.direct = Direct(
            {
                "/api/v1/state/stream": StreamHandler(self.api.stream, access),
                logs_stream.PREFIX: self.logs,
                endpoint.PATH: self.mcp,
                endpoint.PATH + "/": self.mcp,
            },
            {logs_stream.PREFIX + "/": self.logs, upstream.PREFIX: raw},
            {path: OfModel(raw, access, autoload=path == "/props") for path in upstream.OF_MODEL},
        )

    def join(self, cluster: _Cluster) -> None:
        """The node is part of a mesh: what the others say of themselves is shown as well."""
        peers = PeerStates(cluster.mesh, MeshPages(cluster.mesh, CREATED))
        self.api.join(peers)
        self.logs.ask_one = peers.ask_one
        cluster.routes.update({**self.api.mesh_routes(), **self.logs.mesh_routes()})

    async def run(self) -> None:
        """What goes on all the time: history, the stream, the log's lines that are events, `/mcp` once it is
        used.
        """
        stop = logs.listen(self.own.recorder.hear, TOLD)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.mcp.serve)
                await self.api.run()
        finally:
            stop()
