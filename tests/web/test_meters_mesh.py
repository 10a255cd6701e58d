"""How well many nodes hold one limit together: real gossip on a virtual clock."""

from __future__ import annotations

import pytest

from llamesh.core.limits import DAY_SECONDS, Limits
from llamesh.web.meters import Meters
from tests.core.membership.world import World

NOON = 20_000 * DAY_SECONDS + 43_200.0

# Of one round, in which every node is asked once each.
STEPS = 20


class Crowd:
    """Nodes whose clients ask all the time, with one key."""

    def __init__(self, count: int, limits: Limits) -> None:
        self.world = World(seed=count)
        self.meters: dict[str, Meters] = {}
        self.passed = 0
        ids = [f"n{number}" for number in range(count)]
        for one in ids:
            self.world.start(one)
            meters = self.meters[one] = Meters(lambda: NOON + self.world.now)
            meters.configure({"alice": limits})
        self.world.introduce(ids)
        self.world.run_until(self._all_met)

    def _all_met(self) -> bool:
        return all(len(node.membership.members()) == len(self.meters) for node in self.world.nodes.values())

    def hammer(self, rounds: int) -> None:
        """Every node is asked STEPS times a round. What it counted, it tells once a round."""
        for step in range(rounds * STEPS):
            self.world.run(1 / STEPS)
            for number, (name, meters) in enumerate(self.meters.items()):
                membership = self.world.nodes[name].membership
                if (step + number) % STEPS == 0:
                    for key, value in meters.entries().items():
                        membership.set(key, value)
                for other, member in membership.members().items():
                    if other != name:
                        meters.hear(other, member.state)
                meter, now = meters.get("alice"), meters.clock()
                assert meter is not None
                if meter.take(now) is None:
                    self.passed += 1
                    meter.end(now, 1)


@pytest.mark.parametrize("count", [2, 5, 10])
def test_a_limit_is_passed_by_two_rounds_at_most(count: int) -> None:
    a_round = count * STEPS
    crowd = Crowd(count, Limits(requests_per_day=5 * a_round))
    crowd.hammer(15)
    assert 5 * a_round <= crowd.passed <= 7 * a_round


def test_half_a_mesh_that_is_cut_off_counts_for_itself_until_it_is_back() -> None:
    crowd = Crowd(4, Limits(requests_per_day=400, tokens_per_day=10_000))
    crowd.world.cut(["n0", "n1"], ["n2", "n3"])
    crowd.hammer(12)
    assert 800 <= crowd.passed <= 800 + 2 * 4 * STEPS
    crowd.world.heal()
    crowd.hammer(12)
    assert {
        meters.get("alice").used(meters.clock()).requests_per_day for meters in crowd.meters.values()
    } == {  # type: ignore[union-attr]
        crowd.passed
    }
