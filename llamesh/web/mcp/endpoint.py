"""`POST /mcp`: who may call, how much at once, and the life of the server that answers.

The server is made when somebody first calls: its import runs in a thread, so that streams go on meanwhile. It
lives in a task of the node's, and ends with it. A call that is cancelled, because its client left or the node
ends, cancels its tool.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import unquote

import trio

from llamesh.errors import InternalError, InvalidRequest, LlameshError, MethodNotAllowed, Overloaded
from llamesh.telemetry.audit import Audit
from llamesh.telemetry.logs import get_logger
from llamesh.web.access import Access
from llamesh.web.admin import Administration
from llamesh.web.audited import audited
from llamesh.web.direct import Call
from llamesh.web.logs_stream import LogStream
from llamesh.web.state_routes import StateApi

if TYPE_CHECKING:
    from llamesh.web.mcp.server import McpServer

log = get_logger("mcp")

PATH = "/mcp"

# A call is a name and a few words. What is larger is a mistake, and would be parsed while streams wait.
MOST_BYTES = 256 << 10

MOST_CALLS = 64

# The import takes half a second; on a busy machine, or from a cold disk, some.
_IMPORT_SECONDS = 60.0


# The SDK brings OpenTelemetry's interface, whose import fails when the environment (that of a cluster, say)
# names parts of it that aren't installed. Nothing is traced here in any case.
_NO_TRACING = {
    "OTEL_PROPAGATORS": "none",
    "OTEL_PYTHON_CONTEXT": "contextvars_context",
    "OTEL_PYTHON_TRACER_PROVIDER": "default_tracer_provider",
}


class NotInstalled(LlameshError):
    """This installation has no MCP SDK, or not one that can be used."""

    status, type = 501, "not_implemented"


class TooManyCalls(Overloaded):
    """As many calls are under way as may be."""

    type = "too_many_calls"


class McpEndpoint:
    """The handler, see `web.direct`."""

    def __init__(
        self,
        access: Access,
        api: StateApi,
        logs: LogStream,
        acts: Administration,
        audit: Audit | None = None,
    ) -> None:
        """`audit`: where acts, and calls that are refused, are written down."""
        self._access = access
        self._audit = audit
        self._api = api
        self._logs = logs
        self._acts = acts
        self._server: McpServer | None = None
        self._problem: LlameshError | None = None
        self._wanted = trio.Event()
        self._settled = trio.Event()
        self._calls = 0

    def admit(self, call: Call) -> None:
        """As for administration: reading and acting are one endpoint."""
        with audited(self._audit, PATH, call.client, request_id=call.id) as deed:
            deed.quiet = True
            deed.caller = self._access.who(call.headers)  # of one who may not, too
            call.caller = self._access.check_admin(call.headers, loopback=call.loopback)
        if call.method != "POST":
            # No session is kept, so there is none to listen to (GET) or to end (DELETE).
            path = unquote(call.path.decode("latin-1"))
            error = MethodNotAllowed(f"{call.method} isn't possible on {path}; it takes POST")
            error.allowed = "POST"
            raise error
        if call.header(b"content-type").partition(";")[0].strip().lower() != "application/json":
            # Besides: what a page may send without asking is no JSON.
            raise InvalidRequest(f"{PATH} takes content-type: application/json")
        call.most_bytes = MOST_BYTES

    async def run(self, call: Call) -> None:
        """Answer one request."""
        if self._calls >= MOST_CALLS:
            raise TooManyCalls(f"{MOST_CALLS} calls are under way on this node, as many as there may be")
        self._calls += 1
        try:
            server = await self._ready()
            await server.answer(call)
        except (LlameshError, OSError):
            raise
        except Exception as error:
            log.exception("defect", request_id=call.id)
            if call.sink.started:
                call.sink.abort()
                return
            raise InternalError(f"an internal error; the node's log has it under {call.id}") from error
        finally:
            self._calls -= 1

    async def serve(self) -> None:
        """Make the server when it is wanted, and own it."""
        while True:
            await self._wanted.wait()
            try:
                server = await trio.to_thread.run_sync(self._make, abandon_on_cancel=True)
                async with trio.open_nursery() as nursery:
                    await nursery.start(server.run)
                    self._server, self._problem = server, None
                    self._settled.set()
            except ImportError as error:
                log.warning("/mcp can't be served", error=str(error))
                self._problem = NotInstalled(
                    f"this installation of llamesh can't serve {PATH}: {error}; "
                    "install the Python package `mcp` beside it, and restart the node"
                )
            except Exception:
                log.exception("defect", during="mcp")
                self._problem = InternalError(f"{PATH} broke; the node's log has it")
            finally:
                self._server, self._wanted = None, trio.Event()
                self._settled.set()

    def _make(self) -> McpServer:
        """Blocks: for a thread."""
        with _no_tracing():
            from llamesh.web.mcp.server import McpServer
            from llamesh.web.mcp.tools import Toolbox

        return McpServer(Toolbox(self._api, self._logs, self._acts, self._audit), MOST_BYTES)

    async def _ready(self) -> McpServer:
        """The server, made if need be. Raises NotInstalled, InternalError or Overloaded."""
        if self._server is None and not isinstance(self._problem, NotInstalled):
            self._settled = trio.Event() if self._settled.is_set() else self._settled
            self._wanted.set()
            with trio.move_on_after(_IMPORT_SECONDS):
                await self._settled.wait()
        if self._server is not None:
            return self._server
        raise self._problem or Overloaded(f"{PATH} is still being prepared; try again")


@contextmanager
def _no_tracing() -> Iterator[None]:
    # Values are changed, and none is removed: somebody may be copying the environment for a child.
    before = {name: os.environ[name] for name in _NO_TRACING if name in os.environ}
    os.environ.update({name: _NO_TRACING[name] for name in before})
    try:
        yield
    finally:
        os.environ.update(before)
