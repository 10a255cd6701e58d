"""Routes whose answers stream: served on ASGI directly, where an answer that breaks off can be cut and what
it holds is given back in one `finally`. The application's own routes answer in one piece.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import parse_qsl, unquote

from llamesh.errors import MethodNotAllowed
from llamesh.net.exchange import Headers
from llamesh.web.body import Body
from llamesh.web.caller import ANYBODY, Caller
from llamesh.web.sink import Sink


@dataclass(slots=True)
class Call:
    """One request. path: raw, without the query; client: its address; body: read when the handler runs;
    extra: headers that the answer gets, whatever it is; caller: who asks, set by the handler that checked it;
    most_bytes: of its body, where `admit` says less than http.request_body_limit_bytes.
    """

    method: str
    path: bytes
    query: bytes
    headers: Headers
    id: str
    client: str
    body: Body
    sink: Sink
    extra: Headers
    caller: Caller = ANYBODY
    most_bytes: int | None = None

    @property
    def loopback(self) -> bool:
        """Whether it comes from this machine."""
        try:
            return ipaddress.ip_address(self.client).is_loopback
        except ValueError:
            return False

    def header(self, name: bytes) -> str:
        """The value of a header (in lower case), "" without."""
        return next((value.decode("latin-1") for key, value in self.headers if key == name), "")

    def arguments(self) -> dict[str, str]:
        """The query; of a name that comes twice the last value."""
        pairs = parse_qsl(self.query.decode("latin-1"), keep_blank_values=True, max_num_fields=100)
        return dict(pairs)


class Handler(Protocol):
    """Answers one kind of path."""

    def admit(self, call: Call) -> None:
        """What can be refused before the body is read. Raises LlameshError."""

    async def run(self, call: Call) -> None:
        """Answer through `call.sink`. Raises LlameshError before it has started, OSError when the client is
        gone; cancelled when the client leaves.
        """


class Direct:
    """Which handler a path has. `exact` by whole paths, `prefixes` by how they begin, `of_model` by whole
    paths, only with `?model=`.
    """

    def __init__(
        self,
        exact: Mapping[str, Handler],
        prefixes: Mapping[str, Handler],
        of_model: Mapping[str, Handler],
    ) -> None:
        self._exact = {path.encode(): handler for path, handler in exact.items()}
        self._prefixes = {path.encode(): handler for path, handler in prefixes.items()}
        self._of_model = {path.encode(): handler for path, handler in of_model.items()}

    def find(self, scope: Mapping[str, Any]) -> Handler | None:
        """The handler of an ASGI request, None when the application is to answer it."""
        path: bytes = scope["raw_path"]
        found = self._exact.get(path)
        if found is not None:
            return found
        if path in self._of_model and b"model=" in scope["query_string"]:
            return self._of_model[path]
        return next((handler for prefix, handler in self._prefixes.items() if path.startswith(prefix)), None)


def only_get(call: Call) -> None:
    """Raises MethodNotAllowed for anything but a GET."""
    if call.method != "GET":
        path = unquote(call.path.decode("latin-1"))[:200]
        error = MethodNotAllowed(f"{call.method} isn't possible on {path}; it takes GET")
        error.allowed = "GET"
        raise error
