"""What this node says of an answer in its headers: who served it, how long it waited, whether its prompt was
where it was read before; and what it remembers of that for the next turn.
"""

from __future__ import annotations

from llamesh.dispatch.affinity import Affinity
from llamesh.dispatch.lease import AnyLease, Ask, Lease
from llamesh.net.exchange import Headers
from llamesh.web.answer import Job


def own_headers(own_node: bytes, job: Job, lease: AnyLease | None, theirs: Headers) -> Headers:
    """This node's headers, with what a peer that served says of itself. `lease`: None before there is one."""
    ask = job.ask
    node, queued, affinity = own_node, b"0", _affinity(ask, lease)
    if isinstance(lease, Lease):
        queued = b"%d" % round(lease.queued_seconds * 1000)
    elif lease is not None:
        waited = lease.queued_seconds * 1000
        for name, value in theirs:
            if name == b"x-llamesh-node":
                node = value
            elif name == b"x-llamesh-affinity":
                affinity = value
            elif name == b"x-llamesh-queue-ms" and value.isdigit():
                waited += int(value[:12])
        queued = b"%d" % round(waited)
    job.outcome.node = node.decode("latin-1")
    return [
        (b"x-request-id", ask.request_id.encode()),
        (b"x-llamesh-node", node),
        (b"x-llamesh-profile", ask.profile.key.encode()),
        (b"x-llamesh-queue-ms", queued),
        (b"x-llamesh-affinity", affinity),
    ]


def _affinity(ask: Ask, lease: AnyLease | None) -> bytes:
    """`off`: there is nothing to go by; `hit`: it is served where its prompt was read before."""
    if not ask.prefix:
        return b"off"
    return b"hit" if isinstance(lease, Lease) and _share(ask, lease) > 0 else b"miss"


def _share(ask: Ask, lease: AnyLease) -> float:
    """How much of the prompt should be in the cache there."""
    if isinstance(lease, Lease):
        return ask.warmth.instances.get(lease.instance.id, 0.0)
    return ask.warmth.nodes.get(lease.node, 0.0)


def remember(affinity: Affinity, lease: AnyLease, job: Job) -> None:
    """The prompt was read there, and so much of it was in the cache."""
    ask, usage = job.ask, job.outcome.usage
    if isinstance(lease, Lease):
        node, instance = "", lease.instance.id
    else:
        node, instance = lease.node, ""
    affinity.note(ask.prefix, (node, instance))
    if usage.prompt_tokens:
        cached = usage.cached_tokens / usage.prompt_tokens
        affinity.learn(node, ask.profile.key, _share(ask, lease), cached)
