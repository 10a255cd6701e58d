"""What a request will cost on one node, in expected milliseconds until its answer is complete.

The terms, in the order in which they pass (`expected`):

    link       the round trip to the node; 0 here
    wake       until a sleeping machine is up
    download   until the weights are there        \\
    room       until those who must go have left   } only when the answer comes from an instance that
    start      load time, or what is left of it   /  isn't ready yet
    queue      until it is our turn, see below
    prefill    tokens of the prompt that aren't in the cache there x time per token
    decode     expected tokens x time per token at the load that we shall meet

Queue. `ahead` requests are before us on `s` ready slots, those included that we sent and that the
node's news doesn't know yet. While ahead < s it is 0. Else we need the p-th slot that gets free,
p = ahead - s + 1, in round ceil(p / s); on average over p that is (p + (s - 1) / 2) / s service times.
That busy slots are half through would be right for requests that come at any moment. But a burst
comes at once, and whoever asks in a loop asks when an answer ends: what is ahead has only just begun.
(Measured on the model in tests/core/nodes.py, 64 clients, one of four nodes four times as fast: p95 is
1.08 x the best split's so, and 1.30 x with half a service time less; with services that vary
exponentially it is as good or better, too.) Each request that is placed so pushes the next one off by
service / s, so a burst spreads evenly over equal nodes, and over unequal ones so that all end at
about the same time, which is the best split there is without knowing the lengths.

An instance that loads, or that a queue would make the node start, is taken in when it will be ready
before our turn: what waits until then is served by the ready slots, the rest by both. Where nothing is
ready, all begin together when it is, so they come in batches: floor(ahead / slots) x service.

Decode. A step reads all weights once for all requests of the instance, so neighbours slow it down by
less than their number: alone x (1 + sharing x neighbours). The line is fitted by `core.speeds`. Where
only the mean time of a request is known, not that of a token, it is taken as it is.

Zero knowledge. 0 stands for "unknown" in all learned values. What one node doesn't know is taken
from the others that were asked (`Typical`), so that it is neither sought nor shunned for being
new. What nobody knows comes from the mean request of the node (`service_ms`), and where that is
unknown, too, from constants: they are the same for all candidates, so they decide nothing by
themselves; they only set the scale against which a queue, a load or a link is weighed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import msgspec

# The scale of things: a model of 8 GB on an ordinary GPU reads some 1,000 tokens a second, writes
# some 40 of them, and an answer of chat has a few hundred.
DEFAULT_PREFILL_MS_PER_TOKEN = 1.0
DEFAULT_DECODE_MS_PER_TOKEN = 25.0
DEFAULT_OUTPUT_TOKENS = 200

# The same model from a local disk, with what llama-server does before it reads.
DEFAULT_LOAD_MS = 5000.0

# A load that takes longer than expected goes on for about this share of the time that it has taken.
_OVERDUE = 0.25

# Each neighbour on an instance slows its decode by this share of being alone. GPUs that wait for
# their memory show 0.02 to 0.2, CPUs and small models 0.3 to 1.
DEFAULT_SHARING = 0.2

_NO_CACHE: Mapping[str, int] = MappingProxyType({})


class Outlook(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """What is known about one node that could serve one profile. Times are milliseconds, 0 = unknown.

    node: its id, "" = here; link_ms: round trip; ready_slots: slots of ready instances; busy: those
    taken, queued: requests that wait there (their sum is what counts), sent: our own forwards in
    flight that `busy` and `queued` don't contain; loading_left_ms: an instance loads, and this is left
    of it, None = none does (see `loading_left`); loading_slots: what it will have; load_ms: time of a
    new start, None = there can't be one (no room ever, as many instances as there may be, closed), 0 =
    unknown; room_ms, download_ms: what comes before a new start; wake_ms: until a sleeping machine is
    up; slots_per_instance: of ready or new ones; service_ms: mean time that a request holds a slot;
    prefill_ms_per_token, decode_ms_per_token: learned, the latter for a request that is alone on its
    instance; sharing: how much each neighbour slows that down, as a share, negative = unknown; n_ctx:
    tokens that one request may use, 0 = unknown; failing: it failed to start there a moment ago, so
    only what is ready or loads counts; trust: how much the learned values are worth, see `trust_in`.
    """

    node: str = ""
    link_ms: float = 0.0
    ready_slots: int = 0
    busy: int = 0
    queued: int = 0
    sent: int = 0
    loading_left_ms: float | None = None
    loading_slots: int = 0
    load_ms: float | None = None
    room_ms: float = 0.0
    download_ms: float = 0.0
    wake_ms: float = 0.0
    slots_per_instance: int = 0
    service_ms: float = 0.0
    prefill_ms_per_token: float = 0.0
    decode_ms_per_token: float = 0.0
    sharing: float = -1.0
    n_ctx: int = 0
    failing: bool = False
    trust: float = 1.0


class Features(msgspec.Struct, frozen=True, kw_only=True):
    """What is known about a request before it is served. 0 = unknown.

    prompt_tokens: an estimate; output_tokens: expected, a learned mean or `max_tokens`; cached: node id
    ("" = here) -> tokens of the prompt that are in the cache there, a node that isn't in it has none;
    number: the request's place in the order of coming, spreads equals.
    """

    prompt_tokens: int = 0
    output_tokens: int = 0
    cached: Mapping[str, int] = _NO_CACHE
    number: int = 0


class Typical(msgspec.Struct, frozen=True, gc=False):
    """Means over the candidates that know, and the least of them; 0 = none does."""

    service_ms: float = 0.0
    prefill_ms_per_token: float = 0.0
    decode_ms_per_token: float = 0.0
    load_ms: float = 0.0
    least_service_ms: float = 0.0
    least_prefill_ms: float = 0.0
    least_decode_ms: float = 0.0


UNKNOWN = Typical()

# So many requests are half of all the trust there can be.
_HALF_TRUST = 5.0

# Values that no request has confirmed for so long, in seconds, rest on half as many.
_FADES = 600.0


def confirmed(requests: float, idle_seconds: float) -> float:
    """So many requests, the last of them so long ago, are worth this many of now."""
    return requests * math.exp2(-idle_seconds / _FADES)


def trust_in(requests: float) -> float:
    """How much learned values are worth that rest on so many requests.

    The first requests of an instance are slow, and so is a machine that was busy with something else. Who
    looks slow isn't asked, and so never gets to show that it isn't: trust that fades lets it try again.
    """
    return requests / (requests + _HALF_TRUST)


class Terms(msgspec.Struct, frozen=True, gc=False):
    """What a node would cost, in milliseconds, part by part. `why_not`: why it can't be had, for
    people; then the total is infinite and the parts are 0.
    """

    node: str
    total: float
    link: float = 0.0
    wake: float = 0.0
    download: float = 0.0
    room: float = 0.0
    start: float = 0.0
    queue: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    why_not: str = ""

    @property
    def wait(self) -> float:
        """What passes on the node before the request has a slot; infinite where it never has one."""
        if self.why_not:
            return math.inf
        return self.wake + self.download + self.room + self.start + self.queue

    def text(self) -> str:
        """One line for people: "node-b: 41 ms = link 1 + queue 30 + prefill 10"."""
        name = self.node or "here"
        if self.why_not:
            return f"{name}: no, {self.why_not}"
        parts = [f"{part} {_number(value)}" for part in _PARTS if (value := getattr(self, part)) > 0]
        return f"{name}: {_number(self.total)} ms = {' + '.join(parts) or '0'}"


_PARTS = ("link", "wake", "download", "room", "start", "queue", "prefill", "decode")


def _number(value: float) -> str:
    """Whole milliseconds; tenths where they are all there is."""
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}".removesuffix(".0")


def impossible(node: str, why_not: str) -> Terms:
    """The terms of a node that isn't to be had."""
    return Terms(node, math.inf, why_not=why_not)


def typical(outlooks: Iterable[Outlook]) -> Typical:
    """What those of them know who know it, on average."""
    service, prefill, decode, load = [], [], [], []
    for one in outlooks:
        if one.service_ms > 0:
            service.append(one.service_ms)
        if one.prefill_ms_per_token > 0:
            prefill.append(one.prefill_ms_per_token)
        if one.decode_ms_per_token > 0:
            decode.append(one.decode_ms_per_token)
        if one.load_ms:
            load.append(one.load_ms)
    return Typical(
        _mean(service),
        _mean(prefill),
        _mean(decode),
        _mean(load),
        min(service, default=0.0),
        min(prefill, default=0.0),
        min(decode, default=0.0),
    )


def _doubted(value: float, least: float, trust: float) -> float:
    """Between the best that anybody has shown and what is known of this one: geometrically, as speeds are."""
    return least * (value / least) ** trust if 0 < least < value else value


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def loading_left(load_ms: float, elapsed_ms: float) -> float:
    """What is left of a load that has taken `elapsed_ms` and is expected to take `load_ms`, 0 = unknown.

    One that is overdue isn't done at once: it has shown that it is slow, and the longer it has
    taken, the longer it is expected to go on.
    """
    return max((load_ms or DEFAULT_LOAD_MS) - elapsed_ms, elapsed_ms * _OVERDUE)


def expected(outlook: Outlook, features: Features, others: Typical = UNKNOWN) -> Terms:
    """The cost of serving the request there. See the module for the formulas.

    `others`: stands in for what the node doesn't know. The terms say so when the node can't serve at all.
    """
    ready = outlook.ready_slots
    ahead = outlook.busy + outlook.queued + outlook.sent
    if ahead < 0:
        ahead = 0

    # The work itself, as if alone. What one request costs is also what each of those ahead costs.
    service = outlook.service_ms or others.service_ms
    prefill_rate = outlook.prefill_ms_per_token or others.prefill_ms_per_token
    decode_rate = outlook.decode_ms_per_token or others.decode_ms_per_token
    if outlook.trust < 1:
        service = _doubted(service, others.least_service_ms, outlook.trust)
        prefill_rate = _doubted(prefill_rate, others.least_prefill_ms, outlook.trust)
        decode_rate = _doubted(decode_rate, others.least_decode_ms, outlook.trust)
    tokens = features.prompt_tokens
    if features.cached and ready:  # what isn't loaded any more has lost its cache
        tokens -= features.cached.get(outlook.node, 0)
    if prefill_rate <= 0 and service <= 0:
        prefill_rate = DEFAULT_PREFILL_MS_PER_TOKEN
    prefill = tokens * prefill_rate if tokens > 0 else 0.0
    output = features.output_tokens
    sharing = outlook.sharing if outlook.sharing >= 0 else DEFAULT_SHARING
    if output > 0 and decode_rate > 0:
        decode = output * decode_rate
    elif service > 0:
        # A mean over whatever neighbours there were: it contains what they cost.
        decode = service - prefill if service > prefill else 0.0
        sharing = 0.0
    else:
        decode = (output or DEFAULT_OUTPUT_TOKENS) * (decode_rate or DEFAULT_DECODE_MS_PER_TOKEN)
    if service <= 0:
        service = prefill + decode

    # The wait for a slot.
    download = room = start = queue = 0.0
    slots = outlook.slots_per_instance or ready or 1
    if ahead >= ready:
        left = outlook.loading_left_ms
        place = ahead - ready + 1
        turn = (place + (ready - 1) / 2) * service / ready if ready else math.inf
        if left is not None:
            fresh = outlook.loading_slots or slots
            if left < turn:
                start = left
        elif outlook.load_ms is not None and not outlook.failing:
            fresh = slots
            load = outlook.load_ms or others.load_ms or DEFAULT_LOAD_MS
            left = load + outlook.room_ms + outlook.download_ms
            if left < turn:
                start, room, download = load, outlook.room_ms, outlook.download_ms
        if left is None or left >= turn:
            if not ready:
                reason = (
                    "it failed to start there a moment ago" if outlook.failing else "it can't start there"
                )
                return impossible(outlook.node, reason)
            queue = turn
        elif ready:
            behind = place - left * ready / service - fresh
            if behind > 0:
                queue = behind * service / (ready + fresh)
        else:
            queue = ahead // fresh * service
            slots = fresh

    if sharing and slots > 1 and ahead:
        # Requests go to the least busy instance, so they are spread evenly over them.
        instances = ready // slots or 1
        neighbours = ahead / instances if ahead < ready or not ready else slots - 1
        if neighbours > slots - 1:
            neighbours = slots - 1
        decode *= 1 + sharing * neighbours

    link, wake = outlook.link_ms, outlook.wake_ms
    total = link + wake + download + room + start + queue + prefill + decode
    return Terms(outlook.node, total, link, wake, download, room, start, queue, prefill, decode)
