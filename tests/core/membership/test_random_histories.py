"""Meshes to whom anything may happen in any order, made up by hypothesis.

While it happens: nobody loses its own word, and nobody sees what was never said. When it is over: all see the
same, which is the truth, and then nothing more happens.
"""

from __future__ import annotations

import random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llamesh.core.membership import Options
from tests.core.membership.world import Node, Weather, World

NAMES = ["a", "b", "c", "d", "e", "f"]
KEYS = ["k", "l", "m"]

who = st.sampled_from(NAMES)


class Histories(RuleBasedStateMachine):
    """One mesh of up to six."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.said: dict[str, dict[str, bytes]] = {}  # what each node's present life says
        self.ever: set[tuple[str, str, bytes]] = set()
        self.count = 0

    @initialize(seed=st.integers(0, 10**6), small=st.booleans())
    def begin(self, seed: int, small: bool) -> None:
        self.world = World(seed, Options(message_budget=4096, max_deleted=3) if small else Options())
        for name in NAMES[:3]:
            self._start(name)
        self.world.run(3)

    def _start(self, name: str) -> None:
        others = [node.id for node in self.world.up if node.id != name]
        self.world.start(name)
        self.said[name] = {}
        if others:
            self.world.introduce([random.Random(self.count).choice(others), name])

    def _running(self, name: str) -> Node | None:
        node = self.world.nodes.get(name)
        return node if node is not None and node.running else None

    @rule(rounds=st.sampled_from([0.1, 0.6, 1, 3, 12]))
    def time_passes(self, rounds: float) -> None:
        self.world.run(rounds)

    @rule(name=who, key=st.sampled_from(KEYS), delete=st.booleans())
    def somebody_writes(self, name: str, key: str, delete: bool) -> None:
        if (node := self._running(name)) is None:
            return
        self.count += 1
        value = b'"%d%s"' % (self.count, b"x" * (self.count % 7) * 300)
        node.membership.set(key, None if delete else value)
        if delete:
            self.said[name].pop(key, None)
        else:
            self.said[name][key] = value
            self.ever.add((name, key, value))

    @rule(name=who)
    def somebody_starts_or_restarts(self, name: str) -> None:
        self.count += 1
        self._start(name)

    @rule(name=who, how=st.sampled_from(["crash", "leave", "freeze"]))
    def somebody_goes(self, name: str, how: str) -> None:
        node = self._running(name)
        # Somebody stays, or there is no mesh to return to.
        if node is None or node.frozen or len(self.world.up) < 2:
            return
        getattr(self.world, how)(name)

    @rule(name=who)
    def somebody_thaws(self, name: str) -> None:
        if (node := self._running(name)) is not None and node.frozen:
            self.world.thaw(name)

    @rule(left=st.sets(who, min_size=1, max_size=3))
    def the_mesh_is_cut(self, left: set[str]) -> None:
        self.world.cut(sorted(left), sorted(set(NAMES) - left))

    @rule(one=who, other=who)
    def one_way_is_cut(self, one: str, other: str) -> None:
        if one != other:
            self.world.blocked.add((one, other))

    @precondition(lambda self: self.world.blocked)
    @rule()
    def the_mesh_heals(self) -> None:
        self.world.heal()

    @rule(
        loss=st.sampled_from([0, 0.1, 0.5]),
        double=st.sampled_from([0, 0.5]),
        delay=st.sampled_from([(0.005, 0.02), (0.0, 2.0)]),
    )
    def the_weather_changes(self, loss: float, double: float, delay: tuple[float, float]) -> None:
        self.world.weather = Weather(loss, double, delay)

    @rule(name=who, by=st.sampled_from([-500.0, -2.0, 3.0, 500.0]))
    def a_clock_jumps(self, name: str, by: float) -> None:
        if (node := self._running(name)) is not None:
            node.skew += by

    @invariant()
    def everybody_has_its_own_word(self) -> None:
        for node in self.world.nodes.values():
            if node.running:
                mine = node.membership.members()[node.id]
                assert dict(mine.state) == self.said[node.id]
                assert mine.status == "alive"

    @invariant()
    def nobody_sees_what_was_never_said(self) -> None:
        for node in self.world.nodes.values():
            for member in node.membership.members().values():
                words = {(member.id, key, value) for key, value in member.state.items()}
                assert words <= self.ever

    def teardown(self) -> None:
        world = self.world
        world.heal()
        world.weather = Weather()
        for node in world.nodes.values():
            if node.frozen:
                world.thaw(node.id)
        # Connections come back when the network does.
        world.introduce([node.id for node in world.up])
        # What was under way in bad weather arrives, and then it takes a few rounds.
        world.run(3)
        world.run_until(world.agreed, limit=25)
        world.run(4)
        for node in world.up:
            world.events(node.id).clear()
        roots = {node.membership.root for node in world.up}
        world.run(15)
        assert world.agreed()
        assert roots == {node.membership.root for node in world.up}
        up = {node.id for node in world.up}
        for node in world.up:
            assert world.events(node.id) == [], world
            seen = node.membership.members()
            alive = {one.id for one in seen.values() if one.status == "alive"}
            assert alive == up
            assert all(one.direct for one in seen.values() if one.id in up)
            assert all(dict(seen[one].state) == self.said[one] for one in up)


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
