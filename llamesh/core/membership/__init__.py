"""Who is in the mesh and what each says of itself: gossip and failure detection, without I/O.

Theory of operation
-------------------

*State.* Each node owns its entries: key -> (version, value). `version` is one counter per owner, so "all
entries after version v, ascending" is a delta, and a delta cut short anywhere is still one. Only the owner
writes; what a third says of a node is hearsay that was once the owner's own word, and is merged by version.

*The join.* What is known of a node is a record: its life (epoch, incarnation, rank) and its entries. Two
records merge by taking the greater epoch as a whole; within an epoch the greater (incarnation, rank), and of
each entry the greater version. That is idempotent, commutative and associative, so messages may be lost,
doubled and reordered, and nodes that have heard the same things know the same things (`records`).

*A life.* An epoch is one start of a node, in Unix milliseconds. Ranks go alive < dead < left. A node that
hears itself called suspect, dead or left takes the next incarnation, which beats the claim. One that hears of
an epoch above its own (its clock jumped back, or another node uses its id) takes the epoch after that. So the
dead come back by their own word only. Suspicion is an opinion of one node, not part of the join.

*Anti-entropy.* An exchange begins with one hash over all living records. Where it is equal, all is said.
Where it differs, the hashes of buckets follow, then digests of the buckets that differ, then deltas both
ways, each message cut to a byte budget (`messages`, `exchange`, `digest`).

*Failure detection.* Each round probes some members. A failed probe makes a suspect at once and asks others to
probe for us; `suspect_rounds` failures in different rounds make a death. Deaths and refutations travel as
rumours on every message besides (`liveness`, `rumours`).

*Doubt.* A death that one only heard of is a claim. It is believed once a probe of one's own fails; when the
accused shows life instead, it is told, and refutes. So a node that was cut off for a while and comes back
doesn't bury everybody in the eyes of all others. Doubt delays the join and never refuses it.

*Forgetting.* The dead and the left stay as tombstones for `tombstone_seconds`, so that stale news can't
revive them. Now and then one of the dead is knocked at, so that halves of a healed mesh find each other.

Nothing here knows a clock: times are arguments, in seconds of any clock. A clock that jumps, or a machine
that slept, shifts the timers instead of expiring them.
"""

from llamesh.core.membership.events import (
    Contested,
    Died,
    Event,
    Joined,
    Left,
    Recovered,
    Restarted,
    Suspected,
    Updated,
)
from llamesh.core.membership.membership import Membership, Round
from llamesh.core.membership.messages import BadMessage
from llamesh.core.membership.options import Options
from llamesh.core.membership.table import Member, Status
from llamesh.core.membership.targets import Chance

__all__ = [
    "BadMessage",
    "Chance",
    "Contested",
    "Died",
    "Event",
    "Joined",
    "Left",
    "Member",
    "Membership",
    "Options",
    "Recovered",
    "Restarted",
    "Round",
    "Status",
    "Suspected",
    "Updated",
]
