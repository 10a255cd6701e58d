"""The doctor's look at ports: can the node listen, and are there ports for its children? Blocking."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator

import trio

from llamesh.commands.doctor.finding import Finding, Patient, bad, ok, warn
from llamesh.config.values import Address

# A larger range is looked at from its start.
_MOST_PORTS = 2000


async def look_at_ports(patient: Patient) -> list[Finding]:
    """The node's own addresses, and the ports for llama-server."""
    return await trio.to_thread.run_sync(lambda: list(_look(patient)), abandon_on_cancel=True)


def _look(patient: Patient) -> Iterator[Finding]:
    settings = patient.settings
    if settings is None:
        return
    yield _address("listen_addr", settings.listen_addr, patient)
    if settings.cluster.enabled and settings.cluster.listen_addr is not None:
        yield _address("cluster.listen_addr", settings.cluster.listen_addr, patient)
    ports = settings.llama_cpp_ports.all_ports()
    if ports is None:
        yield ok("the system picks ports for llama-server")
        return
    ports = ports[:_MOST_PORTS]
    free = sum(_why_not("127.0.0.1", port) is None for port in ports)
    text = f"{free} of {len(ports)} llama_cpp_ports are free"
    if patient.runs or free == len(ports):
        yield ok(text)
    elif free:
        yield warn(text, "other programs have the rest; `ss -ltnp` names them")
    else:
        yield bad(text, "name other ports, or leave llama_cpp_ports out: then the system picks")


def _address(name: str, address: Address, patient: Patient) -> Finding:
    if not address.port:
        return ok(f"{name} {address}: any free port is taken")
    problem = _why_not(address.host, address.port)
    if problem is None:
        return ok(f"{name} {address} is free: no node runs there")
    if isinstance(problem, socket.gaierror):
        return bad(f"{name} {address}: the name can't be resolved", "use an address, such as 0.0.0.0")
    match problem.errno:
        case errno.EADDRINUSE if patient.runs:
            return ok(f"{name} {address}: a llamesh node runs there, version {patient.version}")
        case errno.EADDRINUSE:
            return bad(
                f"{name} {address} is taken by another program",
                f"`ss -ltnp 'sport = :{address.port}'` names it; end it, or set {name} to another port",
            )
        case errno.EACCES:
            return bad(f"{name} {address}: this user may not listen there", "take a port from 1024 on")
        case errno.EADDRNOTAVAIL:
            return bad(f"{name} {address} isn't an address of this machine", "0.0.0.0 is all of them")
        case _:
            return bad(f"{name} {address}: {problem.strerror or problem}")


def _why_not(host: str, port: int) -> OSError | None:
    """What is in the way of listening there; None when nothing is. Nothing listens meanwhile."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, place in dict.fromkeys(found):
            with socket.socket(family, kind, protocol) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind(place)
    except OSError as error:
        return error
    return None
