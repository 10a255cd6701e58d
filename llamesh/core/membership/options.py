"""What can be chosen about gossip and failure detection."""

from __future__ import annotations

from dataclasses import dataclass

MAX_STEPS = 1000  # of one exchange, whatever is chosen


@dataclass(frozen=True, slots=True)
class Options:
    """Durations are seconds, sizes bytes.

    `interval`: between two rounds as the caller means to start them; used to notice that we slept.
    `fanout`: members that each round gossips with; fewer in a mesh of up to four. `probe_count`: members that
    each round probes, besides those in use. `indirect_count`: how many are asked to probe for us.
    `suspect_rounds`: failed rounds of probing until a suspect is dead, None for `liveness.rounds_to_death`.
    `message_budget`: a message is cut to it; a single larger entry goes alone. `max_steps`: messages of one
    exchange, both ways. `max_rumours`: in one message. `max_members` counts ourselves and tombstones.
    `max_keys` and `max_state` (the sum of keys and values) are for one node, deleted keys included.
    `max_deleted`: deleted keys of our own until we begin a new epoch without them.
    """

    interval: float = 1.0
    fanout: int = 3
    probe_count: int = 8
    indirect_count: int = 3
    suspect_rounds: int | None = None
    message_budget: int = 65_536
    max_steps: int = 24
    max_rumours: int = 32
    tombstone_seconds: float = 600.0
    max_tombstones: int = 1024
    max_members: int = 4096
    max_keys: int = 4096
    max_state: int = 4 << 20
    max_deleted: int = 256
    max_events: int = 65_536

    def __post_init__(self) -> None:
        if self.interval <= 0 or self.tombstone_seconds <= 0:
            raise ValueError("interval and tombstone_seconds must be above 0")
        if self.suspect_rounds is not None and self.suspect_rounds < 1:
            raise ValueError("suspect_rounds must be 1 or more, or None")
        # Half a budget holds digests; a bucket of them has to fit, and replies need some room besides.
        if not 4096 <= self.message_budget <= 512 << 10:
            raise ValueError("message_budget must be from 4 KiB to 512 KiB")
        # The first step says hello, the last is cut off: fewer than four can't carry a delta back.
        if not 4 <= self.max_steps <= MAX_STEPS:
            raise ValueError(f"max_steps must be from 4 to {MAX_STEPS}")
