"""Where the beginnings of prompts were read last: there they are in the cache, and needn't be read again.

llama-server keeps the tokens of what its slots worked on, and of what they worked on before in host memory. A
follow-up of a conversation costs the last turn where that is, and all of it elsewhere. So what is remembered
here lowers the prefill term of `core.cost` for a node, and decides between instances of this node.
Nothing else is special about it: a node that is too busy loses to one that reads all anew.

What a place really had is told by the answer (`cached_tokens`). A place that turns out to keep less than was
expected (no cache in host memory, one that is too small) is expected to keep less from then on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import trio

from llamesh.core.lifecycle import State
from llamesh.core.prefixes import MARKS, Prefix

if TYPE_CHECKING:
    from llamesh.local.pool import Pool

# A place: a node ("" = here), and an instance of this node ("" of another one).
Place = tuple[str, str]

# Enough for a hundred conversations of 256 KiB, or 1,500 of 8 KiB: some megabytes.
_MOST_HASHES = 24_000

# The same system prompt is soon everywhere; more places than this don't need to be known.
_MOST_PLACES = 8

# What nobody asked for in so long was most likely pushed out of a cache by others.
_REMEMBERED_SECONDS = 3600.0

# Of a conversation that is only known by its name, so much is taken to be in the cache.
_OF_SESSION = 0.5

# How much one answer changes what a place is known to keep.
_NEWNESS = 0.3
_LEAST_KEPT = 0.02
_MOST_KEPT = 1_000


_NOWHERE: Mapping[Place, float] = MappingProxyType({})


class Warmth(NamedTuple):
    """What of a prompt is where, as shares of it: by node ("" = here), and by instance of this node."""

    nodes: Mapping[str, float]
    instances: Mapping[str, float]


COLD = Warmth({}, {})


class Affinity:
    """See the module."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        # hash -> place -> when; the newest last, in both.
        self._seen: OrderedDict[int, dict[Place, float]] = OrderedDict()
        self._keeps: OrderedDict[tuple[str, str], float] = OrderedDict()  # (node, model) -> share

    def find(self, model: str, prefix: Prefix) -> Warmth:
        """Where how much of a prompt for "model:profile" is."""
        if not prefix:
            return COLD
        now = trio.current_time()
        ready = {one.id for one in self._pool.instances(model) if one.state is State.READY}
        shares = [(mark, MARKS[index] / prefix.length) for index, mark in enumerate(prefix.marks)]
        if prefix.session:
            shares.append((prefix.session, _OF_SESSION))
        nodes: dict[str, float] = {}
        instances: dict[str, float] = {}
        for mark, share in shares:
            for (node, instance), at in self._seen.get(mark, _NOWHERE).items():
                if now - at > _REMEMBERED_SECONDS or (instance and instance not in ready):
                    continue
                kept = share * self._keeps.get((node, model), 1.0)
                nodes[node] = max(nodes.get(node, 0.0), kept)
                if instance:
                    instances[instance] = max(instances.get(instance, 0.0), kept)
        return Warmth(nodes, instances) if nodes else COLD

    def note(self, prefix: Prefix, place: Place) -> None:
        """It has been read there."""
        now = trio.current_time()
        for mark in (*prefix.marks, prefix.session) if prefix.session else prefix.marks:
            places = self._seen.get(mark)
            if places is None:
                places = self._seen[mark] = {}
            else:
                self._seen.move_to_end(mark)
                places.pop(place, None)
            places[place] = now
            if len(places) > _MOST_PLACES:
                del places[next(iter(places))]
        while len(self._seen) > _MOST_HASHES:
            self._seen.popitem(last=False)

    def learn(self, node: str, model: str, expected: float, cached: float) -> None:
        """Of a prompt the share `expected` (see `find`) should have been in the cache there, `cached` was."""
        if expected <= 0:
            return
        before = self._keeps.pop((node, model), 1.0)
        # `expected` was scaled by what it kept before; never nothing, or it could never show that it does.
        sample = min(1.0, cached / (expected / before))
        self._keeps[node, model] = max(_LEAST_KEPT, before + _NEWNESS * (sample - before))
        while len(self._keeps) > _MOST_KEPT:
            self._keeps.popitem(last=False)
