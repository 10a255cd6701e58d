"""Which web pages may use a node that asks for no key.

A browser sends requests for whatever page it shows: to this machine's ports too (cross-site), and, when the
page's name server says so, to any address as if it were the page's own (DNS rebinding). Against the first
helps what the browser says of the page, against the second the name that the page knows this node by: an
attacker's page can't know it by a name that nobody but the operator, or nobody outside, can give away.

| what is asked for | the name in `Host` | `Origin` |
|---|---|---|
| inference, models, metrics, nodes | looked at when a page asks | any, but for a POST that needs no leave |
| state, logs, an instance's own pages | always looked at | the node's own or an allowed one |
| the dashboard's page | always looked at | any: it may be linked to |
| administration | always looked at | the node's own or an allowed one; `*` isn't enough |
| administration by GET | must be this machine's | none of another site |

A web page is what sends `Origin`, `Referer` or `Sec-Fetch-Site`: command lines, SDKs and Prometheus send none
of them. (`Sec-Fetch-Mode` alone is sent by Node.js, too.) An allowed origin is one of
`http.cors_allowed_origins`; it may know the node by any name.

With keys none of this is needed, since a page that has no key can do nothing: a browser adds none by itself.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from typing import NamedTuple
from urllib.parse import urlsplit

from llamesh.config.settings import Settings
from llamesh.errors import Forbidden
from llamesh.net.exchange import Headers

# What only browsers send, and always with a request of a page.
_OF_PAGES = frozenset({b"origin", b"referer", b"sec-fetch-site"})

_HOST = re.compile(r"(?:\[(?P<v6>[0-9a-fA-F:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(?::\d{1,5})?")

# Below these, names are given by this machine or this network, and by nobody else (RFC 6761, 6762, 8375;
# ICANN has set `internal` aside; `lan` and `localdomain` are what routers use).
_LOCAL = (".localhost", ".local", ".internal", ".home.arpa", ".lan", ".localdomain")

# What a page may send to any site without being allowed to (Fetch, "CORS-safelisted request-header").
_UNASKED = (b"", b"text/plain", b"multipart/form-data", b"application/x-www-form-urlencoded")

_SHOWN = 100


class _Said(NamedTuple):
    """What a request says of where it is from and where to, in lower case."""

    hosts: list[str]
    origins: list[str]
    site: str
    navigates: bool


class Sites:
    """Looks at requests to a node without keys. Each check raises Forbidden, with what to set."""

    def __init__(self, settings: Settings) -> None:
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        """Take over settings, at the start and after a reload."""
        self._origins = frozenset(origin.lower() for origin in settings.http.cors_allowed_origins)
        hosts = [host.lower() for host in settings.http.allowed_hosts]
        self._any_host = "*" in hosts
        self._endings = _LOCAL + tuple(host[1:] for host in hosts if host.startswith("*."))
        own = {socket.gethostname(), settings.node_id, settings.listen_addr.host, *hosts}
        self._own_origin = ""
        if settings.public_url is not None:
            url = settings.public_url if "://" in settings.public_url else f"http://{settings.public_url}"
            parts = urlsplit(url)
            own.add(parts.hostname or "")
            self._own_origin = f"{parts.scheme}://{parts.netloc}".lower()
        self._names = frozenset(name.lower().rstrip(".") for name in own)

    def check(self, headers: Headers) -> None:
        """For what any program may ask: a web page must know this node by a name that it has."""
        for name, value in headers:
            if name in _OF_PAGES and value != b"none":
                said = _said(headers)
                if not self._allowed(said.origins, any_counts=True):
                    self._check_hosts(said.hosts)
                return

    def check_posted(self, headers: Headers) -> None:
        """The same for a POST of inference: a page of another site mustn't make the node work by a request
        that its browser sends without asking the node first.
        """
        said = _said(headers)
        if not said.origins or self._allowed(said.origins, any_counts=True) or self._is_own(said):
            return
        kind = next((value for name, value in headers if name == b"content-type"), b"")
        if kind.partition(b";")[0].strip().lower() in _UNASKED:
            raise Forbidden(
                f"a page of {_shown(said.origins[0])} sent this, and without auth.enabled no page of another "
                "site may; allow it with http.cors_allowed_origins, or send content-type: application/json"
            )

    def check_shown(self, headers: Headers) -> None:
        """For the dashboard's page: anybody may link to it."""
        self._check_hosts(_said(headers).hosts)

    def check_private(self, headers: Headers) -> None:
        """For what tells about the node and its users."""
        said = _said(headers)
        if self._allowed(said.origins, any_counts=True):
            return
        self._check_hosts(said.hosts)
        self._check_own(said, "see this")
        if said.site in ("cross-site", "same-site") and not said.navigates:
            raise Forbidden("without auth.enabled, pages of other sites may not see this")

    def check_admin(self, headers: Headers) -> None:
        """For administration without a key."""
        said = _said(headers)
        if self._allowed(said.origins, any_counts=False):
            return
        self._check_hosts(said.hosts)
        self._check_own(said, "administer")
        if said.site in ("cross-site", "same-site"):
            raise Forbidden("without auth.enabled, pages of other sites may not administer")

    def check_by_get(self, headers: Headers) -> None:
        """For an act by GET, after `check_admin`: a page's image sends no `Origin`, and `Sec-Fetch-Site` only
        to names that the browser itself knows to be this machine. The host name is often this machine, too.
        """
        said = _said(headers)
        if said.site or said.origins:
            return  # they told, and were looked at
        for host in said.hosts:
            if host and not _is_this_machine(host):
                raise Forbidden(
                    f"without auth.enabled, an act by GET is possible at 127.0.0.1 or localhost only, not at "
                    f"{_shown(host)}; or use POST /admin/unload"
                )

    def check_keyed(self, headers: Headers) -> None:
        """For administration with a key."""
        said = _said(headers)
        if said.site == "cross-site" and not self._allowed(said.origins, any_counts=True):
            raise Forbidden("pages of other sites may not do this; http.cors_allowed_origins can allow one")

    def check_carried(self, headers: Headers) -> None:
        """For a key that a browser remembers and sends by itself (Basic authentication)."""
        said = _said(headers)
        if not self._is_own(said) and not self._allowed(said.origins, any_counts=False):
            raise Forbidden("pages of other sites may not use this path; its own address is public_url")

    # Parts of these.

    def _allowed(self, origins: list[str], *, any_counts: bool) -> bool:
        if not origins:
            return False
        if any_counts and "*" in self._origins:
            return True
        return all(origin in self._origins for origin in origins)

    def _is_own(self, said: _Said) -> bool:
        """Whether all that is said of the page's origin is this node itself."""
        own = {f"{scheme}://{host}" for host in said.hosts if host for scheme in ("http", "https")}
        return all(origin in own or origin == self._own_origin for origin in said.origins)

    def _check_own(self, said: _Said, what: str) -> None:
        if said.origins and not self._is_own(said):
            raise Forbidden(
                f"without auth.enabled, pages of other origins may not {what}; "
                f"http.cors_allowed_origins can allow {_shown(said.origins[0])}"
            )

    def _check_hosts(self, hosts: list[str]) -> None:
        for host in hosts:
            if not self._knows(host):
                raise Forbidden(
                    f"{_shown(host)} isn't known as a name of this node, and could be anybody's (DNS "
                    "rebinding). If it is yours, list it in http.allowed_hosts, set public_url, or set "
                    "auth.enabled"
                )

    def _knows(self, host: str) -> bool:
        if self._any_host or not host:
            return True  # a browser always says where to
        found = _HOST.fullmatch(host)
        if found is None:
            return False
        if found["v6"] is not None:
            return _is_address(found["v6"])
        name = found["name"].removesuffix(".")
        if "." not in name:
            return True  # only this network's own name servers can say what it is
        return name in self._names or name.endswith(self._endings) or _is_address(name)


def _said(headers: Headers) -> _Said:
    hosts, origins, site, mode, destination = list[str](), list[str](), "", "", ""
    for name, value in headers:
        if name == b"host":
            hosts.append(value.decode("latin-1").lower())
        elif name == b"origin":
            origins.append(value.decode("latin-1").lower())
        elif name == b"sec-fetch-site":
            site = value.decode("latin-1").lower()
        elif name == b"sec-fetch-mode":
            mode = value.decode("latin-1").lower()
        elif name == b"sec-fetch-dest":
            destination = value.decode("latin-1").lower()
    return _Said(hosts, origins, site, mode == "navigate" and destination == "document")


def _is_this_machine(host: str) -> bool:
    """Whether browsers hold it for trustworthy without TLS (W3C Secure Contexts, 3.1)."""
    found = _HOST.fullmatch(host)
    if found is None:
        return False
    name = found["v6"] or found["name"].removesuffix(".")
    if _is_address(name):
        return ipaddress.ip_address(name).is_loopback
    return name == "localhost" or name.endswith(".localhost")


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _shown(text: str) -> str:
    return repr(text[:_SHOWN])
