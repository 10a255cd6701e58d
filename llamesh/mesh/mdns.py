"""mDNS through the zeroconf package, which brings a thread and an event loop of its own.

Everything here blocks, for seconds at times, and is called from worker threads; `discovery`
does that. The package is imported when it is first used: it costs megabytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llamesh.mesh.sighting import Record

if TYPE_CHECKING:
    from zeroconf import ServiceInfo, Zeroconf

# DNS labels have 63 bytes at most; "-", a digest of 8 and what zeroconf may append ("-2") must fit too.
_LONGEST_NAME = 48
_ASK_MS = 3000

#: Called from any thread with the name of a service, and whether it is gone.
Notice = Callable[[str, bool], None]


class MdnsFailed(Exception):
    """mDNS doesn't work at present. The message says why, for people."""


class Mdns:
    """One node's presence on the local network. All methods may be called from any thread.

    `close` ends it, also while another method is at work in another thread; that one may then raise.
    """

    def __init__(self, service_name: str, node_id: str, port: int, txt: Mapping[str, str]) -> None:
        self._type = service_name.rstrip(".") + "."
        self._port = port
        self._txt = dict(txt)
        # The same after a restart, so that the new announcement takes the place of the old one; another
        # for another node that is called the same.
        telling = repr((node_id, port, sorted(txt.items())))
        digest = hashlib.sha256(telling.encode()).hexdigest()[:8]
        self.name = f"{node_id.replace('.', '-')[:_LONGEST_NAME]}-{digest}.{self._type}"
        self._host = f"llamesh-{secrets.token_hex(8)}"
        self._changes = 0
        self._announced: ServiceInfo | None = None
        self._lock = threading.Lock()
        self._zeroconf: Zeroconf | None = None
        self._closed = False

    def open(self, interfaces: Sequence[str | int], notice: Notice) -> None:
        """Join the multicast groups and look around. `interfaces` is what `multicast_interfaces` gives."""
        from zeroconf import ServiceBrowser, ServiceStateChange

        # What goes wrong is said once, by us. The package repeats itself at every packet that it dislikes.
        logging.getLogger("zeroconf").setLevel(logging.CRITICAL)

        def heard(*, name: str, state_change: ServiceStateChange, **_: Any) -> None:
            notice(name, state_change is ServiceStateChange.Removed)

        zeroconf = _joined(list(interfaces))
        with self._lock:
            late = self._closed
            self._zeroconf = None if late else zeroconf
        if late:
            _shut(zeroconf)
            return
        if not zeroconf.engine.senders:
            raise MdnsFailed("no network interface takes multicast")
        ServiceBrowser(zeroconf, self._type, handlers=[heard])

    def announce(self, addresses: Sequence[str]) -> None:
        """Say where this node is; again when that has changed. No addresses: say that it is gone."""
        from zeroconf import ServiceInfo

        zeroconf = self._working()
        before = self._announced
        if not addresses:
            if before is not None:
                self._announced = None
                zeroconf.unregister_service(before)
            return
        # A new host name each time: listeners then never mix the new addresses with the old ones, which
        # stay in their caches for a while.
        self._changes += 1
        info = ServiceInfo(
            self._type,
            before.name if before is not None else self.name,
            port=self._port,
            properties=self._txt,
            server=f"{self._host}-{self._changes}.local.",
            # A scope means something on this machine only; listeners add theirs.
            parsed_addresses=[address.partition("%")[0] for address in addresses],
        )
        if before is None:
            zeroconf.register_service(info, allow_name_change=True)
            self.name = info.name  # it may have got another, where two clones of a machine meet
        else:
            zeroconf.update_service(info)
        self._announced = info

    def look(self, name: str, *, ask: bool) -> Record | None:
        """What is known of a service. With `ask` the network is asked, for up to 3 s; without it doesn't
        block. None when not enough is known, and for this node itself."""
        from zeroconf import Error, IPVersion, ServiceInfo

        zeroconf = self._working()
        try:
            info = ServiceInfo(self._type, name)
            if not info.load_from_cache(zeroconf) and ask:
                info.request(zeroconf, _ASK_MS)
        except (Error, ValueError):  # a name that can't be, or nobody answers: its own loss
            return None
        server = (info.server or "").lower()
        addresses = tuple(info.parsed_scoped_addresses(IPVersion.All))
        # Ourselves. Not told by the name: two clones of a machine that start at once have the same.
        if server.startswith(self._host):
            return None
        if not server or not info.port or not addresses or not info.text:
            return None
        return Record(server, info.port, addresses, dict(info.properties))

    def close(self) -> None:
        """Say goodbye and end the threads. Idempotent; half a second."""
        with self._lock:
            self._closed = True
            zeroconf, self._zeroconf = self._zeroconf, None
        if zeroconf is not None:
            _shut(zeroconf)

    def _working(self) -> Zeroconf:
        with self._lock:
            if self._zeroconf is None:
                raise MdnsFailed("it is closed")
            return self._zeroconf


def _joined(interfaces: list[str | int]) -> Zeroconf:
    from zeroconf import Zeroconf

    try:
        return Zeroconf(interfaces=interfaces)
    except (OSError, RuntimeError):
        # An interface whose IPv6 address is still being set up refuses; IPv4 needn't suffer for it.
        simple: list[str | int] = [one for one in interfaces if isinstance(one, str)]
        if not simple or simple == interfaces:
            raise
        return Zeroconf(interfaces=simple)


def _shut(zeroconf: Zeroconf) -> None:
    # Apart from `close`, which ends nothing when the goodbye fails.
    with contextlib.suppress(Exception):
        zeroconf.unregister_all_services()
    zeroconf.close()
