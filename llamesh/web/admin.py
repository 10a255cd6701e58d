"""What an operator can tell a node to do: `POST /admin/...`, some also by the names of llama.cpp's router.

Every act takes `"node": ID`: it is then performed by that node of the mesh, and the answer has `node`, too.
Without it this node is meant.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from quart_trio import QuartTrio

from llamesh.errors import InvalidRequest, ModelNotFound
from llamesh.web.own_acts import Answer, Document, OwnActs

if TYPE_CHECKING:
    from llamesh.web.peer_acts import ActName, PeerActs

Act = Callable[[Document], Awaitable[Answer]]


class Administration:
    """The acts, each a method from the request's JSON object to status and answer. Raises LlameshError.

    `peers`, set where there is a mesh, has other nodes act.
    """

    def __init__(self, own: OwnActs) -> None:
        self.own = own
        self.peers: PeerActs | None = None

    async def prewarm(self, document: Document) -> Answer:
        """`{"model", "wait": true}`: load it; answers when it is ready, or at once with 202. A model that
        only peers have is loaded at one of them, when no node is named.
        """
        name = document.get("model")
        if "node" not in document and self.peers is not None and isinstance(name, str):
            answer = await self.peers.prewarm_anywhere(name, document)
            if answer is not None:
                return answer
        return await self._perform("prewarm", document)

    async def load_one(self, document: Document) -> Answer:
        """The same as llama.cpp's router says it: it answers at once, and with `success`."""
        _, outcome = await self.prewarm({"wait": False, **_known(document, "model", "wait", "node")})
        return 200, {"success": True, **outcome}

    async def unload(self, document: Document) -> Answer:
        """`{"model"}`, or `{}` for all: their instances end after their requests. Where this node has none of
        the model, `loaded_on` (or the error) names the nodes that have.
        """
        elsewhere = self._loaded_on(document)
        try:
            status, answer = await self._perform("unload", document)
        except ModelNotFound as error:
            if not elsewhere:
                raise
            raise ModelNotFound(
                f"{error.message}; it is loaded on {', '.join(elsewhere)}: name one of them as `node`",
                param="model",
                extra={"loaded_on": elsewhere},
            ) from None
        if elsewhere and not answer["unloading"]:
            answer = {**answer, "loaded_on": elsewhere}
        return status, answer

    def _loaded_on(self, document: Document) -> list[str]:
        name = document.get("model")
        if "node" in document or self.peers is None or not isinstance(name, str):
            return []
        return self.peers.loaded_on(name)

    async def unload_one(self, document: Document) -> Answer:
        """The same as llama.cpp's router says it: always one model."""
        if not isinstance(document.get("model"), str):
            self.own.wanted(document)  # says what is missing
        _, outcome = await self.unload(_known(document, "model", "node"))
        return 200, {"success": True, **outcome}

    async def drain(self, document: Document) -> Answer:
        """Take no new requests until `undrain`; those that are here are finished."""
        return await self._perform("drain", document)

    async def undrain(self, document: Document) -> Answer:
        """Take requests again."""
        return await self._perform("undrain", document)

    async def pause(self, document: Document) -> Answer:
        """`{"seconds": N}`: give the machine back for so long; without it until `{"seconds": 0}`."""
        return await self._perform("pause", document)

    async def reload(self, document: Document) -> Answer:
        """Read the files now; the answer says what changed. A bad file is a 400 that changes nothing."""
        return await self._perform("reload", document)

    async def rebuild(self, document: Document) -> Answer:
        """Look for a newer llama.cpp, build it and move over; answers at once. Raises Conflict."""
        return await self._perform("rebuild-llama", document)

    async def builds(self, document: Document) -> Answer:
        """What the build manager does, and what came of the last build."""
        return await self._perform("builds", document)

    async def _perform(self, act: ActName, document: Document) -> Answer:
        """Here, or at the node that the document names."""
        if "node" not in document:
            return await self.own.perform(act, document)
        node = document["node"]
        if not isinstance(node, str) or not node:
            raise InvalidRequest("`node` must be the id of a node, see GET /cluster/nodes", param="node")
        rest = {name: value for name, value in document.items() if name != "node"}
        if node == self.own.node_id:
            status, answer = await self.own.perform(act, rest)
            return status, {**answer, "node": node}
        if self.peers is None:
            raise InvalidRequest(
                f"there is no node {node[:64]!r}: node {self.own.node_id} is alone, cluster.enabled is off",
                param="node",
            )
        return await self.peers.ask(node, act, rest)


def _known(document: Document, *members: str) -> Document:
    """Of what others' clients send, that which is understood."""
    return {name: document[name] for name in members if name in document}


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
