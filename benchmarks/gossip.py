"""`python -m benchmarks.gossip`: how fast news spreads, what gossip costs, how soon the dead are noticed.

Many memberships on a virtual clock, so no time of this machine is in the numbers. Rounds are gossip
intervals; nodes begin theirs at random moments, and a message takes 5 to 20 thousandths of one.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.measure import say
from llamesh.core.membership import Died, Joined
from tests.core.membership.world import World

PROFILES = 20
# A probe is a GET over an open connection and its answer, which carries the load.
PROBE_BYTES = 500
STEADY_ROUNDS = 10
STEP = 0.05
LIMIT = 60.0
FULL_MESH = 10


@dataclass
class Row:
    """One size of mesh. Durations are rounds; bytes are sent ones, per node and round."""

    nodes: int
    news: list[float]
    news_target: float
    gossip_bytes: float
    probe_bytes: float
    bytes_target: float | None
    first_to_notice: list[float]
    all_notice: list[float]
    all_target: float | None
    wrongly_dead: int

    @property
    def missed(self) -> list[str]:
        """What isn't as it should be."""
        return [
            text
            for bad, text in (
                (max(self.news) >= self.news_target, "news"),
                (
                    self.bytes_target is not None
                    and self.gossip_bytes + self.probe_bytes > self.bytes_target,
                    "bytes",
                ),
                (self.all_target is not None and max(self.all_notice) > self.all_target, "death"),
                (self.wrongly_dead > 0, "wrongly dead"),
            )
            if bad
        ]


def profile(number: int) -> bytes:
    """What a node says of one profile, about as long as the real thing."""
    return json.dumps(
        {
            "model": f"model-{number}",
            "profile": "default",
            "fingerprint": f"{number:064x}",
            "n_ctx": 32768,
            "ready": True,
            "load_ms": 4200,
            "prefill_ms_per_token": 0.41,
            "decode_ms_per_token": 12.5,
        }
    ).encode()


def mesh(nodes: int, seed: int) -> World:
    """A mesh that has come to rest. Everybody is told everything at once: joining is another matter."""
    world = World(seed)
    values = [profile(number) for number in range(PROFILES)]
    for number in range(nodes):
        membership = world.start(f"node-{number:04}").membership
        for key, value in enumerate(values):
            membership.set(f"profile/{key}", value)
    records = [node.membership._table.own for node in world.up]
    for node in world.up:
        for record in records:
            if record.id != node.id:
                node.membership._table._put(None, record)
        node.membership.take_events()
    world.run(2)
    assert len({node.membership.root for node in world.up}) == 1
    return world


def steady(world: World) -> tuple[float, float]:
    """Bytes of gossip and of probes, per node and round, while nothing changes."""
    world.sent.clear()
    world.probes.clear()
    world.run(STEADY_ROUNDS)
    share = 1 / len(world.nodes) / STEADY_ROUNDS
    return sum(world.sent.values()) * share, sum(world.probes.values()) * PROBE_BYTES * share


def news(world: World, number: int) -> float:
    """Rounds until everybody has what one node changed."""
    teller = world.chance.choice(world.up)
    teller.membership.set("profile/0", profile(1000 + number))
    version = teller.membership._table.own.version
    records = [node.membership._table.records for node in world.up]
    return world.run_until(lambda: all(one[teller.id].version == version for one in records), LIMIT, STEP)


def death(world: World) -> tuple[float, float]:
    """Rounds from a crash until the first and until the last considers it dead."""
    victim = world.chance.choice(world.up).id
    world.crash(victim)
    tables = [node.membership._table for node in world.up]
    first = world.run_until(lambda: any(victim not in one.others for one in tables), LIMIT, STEP)
    return first, first + world.run_until(
        lambda: all(victim not in one.others for one in tables), LIMIT, STEP
    )


def measure(nodes: int, runs: int, seed: int) -> Row:
    """One row, without the target that needs the first one."""
    world = mesh(nodes, seed)
    gossip, probes = steady(world)
    spread = [news(world, number) for number in range(runs)]
    deaths = []
    dead = set()
    for _ in range(min(runs, nodes - 2)):
        before = {node.id for node in world.up}
        deaths.append(death(world))
        dead |= before - {node.id for node in world.up}
    wrong = 0
    for node in world.up:
        events = node.membership.take_events()
        wrong += sum(1 for one in events if isinstance(one, Died | Joined) and one.id not in dead)
    return Row(
        nodes=nodes,
        news=spread,
        news_target=2 * math.log2(nodes) + 3,
        gossip_bytes=gossip,
        probe_bytes=probes,
        bytes_target=None,
        first_to_notice=[first for first, _ in deaths],
        all_notice=[last for _, last in deaths],
        # Three intervals are promised where everybody probes everybody.
        all_target=3.0 if nodes <= 9 else None,
        wrongly_dead=wrong,
    )


def table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    lines = [
        "         news reaches all            bytes per node and round            a crash is noticed by",
        "nodes    median    max  target    gossip  probes     sum  target     the first        all   verdict",
    ]
    for row in rows:
        most = "-" if row.bytes_target is None else f"{row.bytes_target:.0f}"
        lines.append(
            f"{row.nodes:5}    {statistics.median(row.news):6.2f} {max(row.news):6.2f}"
            f"  {row.news_target:6.1f}"
            f"    {row.gossip_bytes:6.0f}  {row.probe_bytes:6.0f}  {row.gossip_bytes + row.probe_bytes:6.0f}"
            f"  {most:>6}     {statistics.median(row.first_to_notice):4.2f} {max(row.first_to_notice):4.2f}"
            f"  {statistics.median(row.all_notice):5.2f} {max(row.all_notice):5.2f}"
            f"   {'missed: ' + ', '.join(row.missed) if row.missed else 'pass'}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 when a target was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gossip", description=__doc__)
    parser.add_argument("--nodes", default="10,100,1000", help="sizes of the mesh (10,100,1000)")
    parser.add_argument("--runs", type=int, default=5, help="pieces of news, and deaths (5)")
    parser.add_argument("--seed", type=int, default=1, help="of all chance (1)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to write the rows as JSON")
    options = parser.parse_args(argv)
    rows: list[Row] = []
    for nodes in map(int, options.nodes.split(",")):
        say(f"{nodes} nodes")
        row = measure(nodes, options.runs, options.seed)
        if base := [one for one in rows if one.nodes >= FULL_MESH]:
            least = base[0]
            # No faster than log N grows, from the first row on that has as many to probe as a round probes.
            growth = math.log(nodes) / math.log(least.nodes)
            row.bytes_target = (least.gossip_bytes + least.probe_bytes) * growth
        rows.append(row)
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return int(any(row.missed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
