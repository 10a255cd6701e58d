"""How much a key may do, over all nodes: what was counted in windows of time, against its limits.

Each node counts what its own clients do (`Meter.take`, `Meter.end`) and tells the others (`Meter.told`),
under the key's name; each adds up what it heard (`Meter.hear`). A count belongs to a window by Unix time, so
nodes whose clocks agree mean the same by it.

    minute    buckets of 5 s; those of the last 60 s count whole, so it is 60 to 65 s, and never more than
              the limit pass in any 60 s
    day       UTC, from midnight to midnight
    running   now; of a node that is gone none are

What one node admits the others hear with the next round of gossip, and overshoot by that much. Tokens are
known at the end of an answer: what is under way is never cut, the next request is refused.

What a node tells of one bucket only grows, so of two tellings the larger is the later one. That holds,
nearly, even for one that has lost its last half minute to a crash.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple, TypeAlias, get_args

import msgspec

# A tally's key in the gossiped state of its node begins with this; the key's name follows.
TALLY_PREFIX = "k:"

BUCKET_SECONDS = 5
DAY_SECONDS = 86_400

# The present bucket, and all that reach into the 60 s before it began.
BUCKETS = 1 + 60 // BUCKET_SECONDS

# Clocks differ. What a node has counted in times that are yet to come is believed as far as this.
_AHEAD = BUCKETS

# Nodes that one meter remembers, dead ones until their day is over.
_MOST_NODES = 4096

_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]

Kind = Literal[
    "requests_per_minute",
    "requests_per_day",
    "tokens_per_minute",
    "tokens_per_day",
    "max_concurrent_requests",
]

# In the order of the members of `Limits`.
_KINDS: tuple[Kind, ...] = get_args(Kind)


class Limits(NamedTuple):
    """What one key may do; 0 = as much as it likes."""

    requests_per_minute: int = 0
    requests_per_day: int = 0
    tokens_per_minute: int = 0
    tokens_per_day: int = 0
    max_concurrent_requests: int = 0


NO_LIMITS = Limits()


class Bucket(msgspec.Struct, array_like=True):
    """Counted in BUCKET_SECONDS; number: Unix time over that."""

    number: _Count
    requests: _Count = 0
    tokens: _Count = 0


class Tally(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one node has counted for one key: told to others, and kept over a restart.

    minute: oldest first; day: Unix time over DAY_SECONDS.
    """

    minute: Annotated[tuple[Bucket, ...], msgspec.Meta(max_length=64)] = ()
    day: _Count = 0
    day_requests: _Count = 0
    day_tokens: _Count = 0
    running: Annotated[int, msgspec.Meta(ge=0, le=1 << 31)] = 0


NOTHING = Tally()

_decoder = msgspec.json.Decoder(Tally)


def decode_tally(data: bytes) -> Tally | None:
    """What a peer says, None where it can't be understood: it is then as if it said nothing."""
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


class Refusal(NamedTuple):
    """Which limit is reached, and in how many seconds a request would pass if nothing else happened; None:
    nobody knows, since it depends on how long others take."""

    kind: Kind
    limit: int
    seconds: float | None


class Room(NamedTuple):
    """What is left of the tightest limit of one sort. seconds: until all of it is there again."""

    limit: int
    left: int
    seconds: float


class Used(NamedTuple):
    """What counts now, over all nodes."""

    requests_per_minute: int
    requests_per_day: int
    tokens_per_minute: int
    tokens_per_day: int
    max_concurrent_requests: int


class Meter:
    """The counters of one key. `now` is always Unix time; `changed` says whether `told` would be news."""

    def __init__(self, limits: Limits = NO_LIMITS) -> None:
        self.limits = limits
        self.running = 0
        self.changed = False
        self._minute: list[Bucket] = []  # our own
        self._day = self._day_requests = self._day_tokens = 0
        self._heard: dict[str, Tally] = {}
        # The sum of what was heard, so that a request doesn't pay for the size of the mesh.
        self._others: dict[int, list[int]] = {}  # bucket -> requests, tokens
        self._other_days: dict[int, list[int]] = {}
        self._others_running = 0
        self._requests = self._tokens = 0  # of the minute, ours and theirs
        self._newest = -1  # the bucket of the last look at the clock
        self._past = 0  # buckets before it are over

    # Our own.

    def take(self, now: float) -> Refusal | None:
        """Count a request that begins, unless a limit is reached: then nothing is counted."""
        refusal = self.refusal(now)
        if refusal is None:
            self._bucket(now).requests += 1
            self._requests += 1
            self._day_requests += 1
            self.running += 1
        return refusal

    def end(self, now: float, tokens: int) -> None:
        """A request that was taken is over."""
        self.running -= 1
        self._bucket(now).tokens += tokens
        self._tokens += tokens
        self._day_tokens += tokens

    def refusal(self, now: float) -> Refusal | None:
        """The limit that stands against one more request; of several the one that does so longest."""
        used, limits, worst = self.used(now), self.limits, None
        if not any(map(_reached, limits, used)):
            return None
        for kind, limit, count in zip(_KINDS, limits, used, strict=True):
            if _reached(limit, count):
                found = Refusal(kind, limit, self._wait(kind, limit, now))
                if worst is None or (found.seconds or 0) > (worst.seconds or 0):
                    worst = found
        return worst

    def used(self, now: float) -> Used:
        """What counts against the limits now."""
        _, today = self._pass(now)
        there = self._other_days.get(today, (0, 0))
        return Used(
            self._requests,
            self._day_requests + there[0],
            self._tokens,
            self._day_tokens + there[1],
            self.running + self._others_running,
        )

    def room(self, now: float) -> tuple[Room | None, Room | None]:
        """Of requests, and of tokens: None where the key has no such limit."""
        used, limits = self.used(now), self.limits
        minute, midnight = self._empty_in(now), _midnight(now)
        return (
            _tightest(
                (limits.requests_per_minute, used.requests_per_minute, minute),
                (limits.requests_per_day, used.requests_per_day, midnight),
            ),
            _tightest(
                (limits.tokens_per_minute, used.tokens_per_minute, minute),
                (limits.tokens_per_day, used.tokens_per_day, midnight),
            ),
        )

    def told(self, now: float) -> Tally:
        """What the others are to know, and a file to keep."""
        self._pass(now)
        self.changed = False
        minute = tuple(Bucket(one.number, one.requests, one.tokens) for one in self._minute)
        return Tally(minute, self._day, self._day_requests, self._day_tokens, self.running)

    def resume(self, tally: Tally, now: float) -> None:
        """Go on from what an earlier life of this node has counted."""
        newest, today = self._pass(now)
        if tally.day == today:
            self._day_requests += tally.day_requests
            self._day_tokens += tally.day_tokens
        kept = sorted((one for one in tally.minute if self._past <= one.number <= newest), key=_number)
        self._minute = [*kept, *self._minute]
        self._requests += sum(one.requests for one in kept)
        self._tokens += sum(one.tokens for one in kept)
        self.changed = True

    # The others.

    def hear(self, node: str, tally: Tally, now: float) -> None:
        """What another node says it has counted. Older buckets than it tells of stay until they are over."""
        self._pass(now)
        before = self._heard.pop(node, NOTHING)
        if before is NOTHING and len(self._heard) >= _MOST_NODES:
            return
        joined = self._joined(before, tally, now)
        self._add(before, -1)
        self._add(joined, 1)
        if joined != NOTHING:
            self._heard[node] = joined

    def gone(self, node: str, now: float) -> None:
        """It left or died: nothing of it runs any more. What it has counted counts until it is over."""
        if node in self._heard:
            self.hear(node, NOTHING, now)

    def _joined(self, before: Tally, tally: Tally, now: float) -> Tally:
        buckets: dict[int, Bucket] = {}
        newest = _bucket(now)
        for one in (*before.minute, *tally.minute):
            if self._past <= one.number <= newest + _AHEAD:
                known = buckets.get(one.number)
                if known is not None:
                    one = Bucket(one.number, max(one.requests, known.requests), max(one.tokens, known.tokens))
                buckets[one.number] = one
        minute = tuple(buckets[number] for number in sorted(buckets))
        today = int(now) // DAY_SECONDS
        days = [one for one in (before, tally) if today <= one.day <= today + 1]
        day = max((one.day for one in days), default=0)
        days = [one for one in days if one.day == day] or [NOTHING]
        requests, tokens = max(one.day_requests for one in days), max(one.day_tokens for one in days)
        return Tally(minute, day, requests, tokens, tally.running)

    def _add(self, tally: Tally, sign: int) -> None:
        for one in tally.minute:
            if one.number >= self._past:
                counts = self._others.setdefault(one.number, [0, 0])
                counts[0] += sign * one.requests
                counts[1] += sign * one.tokens
                self._requests += sign * one.requests
                self._tokens += sign * one.tokens
        if tally.day and tally.day >= self._day:
            counts = self._other_days.setdefault(tally.day, [0, 0])
            counts[0] += sign * tally.day_requests
            counts[1] += sign * tally.day_tokens
        self._others_running += sign * tally.running

    # Time.

    def _pass(self, now: float) -> tuple[int, int]:
        """Forget what is over. The present bucket and the present day."""
        newest = _bucket(now)
        if newest == self._newest:
            return newest, self._day
        self._newest, today = newest, int(now) // DAY_SECONDS
        past = newest - BUCKETS + 1
        if newest < self._past:
            # The clock was set back by more than a minute: what was counted by the wrong time is void.
            self._minute.clear()
            self._others.clear()
            self._heard = {node: _without_minute(one) for node, one in self._heard.items()}
            self._requests = self._tokens = 0
            self._past = past
        if past > self._past:
            self._past = past
            while self._minute and self._minute[0].number < past:
                over = self._minute.pop(0)
                self._requests -= over.requests
                self._tokens -= over.tokens
            for number in [number for number in self._others if number < past]:
                requests, tokens = self._others.pop(number)
                self._requests -= requests
                self._tokens -= tokens
        if not 0 <= self._day - today <= 1:
            self._day, self._day_requests, self._day_tokens = today, 0, 0
            for day in [day for day in self._other_days if day < today]:
                del self._other_days[day]
            for node in [node for node, one in self._heard.items() if one.day < today and not one.running]:
                self.hear(node, NOTHING, now)
        return newest, today

    def _bucket(self, now: float) -> Bucket:
        """Where to count now. A clock that was set back goes on in the newest one."""
        newest, _ = self._pass(now)
        self.changed = True
        if not self._minute or self._minute[-1].number < newest:
            self._minute.append(Bucket(newest))
        return self._minute[-1]

    def _wait(self, kind: Kind, limit: int, now: float) -> float | None:
        if kind == "max_concurrent_requests":
            return None
        if kind in ("requests_per_day", "tokens_per_day"):
            return _midnight(now)
        what = int(kind == "tokens_per_minute")
        counts = sorted(self._counts())
        left = sum(one[1 + what] for one in counts)
        for one in counts:
            left -= one[1 + what]
            if left < limit:
                return _over(one[0], now)
        return 0.0

    def _empty_in(self, now: float) -> float:
        """Seconds until all that counts of the minute is over."""
        ours = self._minute[-1].number if self._minute else 0
        theirs = max(self._others) if self._others else 0
        return _over(max(ours, theirs) or _bucket(now), now)

    def _counts(self) -> Iterator[tuple[int, int, int]]:
        """Bucket, requests, tokens; in any order, and of a bucket of ours and of others one each."""
        for one in self._minute:
            yield one.number, one.requests, one.tokens
        for number, (requests, tokens) in self._others.items():
            yield number, requests, tokens


def _tightest(*limits: tuple[int, int, float]) -> Room | None:
    """Of limits, each with what is used of it and for how many seconds, the one of which least is left."""
    set_ones = [one for one in limits if one[0]]
    if not set_ones:
        return None
    limit, used, seconds = min(set_ones, key=lambda one: one[0] - one[1])
    return Room(limit, max(0, limit - used), seconds)


def _reached(limit: int, used: int) -> bool:
    return 0 < limit <= used


def _without_minute(tally: Tally) -> Tally:
    return Tally((), tally.day, tally.day_requests, tally.day_tokens, tally.running)


def _number(bucket: Bucket) -> int:
    return bucket.number


def _bucket(now: float) -> int:
    return int(now) // BUCKET_SECONDS


def _over(bucket: int, now: float) -> float:
    """Seconds until that bucket doesn't count any more."""
    return (bucket + BUCKETS) * BUCKET_SECONDS - now


def _midnight(now: float) -> float:
    return math.floor(now / DAY_SECONDS + 1) * DAY_SECONDS - now
