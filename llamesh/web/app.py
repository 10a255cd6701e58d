"""Everything that is no inference, as a Quart-Trio application: operator's pages and administration."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Any

import msgspec
from quart import Response, request
from quart_trio import QuartTrio
from werkzeug.exceptions import HTTPException

from llamesh.errors import (
    Forbidden,
    InternalError,
    InvalidRequest,
    LlameshError,
    MethodNotAllowed,
    NotFound,
    RequestTooLarge,
)
from llamesh.net.exchange import Headers
from llamesh.telemetry.audit import Audit
from llamesh.telemetry.exposition import exposition
from llamesh.telemetry.logs import get_logger
from llamesh.telemetry.prometheus import NodeCollector
from llamesh.web.access import Access
from llamesh.web.admin import Act, Administration, add_acts, add_admin_routes
from llamesh.web.audited import audited
from llamesh.web.caller import Caller
from llamesh.web.headers import request_id
from llamesh.web.key_routes import add_key_routes
from llamesh.web.may import add_access_route
from llamesh.web.openai import ROUTES
from llamesh.web.pages import Pages
from llamesh.web.state_routes import StateApi, add_state_routes

log = get_logger("app")

_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]

# For browsers: scripts and requests of this node only, nothing inline, in no other page's frame.
_PAGE_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cache-control": "no-cache",  # after an upgrade, a page and its script belong together
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def build_app(
    pages: Pages,
    administration: Administration,
    collector: NodeCollector,
    access: Access,
    state: StateApi | None = None,
    audit: Audit | None = None,
) -> QuartTrio:
    """The application; it owns nothing and starts nothing. `audit`: where acts are written down."""
    app = QuartTrio(__name__, static_folder="static", static_url_path="/ui/static")
    app.config["RESPONSE_TIMEOUT"] = None
    app.config["MAX_CONTENT_LENGTH"] = 1 << 20  # admin calls; inference has its own limit elsewhere

    def check_admin() -> Caller:
        return access.check_admin(_headers(), loopback=_is_loopback(request.remote_addr or ""))

    async def perform(act: Act) -> Response:
        headers, address = _headers(), request.remote_addr or ""
        with audited(audit, request.path, address, request_id=request_id(headers)) as deed:
            deed.caller = access.who(headers)  # of one who may not, too
            deed.caller = check_admin()
            if request.method != "POST":
                _check_deliberate()
                deed.quiet = request.path == "/admin/builds"  # it only looks
                if not deed.quiet:
                    access.check_by_get(headers)
            deed.document = await _body()
            if request.method == "GET" and "node" in request.args:
                deed.document = {**deed.document, "node": request.args["node"]}
            deed.status, document = await act(deed.document)
        return _answer(document, deed.status)

    @app.errorhandler(Exception)
    async def on_error(error: Exception) -> Response:
        return _error(error)

    @app.before_request
    async def look() -> None:
        if request.path == "/" or request.path.startswith("/ui/"):
            access.check_shown(_headers())

    @app.after_request
    async def guard(response: Response) -> Response:
        response.headers.update(_PAGE_HEADERS)
        return response

    @app.get("/metrics")
    async def metrics() -> Response:
        access.check(_headers())
        content_type, text = await exposition(collector.families(), request.headers.get("accept", ""))
        return Response(text, content_type=content_type)

    @app.get("/metrics/json")
    async def metrics_json() -> Response:
        access.check(_headers())
        return _answer(pages.metrics())

    @app.get("/cluster/nodes")
    async def nodes() -> Response:
        access.check(_headers())
        return _answer(pages.nodes())

    @app.get("/running")
    async def running() -> Response:
        access.check(_headers())
        return _answer(pages.running())

    @app.get("/")
    async def root() -> Response:
        return Response(status=302, headers={"location": "/ui/"})

    @app.get("/ui/")
    async def ui() -> Response:
        return await app.send_static_file("index.html")

    add_admin_routes(app, administration, perform)
    add_access_route(app, access)
    add_key_routes(app, access, check_admin)
    if state is not None:
        add_state_routes(app, state, lambda: access.check_private(_headers()))
        add_acts(app, {"/admin/cancel": ("POST", state.cancel)}, perform)
    known = {rule.rule: frozenset(rule.methods or ()) for rule in app.url_map.iter_rules()}

    @app.route("/<path:path>", methods=_METHODS)
    async def other(path: str) -> Response:
        path = "/" + path
        if path in known:
            raise _not_allowed(known[path])
        if path.encode() in ROUTES:
            raise _not_allowed({"POST"})
        found = pages.fast(path.encode(), _headers())
        if found is None:
            raise NotFound(f"there is nothing at {path[:200]}")
        if request.method not in ("GET", "HEAD"):
            raise _not_allowed({"GET", "HEAD"})
        status, headers, body = found
        return Response(body, status=status, headers={k.decode(): v.decode() for k, v in headers})

    return app


def _headers() -> Headers:
    return [(k.lower().encode("latin-1"), v.encode("latin-1")) for k, v in request.headers.items()]


def _check_deliberate() -> None:
    """For an act by GET: any page may have a browser send one, as an image, and without `Origin`."""
    if request.method != "GET":
        raise _not_allowed({"GET"})
    if request.headers.get("sec-fetch-site", "none") != "none":
        raise Forbidden("web pages may not administer by GET")


async def _body() -> dict[str, Any]:
    data = await request.get_data()
    if not data:
        return {}
    try:
        document = msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the request body isn't JSON: {error}") from None
    if not isinstance(document, dict):
        raise InvalidRequest("the request body must be a JSON object")
    return document


def _answer(document: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(document), status=status, content_type="application/json")


def _not_allowed(methods: Iterable[str]) -> MethodNotAllowed:
    allowed = ", ".join(sorted(methods))
    error = MethodNotAllowed(f"{request.method} isn't possible on {request.path}; it takes {allowed}")
    error.allowed = allowed
    return error


def _error(error: Exception) -> Response:
    if isinstance(error, LlameshError):
        face = error
    elif isinstance(error, HTTPException) and error.code == 404:
        face = NotFound(f"there is nothing at {request.path[:200]}")
    elif isinstance(error, HTTPException) and error.code == 405:
        face = _not_allowed(getattr(error, "valid_methods", None) or ())
    elif isinstance(error, HTTPException) and error.code == 413:
        face = RequestTooLarge("the request body is larger than this path takes")
    elif isinstance(error, HTTPException) and error.code is not None and error.code < 500:
        face = InvalidRequest(error.description or error.name)
    else:
        log.error("defect", path=request.path, exc_info=error)
        face = InternalError("an internal error; the node's log has it")
    response = Response(face.body(), status=face.status, content_type="application/json")
    if face.retry_after is not None:
        response.headers["retry-after"] = str(face.retry_after)
    if isinstance(face, MethodNotAllowed):
        response.headers["allow"] = face.allowed
    return response


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
