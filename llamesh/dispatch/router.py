"""Here or at a peer: what this node knows of itself and of the others, put before `core.routing`.

The router decides nothing by itself and waits for nothing. It gathers an `Outlook` of each node that has the
profile, lets `route` choose, and takes a seat at the peer that was chosen. What it knows of this node
is also what peers are told (`situation`), so that both sides of a link reckon with the same figures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import Protocol

import msgspec
import trio

from llamesh.config.cookbook import Elsewhere, Profile
from llamesh.config.current import Current
from llamesh.core.capacity import Evict, Fits, Later
from llamesh.core.cost import Features, Outlook, confirmed, expected, loading_left, trust_in
from llamesh.core.lifecycle import State
from llamesh.core.offers import Situation
from llamesh.core.routing import Choice, max_wait_ms, route
from llamesh.core.speeds import WINDOW, Speeds, note
from llamesh.dispatch.lease import Ask, Forward, Seat, Travel
from llamesh.local.pool import Pool
from llamesh.telemetry.learned import LearnedValues
from llamesh.telemetry.logs import get_logger
from llamesh.telemetry.stats import Usage

log = get_logger("router")

# An idle instance that has to leave first is gone after this long; a busy one after its requests, too.
_LEAVES_MS = 100.0

# What a download takes before anything is known about it: a few gigabytes over a good line.
_DOWNLOAD_MS = 120_000.0

# Looking into a model's file takes about this long.
_LOOK_MS = 20.0


class Peers(Protocol):
    """What the router asks the mesh."""

    def has(self, key: str) -> bool:
        """Whether a peer offers "model:profile", in any spelling. Asked for each request."""

    def find(self, name: str) -> Profile | None:
        """The profile that `name` means at a peer, as one that isn't run here."""

    def aliases_of(self, key: str) -> Iterable[str]:
        """What peers that offer "model:profile" call its model besides."""

    def outlooks(
        self,
        key: str,
        excluded: Collection[str],
        fingerprint: str | None = None,
        usual_load_ms: float = 0.0,
    ) -> list[Outlook]:
        """The peers that could take a request now. `fingerprint`: only those that run just the same."""

    def seat(self, node: str, key: str, excluded: Collection[str]) -> Seat | None:
        """Count one more forward to the peer; None when it isn't to be asked just now."""

    def explain(self, key: str, excluded: Collection[str] = ()) -> str:
        """Why no peer takes a request for the profile now, for people; "" when none is left to have it."""

    def fingerprint(self, key: str) -> str:
        """Which of several versions of a profile is used that this node doesn't have; "" when none is."""


class Router:
    """See the module. `queue_length(key)` is set by the dispatcher; `requests` counts those of each peer that
    are here, by (node id, "model:profile").
    """

    def __init__(self, current: Current, pool: Pool, learned: LearnedValues, peers: Peers) -> None:
        self.peers = peers
        self.queue_length: Callable[[str], int] = lambda key: 0
        self.requests: Counter[tuple[str, str]] = Counter()
        self.fingerprint: Callable[[Profile], str | None] = lambda profile: None
        self._current = current
        self._pool = pool
        self._learned = learned
        self._speeds: dict[str, Speeds] = {}
        self._learned_at: dict[str, float] = {}

    def speeds(self, key: str) -> Speeds:
        """What was learned of "model:profile" on this node, earlier lives included."""
        found = self._speeds.get(key)
        if found is None:
            try:
                found = msgspec.convert(self._learned.of(key).speeds, Speeds)
            except msgspec.ValidationError:
                found = Speeds()
            self._speeds[key] = found
        return found

    def learn(self, ask: Ask, usage: Usage, seconds: float, neighbours: int) -> None:
        """A request held a slot of ours for `seconds`, beside so many others on its instance."""
        key = ask.profile.key
        self._learned_at[key] = trio.current_time()
        speeds = self._speeds[key] = note(
            self.speeds(key),
            service_ms=seconds * 1000,
            prefill_tokens=usage.prompt_tokens - usage.cached_tokens,
            prefill_ms=usage.prompt_ms,
            decode_tokens=usage.completion_tokens,
            decode_ms=usage.predicted_ms,
            neighbours=neighbours,
        )
        self._learned.of(key).speeds = msgspec.to_builtins(speeds)

    def has_choice(self, ask: Ask) -> bool:
        """Whether there is a peer that could take it now."""
        return self._may_leave(ask) and any(
            not 0 < one.n_ctx < ask.features.prompt_tokens
            for one in self.peers.outlooks(ask.profile.key, _excluded(ask), self._needs_same(ask))
        )

    def _may_leave(self, ask: Ask) -> bool:
        """A request that comes from a peer goes on only where this node merely connects two others: who
        sent it knows better where else it might go, and two nodes that send it to and fro serve nobody.
        """
        travel, profile = ask.travel, ask.profile
        if not self.peers.has(profile.key) or (travel.origin and not never_runs_here(profile)):
            return False
        return not ask.here_only and travel.hops < self._current.settings.max_hops

    def forward(self, ask: Ask, *, here: bool, since: float, ahead: int = 0) -> Forward | None:
        """A seat at the peer that will answer sooner than this node; None: this node is to do it.

        `here`: this node could; without it, any peer is better than nothing. `ahead`: how many in the queue
        of this node come first.
        """
        if not self._may_leave(ask):
            return None
        profile, excluded = ask.profile, _excluded(ask)
        same = self._needs_same(ask)
        # Who never loaded it is taken to need as long as we do: else it would never get to show it.
        usual = self._learned.of(profile.key).load_seconds * 1000
        outlooks = self.peers.outlooks(profile.key, excluded, same, usual)
        features = self._features(ask)
        if not here and outlooks and all(0 < one.n_ctx < features.prompt_tokens for one in outlooks):
            # The length is an estimate, and the engine's own answer is better than none from us.
            largest = max(one.n_ctx for one in outlooks)
            outlooks = [msgspec.structs.replace(one, n_ctx=0) for one in outlooks if one.n_ctx == largest]
        while outlooks:
            own = self.outlook(profile, ahead=ahead) if here else None
            waited = (trio.current_time() - since) * 1000
            if own is not None and 0 < own.service_ms < waited:
                # Whoever has the slots takes longer than others did: as long again, for all that is known.
                own = msgspec.structs.replace(own, service_ms=waited)
            choice = route(own, outlooks, features)
            if ask.record is not None:
                ask.record.decision = choice.considered
            if not choice.node:
                return None
            seat = self.peers.seat(choice.node, profile.key, excluded)
            if seat is not None:
                self._narrate(ask, choice)
                queued = trio.current_time() - since
                return Forward(ask, seat, queued, max_wait_ms(choice), same)
            outlooks = [one for one in outlooks if one.node != choice.node]
        return None

    def _needs_same(self, ask: Ask) -> str | None:
        """Embeddings of other weights or settings aren't comparable with ours, so they must not mix; nor
        must those of several peers where we have none."""
        profile = ask.profile
        if profile.kind != "embedding":
            return None
        if ask.travel.fingerprint:
            return ask.travel.fingerprint
        return self.peers.fingerprint(profile.key) if never_runs_here(profile) else self.fingerprint(profile)

    def differs(self, profile: Profile, travel: Travel) -> bool:
        """Whether this node would answer a peer's request with other weights or settings than are wanted."""
        return bool(
            travel.fingerprint
            and profile.kind == "embedding"
            and not never_runs_here(profile)
            and self.fingerprint(profile) != travel.fingerprint
        )

    def _features(self, ask: Ask) -> Features:
        """What a client names as its limit is seldom used up; the usual answer says more."""
        features, usual = ask.features, self.speeds(ask.profile.key).output_tokens
        if not usual or 0 < features.output_tokens <= usual:
            return features
        return Features(
            prompt_tokens=features.prompt_tokens,
            output_tokens=max(1, round(usual)),
            cached=features.cached,
            number=features.number,
        )

    def wait_here(self, ask: Ask) -> float:
        """Expected milliseconds until an instance of this node takes the request."""
        ahead = self.queue_length(ask.profile.key)
        return expected(self.outlook(ask.profile, ahead=ahead), ask.features).wait

    def outlook(self, profile: Profile, *, ahead: int) -> Outlook:
        """This node as a candidate for a request before which so many in the queue come."""
        key = profile.key
        now = self.situation(key)
        others = max(0, now.others - self.queue_length(key)) + ahead
        speeds, learned = self.speeds(key), self._learned.of(key)
        running = min(now.slots, others)
        return Outlook(
            node="",
            link_ms=0.0,
            ready_slots=now.slots,
            busy=running,
            queued=others - running,
            sent=0,
            loading_left_ms=now.loading_left_ms,
            loading_slots=now.loading_slots,
            load_ms=None if now.room_ms is None else learned.load_seconds * 1000,
            room_ms=now.room_ms or 0.0,
            download_ms=now.download_ms,
            slots_per_instance=learned.n_slots,
            service_ms=speeds.service_ms,
            prefill_ms_per_token=speeds.prefill_ms,
            decode_ms_per_token=speeds.decode_ms,
            sharing=speeds.sharing,
            n_ctx=learned.context_length,
            failing=now.failing,
            trust=trust_in(self.confirmed(key)),
        )

    def confirmed(self, key: str) -> float:
        """How many requests of late the learned values rest on; it halves while none comes."""
        now = trio.current_time()
        idle = now - self._learned_at.setdefault(key, now)
        return confirmed(min(self.speeds(key).requests, WINDOW), idle)

    def situation(self, key: str, origin: str = "") -> Situation:
        """How busy the profile is here; requests that `origin` sent aren't counted."""
        slots = busy = loading_slots = 0
        left: float | None = None
        now, learned = trio.current_time(), self._learned.of(key)
        instances = self._pool.instances(key)
        for instance in instances:
            if instance.state is State.READY:
                slots += instance.slots
                busy += instance.busy_slots
            elif instance.state is State.STARTING:
                loading_slots += self._pool.slots_expected(key)
                elapsed = (now - instance.created) * 1000
                rest = loading_left(learned.load_seconds * 1000, elapsed)
                left = rest if left is None else min(left, rest)
        others = busy + self.queue_length(key)
        if origin:
            others = max(0, others - self.requests[origin, key])
        profile = self._current.cookbook.find(key)
        if profile is not None and profile.key != key:
            profile = None
        trouble = self._pool.trouble(key)
        return Situation(
            slots=slots,
            others=others,
            loading_left_ms=left,
            loading_slots=loading_slots,
            room_ms=self._room_ms(profile) if profile is not None else None,
            download_ms=self._download_ms(profile) if profile is not None else 0.0,
            failing=trouble is not None and trouble.exhausted and not slots,
        )

    def _download_ms(self, profile: Profile) -> float:
        """Until its weights are here."""
        weights = self._pool.weights
        if weights.is_here(profile):
            return 0.0
        progress = weights.progress(profile)
        left = progress.eta_seconds if progress is not None else None
        return _DOWNLOAD_MS if left is None else left * 1000

    def _room_ms(self, profile: Profile) -> float | None:
        """What making room for one more instance would take; None when there can't be one now."""
        if self._pool.max_instances(profile) < 1:
            return None
        if not self._pool.weights.is_here(profile):
            # How large it is shows when it has come.
            return None if self._pool.weights.failure(profile) is not None else 0.0
        if len(self._pool.instances(profile.key)) >= self._pool.max_instances(profile):
            return None
        match self._pool.room(profile):
            case Fits():
                return 0.0
            case Evict(ids):
                leaving = [i for i in self._pool.all() if i.id in ids]
                drain = max((self._service_ms(i.profile.key) for i in leaving if i.busy_slots), default=0.0)
                return _LEAVES_MS + drain
            case Later() if self._pool.memory.size(profile) is None:
                return _LOOK_MS
        return None

    def _service_ms(self, key: str) -> float:
        return self.speeds(key).service_ms

    @staticmethod
    def _narrate(ask: Ask, choice: Choice) -> None:
        if log.debugging:
            log.debug("forward", request_id=ask.request_id, profile=ask.profile.key, decision=choice.text())


def _excluded(ask: Ask) -> frozenset[str]:
    return ask.excluded.union(ask.travel.via) if ask.travel.via else ask.excluded


def never_runs_here(profile: Profile) -> bool:
    """Whether this node only knows who has it."""
    return isinstance(profile.source, Elsewhere) or profile.max_instances == 0
