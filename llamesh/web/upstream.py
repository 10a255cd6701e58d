"""`/upstream/{model}/...`, and `/props`, `/slots`, `/metrics` with `?model=`: one instance, spoken to
directly.

What is asked passes to an instance of the model on this node as it is, and so does the answer. A model that
isn't loaded is started first; `/slots` and `/metrics`, which are asked again and again by machines, don't do
that unless `autoload=true` says so, and `/props` does unless it says false.

Reading needs a key. Anything but GET and HEAD needs one that may administer: it goes past the limits of keys,
changes the instance (`/slots/N?action=erase`, `/lora-adapters`), and is counted nowhere. It holds a slot like
any other request. `/tools` and `/cors-proxy` are never reached: they would give whoever has a key this
machine's files and network. Other sites' pages are refused. A browser may send its key as the password of
Basic authentication, since it can't set a header for a page.
"""

from __future__ import annotations

import base64
import binascii
import posixpath
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from urllib.parse import unquote

from llamesh.config.cookbook import Profile
from llamesh.config.store import Store
from llamesh.core.lifecycle import State
from llamesh.dispatch import Dispatch
from llamesh.dispatch.lease import Ask, Lease
from llamesh.errors import (
    Forbidden,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    ModelNotFound,
    NoCapacity,
    NotAuthenticated,
    NotFound,
    UpstreamError,
)
from llamesh.local.instance import Instance
from llamesh.local.pool import Pool
from llamesh.net.exchange import Headers, UpstreamBroken, UpstreamConnection
from llamesh.telemetry.audit import Audit
from llamesh.web.access import Access
from llamesh.web.audited import Deed, audited
from llamesh.web.direct import Call, only_get
from llamesh.web.headers import RESUMES, pass_back
from llamesh.web.prewarm import Prewarm

PREFIX = "/upstream/"
OF_MODEL = ("/props", "/slots", "/metrics")

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_READING = ("GET", "HEAD")

# First segments of paths that are never passed on.
_FORBIDDEN = frozenset({"tools", "cors-proxy"})

# What isn't passed to the child: hop-by-hop, keys, who asks.
_DROPPED = frozenset({RESUMES}) | frozenset(
    b"authorization connection content-length cookie expect host keep-alive origin proxy-authorization "
    b"proxy-connection referer te trailer transfer-encoding upgrade x-api-key x-request-id".split()
)
_DROPPED_PREFIXES = (b":", b"sec-", b"x-llamesh-", b"x-llama-mesh-")


class Upstream:
    """The handler, see `web.direct`."""

    def __init__(
        self,
        store: Store,
        pool: Pool,
        dispatch: Dispatch,
        prewarm: Prewarm,
        access: Access,
        audit: Audit | None = None,
    ) -> None:
        self._store = store
        self._pool = pool
        self._dispatch = dispatch
        self._prewarm = prewarm
        self._access = access
        self._audit = audit

    def admit(self, call: Call) -> None:
        """Who may, and what is never passed on. Raises LlameshError."""
        if call.method not in _METHODS:
            error = MethodNotAllowed(f"{call.method} isn't possible here")
            error.allowed = ", ".join(_METHODS)
            raise error
        if call.header(b"sec-fetch-site") in ("cross-site", "same-site"):
            raise Forbidden("pages of other sites may not use this path")
        try:
            headers = _with_basic(call.headers)
            if headers != call.headers:
                self._access.sites.check_carried(headers)
            if call.method in _READING:
                call.caller = self._access.check_private(headers)
            else:
                with self._audited(call) as deed:
                    deed.quiet = True  # it is yet to be done
                    deed.caller = self._access.who(headers)
                    call.caller = self._access.check_admin(headers, loopback=call.loopback)
        except NotAuthenticated:
            call.extra.append((b"www-authenticate", b'Basic realm="llamesh: the password is the key"'))
            raise

    async def run(self, call: Call) -> None:
        """One exchange with one instance."""
        profile, rest = self._target(call.path)
        if not rest:
            # Relative to a folder, the page's own addresses are right, also below the prefix of a proxy.
            name = call.path.rpartition(b"/")[2]
            call.sink.start(307, [(b"location", name + b"/")], length=0)
            await call.sink.finish()
            return
        await self.pass_on(call, profile, rest + (b"?" + call.query if call.query else b""), start=True)

    async def pass_on(self, call: Call, profile: Profile, target: bytes, *, start: bool) -> None:
        """Ask an instance of `profile` for `target`. `start`: one is started if none is ready."""
        self._access.check_model(call.caller, profile.model, profile.id)
        if call.method in _READING:
            instance = await self._ready(profile, start=start)
            await self._exchange(call, instance, target)
        else:
            with self._audited(call) as deed:
                deed.caller, deed.document = call.caller, {"model": profile.key}
                with self._slot(await self._lease(call, profile)) as lease:
                    deed.status = await self._exchange(call, lease.instance, target)

    def _audited(self, call: Call) -> AbstractContextManager[Deed]:
        path = call.path.decode("latin-1")
        return audited(self._audit, path, call.client, request_id=call.id)

    def _target(self, path: bytes) -> tuple[Profile, bytes]:
        """The profile, and the rest of the path with its slash, b"" where there is none. A model's name may
        have slashes itself: the longest one that is known counts.
        """
        segments = path[len(PREFIX) :].split(b"/")
        for count in range(len(segments), 0, -1):
            name = unquote(b"/".join(segments[:count]).decode("latin-1"))
            profile = self.find(name) if name else None
            if profile is not None:
                rest = b"".join(b"/" + segment for segment in segments[count:])
                _check_path(rest)
                return profile, rest
        name = unquote(segments[0].decode("latin-1"))
        raise self.unknown(name)

    def find(self, name: str) -> Profile | None:
        """A profile of this node."""
        return self._store.current.cookbook.find(name)

    def unknown(self, name: str) -> ModelNotFound:
        """The error for a model that this node doesn't have."""
        node = self._store.current.settings.node_id
        there = "; it is on another node: ask that one" if self._dispatch.find(name) is not None else ""
        return ModelNotFound(f"node {node} has no model {name[:120]!r}{there}", param="model")

    async def _ready(self, profile: Profile, *, start: bool) -> Instance:
        found = self._best(profile)
        if found is None and start:
            await self._prewarm.run(profile, wait=True)
            found = self._best(profile)
        if found is None:
            raise NoCapacity(
                f"{profile.key} isn't loaded on node {self._store.current.settings.node_id}; load it with "
                "POST /admin/prewarm, or ask with autoload=true",
                param="model",
            )
        return found

    def _best(self, profile: Profile) -> Instance | None:
        ready = [one for one in self._pool.instances(profile.key) if one.state is State.READY]
        return min(ready, key=lambda one: one.busy_slots) if ready else None

    async def _lease(self, call: Call, profile: Profile) -> Lease:
        ask = Ask(profile, call.id, here_only=True)
        lease = self._dispatch.take(ask)
        if lease is None:
            with self._dispatch.join(ask) as ticket:
                lease = await ticket.wait()
        if not isinstance(lease, Lease):
            raise InternalError("a request for this node was about to leave it")
        return lease

    @contextmanager
    def _slot(self, lease: Lease) -> Iterator[Lease]:
        complete = False
        try:
            yield lease
            complete = True
        finally:
            lease.release(complete=complete, working=not complete)

    async def _exchange(self, call: Call, instance: Instance, target: bytes) -> int:
        """The status of the answer."""
        connection: UpstreamConnection | None = None
        try:
            connection = await self._ask(call, instance, target)
            response, sink = connection.response, call.sink
            # The page of llama-server is a program of its own: our policy for pages doesn't fit it.
            headers = [*pass_back(response.headers), (b"x-llamesh-instance", instance.id.encode())]
            headers = [pair for pair in headers if pair[0] != b"set-cookie"]
            sink.start(response.status, headers, length=response.length)
            while not response.complete:
                data = response.take()
                if data:
                    await sink.write(data)
                else:
                    await sink.flush()
                await connection.read()
            await sink.finish(response.take())
            status = response.status
            instance.keep(connection)
            connection = None
            return status
        except UpstreamBroken as error:
            if call.sink.started:
                call.sink.abort()
                return UpstreamError.status
            raise UpstreamError(f"{instance.id}: {error}", param="model") from error
        finally:
            if connection is not None:
                connection.close()

    async def _ask(self, call: Call, instance: Instance, target: bytes) -> UpstreamConnection:
        """Send it, and read until the head has come; anew where a kept connection turns out to be closed."""
        # The parser of answers doesn't know which was asked by HEAD; the lane drops the body.
        method = "GET" if call.method == "HEAD" else call.method
        own = self._store.current.settings.auth.required_header.lower().encode()
        head = _request_head(method, target, call, instance, own)
        kept = instance.idle_connection()
        connection = kept or await instance.connect()
        while True:
            try:
                await connection.send(head, call.body.parts())
                while not connection.response.has_head:
                    await connection.read()
                return connection
            except UpstreamBroken as error:
                connection.close()
                if error.started or kept is None:
                    raise
                kept = None
            except BaseException:
                connection.close()
                raise
            connection = await instance.connect()


class OfModel:
    """`GET /props?model=` and the like, see `web.direct`."""

    def __init__(self, upstream: Upstream, access: Access, *, autoload: bool) -> None:
        self._upstream = upstream
        self._access = access
        self._autoload = autoload

    def admit(self, call: Call) -> None:
        """A key, as for metrics."""
        only_get(call)
        call.caller = self._access.check_private(call.headers)

    async def run(self, call: Call) -> None:
        """One exchange with one instance."""
        arguments = call.arguments()
        name = arguments.get("model", "")
        profile = self._upstream.find(name)
        if profile is None:
            raise self._upstream.unknown(name)
        wish = arguments.get("autoload", "")
        start = wish in ("1", "true") if wish else self._autoload
        ours = (b"model", b"autoload", b"")
        kept = [pair for pair in call.query.split(b"&") if pair.partition(b"=")[0] not in ours]
        target = call.path + (b"?" + b"&".join(kept) if kept else b"")
        await self._upstream.pass_on(call, profile, target, start=start)


def _check_path(rest: bytes) -> None:
    """Raises for what is never passed on, however it is written."""
    path = rest.decode("latin-1")
    for _ in range(3):
        # Some servers decode twice; what hides behind that isn't a page that anyone needs.
        path = unquote(path)
    path = path.replace("\\", "/")
    if any(ord(character) < 32 for character in path) or ".." in path.split("/"):
        raise InvalidRequest("the path has parts that aren't passed on")
    plain = posixpath.normpath("/" + path.lstrip("/")).casefold().lstrip("/")
    if any(segment.partition(";")[0].strip() in _FORBIDDEN for segment in plain.split("/")):
        raise NotFound("this route of llama-server isn't passed on by the node")


def _request_head(method: str, target: bytes, call: Call, instance: Instance, key_header: bytes) -> bytes:
    lines = [method.encode(), b" ", target, b" HTTP/1.1\r\nhost: ", instance.launch.host.encode()]
    lines += (b"\r\nauthorization: ", instance.authorization)
    for name, value in call.headers:
        if name not in _DROPPED and name != key_header and not name.startswith(_DROPPED_PREFIXES):
            lines += (b"\r\n", name, b": ", value)
    length = b"\r\ncontent-length: %d" % call.body.length if call.method not in _READING else b""
    lines += (b"\r\nx-request-id: ", call.id.encode(), length, b"\r\n\r\n")
    return b"".join(lines)


def _with_basic(headers: Headers) -> Headers:
    """A key that came as the password of Basic authentication, as a Bearer."""
    found: Headers = []
    for name, value in headers:
        if name == b"authorization" and value[:6].lower() == b"basic ":
            try:
                password = base64.b64decode(value[6:].strip(), validate=True).partition(b":")[2]
            except (binascii.Error, ValueError):
                raise NotAuthenticated("the Basic authentication that was sent can't be read") from None
            found.append((name, b"Bearer " + password))
        else:
            found.append((name, value))
    return found
