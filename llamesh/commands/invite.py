"""`llamesh invite`: one line that lets another machine join."""

from __future__ import annotations

import ipaddress
import os
from urllib.parse import urlsplit

from llamesh.commands.shared import exit_codes
from llamesh.commands.shared.failed import Failed
from llamesh.commands.shared.options import Files, files_options
from llamesh.commands.shared.options import command as make
from llamesh.commands.shared.saying import aside, fail, out
from llamesh.config.settings import Address, Settings
from llamesh.mesh.identity import load_identity
from llamesh.mesh.interfaces import announceable
from llamesh.mesh.invitation import encode
from llamesh.mesh.key_files import IdentityError
from llamesh.mesh.key_store import KeyStore

_DEFAULT_PORTS = {"http": 80, "https": 443}


@make(("llamesh invite", "then on the other machine: llamesh join -"))
@files_options()
def command(files: Files) -> int:
    """Print a line for `llamesh join`: where this node is, its public key, and the cluster token.

    The line is a secret.
    """
    try:
        return _invite(files.settings())
    except IdentityError as error:
        raise Failed(str(error)) from None


def _invite(settings: Settings) -> int:
    """Print the invitation, and beside it what may stand in its way. Raises IdentityError."""
    cluster = settings.cluster
    if not cluster.noise.enabled:
        return fail("cluster.noise.enabled is false: without Noise there is nothing to invite to")
    listen = cluster.listen_addr or settings.listen_addr
    if not listen.port and settings.public_url is None:
        name = "cluster.listen_addr" if cluster.listen_addr else "listen_addr"
        return fail(f"{name} has port 0, a new one at each start; set a port, and start the node again")
    addresses = reachable_at(settings)
    if not addresses:
        return fail(
            f"this machine has no address that others could use ({listen}, interfaces "
            f"{', '.join(cluster.discovery.interfaces)}); set public_url to one"
        )
    identity = load_identity(settings, os.environ)
    token = KeyStore(settings, os.environ).token()
    out(encode(identity.node_id, identity.public, token, addresses))
    aside(
        "Secret: who has this line can join. On the other machine run `llamesh join -` and paste it "
        f"there. It leads to {', '.join(str(address) for address in addresses)}; key {identity.fingerprint}."
    )
    for warning in _warnings(settings, listen, addresses):
        aside(f"Warning: {warning}")
    return exit_codes.OK


def reachable_at(settings: Settings) -> tuple[Address, ...]:
    """Where other nodes may reach this one: public_url, then what the machine's interfaces have."""
    listen = settings.cluster.listen_addr or settings.listen_addr
    found: list[Address] = []
    if settings.public_url is not None:
        found.append(public_address(settings.public_url))
    if listen.port:
        hosts = announceable(settings.cluster.discovery.interfaces, listen.host)
        if not hosts and not _is_ip(listen.host):
            hosts = (listen.host,)  # a name that was configured is one that means something
        # An address with a scope (fe80::1%eth0) means something on this machine only.
        found += [Address(host, listen.port) for host in hosts if "%" not in host]
    return tuple(dict.fromkeys(found))


def public_address(url: str) -> Address:
    """Host and port of `public_url`, which is either `host:port` or a URL."""
    if "://" not in url:
        return Address.parse(url)
    parts = urlsplit(url)
    return Address(parts.hostname or "", parts.port or _DEFAULT_PORTS[parts.scheme])


def _warnings(settings: Settings, listen: Address, addresses: tuple[Address, ...]) -> list[str]:
    cluster, found = settings.cluster, list[str]()
    if not cluster.enabled:
        found.append("cluster.enabled is false, so this node takes part in no mesh; set it to true")
    if all(address.is_loopback for address in addresses):
        name = "cluster.listen_addr" if cluster.listen_addr else "listen_addr"
        found.append(
            f"{name} is {listen}, which only this machine can reach; "
            f'set it to "0.0.0.0:{listen.port}" for every interface, and see auth.enabled'
        )
    if cluster.noise.allowed_keys or not cluster.noise.tofu:
        found.append(
            "this node takes known keys only: run `llamesh key` on the other machine and put what it prints "
            "into cluster.noise.allowed_keys here"
        )
    return found


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
