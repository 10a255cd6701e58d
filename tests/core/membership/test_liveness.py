"""Probes and what follows from them, one membership at a time."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from llamesh.core.membership import Died, Joined, Membership, Options, Recovered, Round, Suspected
from llamesh.core.membership.liveness import rounds_to_death


class Bench:
    """A membership whose members are made up."""

    def __init__(self, *names: str, options: Options | None = None, seed: int = 1) -> None:
        self.here = Membership("me", 1000, options or Options(), random.Random(seed))
        self.now = 0.0
        for name in names:
            self.tell(name, deltas=[[name, 5, 0, 0, 0, 2, [["k", 2, 1]]]])
        self.here.take_events()

    def tell(self, sender: str, life: tuple[int, int] = (5, 0), **sections: Any) -> dict[str, Any]:
        """A message from somebody; the reply."""
        message = {"v": 1, "me": [*life, 2], **sections}
        reply: dict[str, Any] = json.loads(self.here.answer(sender, json.dumps(message).encode(), self.now))
        return reply

    def round(self, gap: float = 1.0) -> Round:
        self.now += gap
        return self.here.start_round(self.now)

    def fail(self, name: str, indirect: bool | None = False) -> tuple[str, ...]:
        helpers = self.here.probe_result(name, False, self.now)
        if helpers and indirect is not None:
            self.here.indirect_result(name, indirect, self.now)
        return helpers

    def status(self, name: str) -> str:
        return str(self.here.members()[name].status)


def test_a_failed_probe_makes_a_suspect_and_asks_three_others() -> None:
    bench = Bench(*"abcdef")
    bench.round()
    helpers = bench.fail("a", None)
    assert len(set(helpers)) == 3
    assert "a" not in helpers
    assert bench.status("a") == "suspect"
    assert bench.here.members()["a"].since == bench.now
    assert bench.here.members()["a"].state == {"k": b"1"}
    assert bench.here.take_events() == [Suspected("a")]


@pytest.mark.parametrize(
    ("members", "rounds"), [(1, 2), (3, 2), (10, 2), (11, 3), (100, 3), (101, 4), (4096, 5)]
)
def test_how_many_failed_rounds_are_a_death(members: int, rounds: int) -> None:
    assert rounds_to_death(members) == rounds


@pytest.mark.parametrize("others", [1, 5, 20])
def test_a_suspect_dies_after_its_rounds_however_often_it_fails_within_one(others: int) -> None:
    bench = Bench(*(f"n{number}" for number in range(others)))
    bench.here.use(["n0"])
    for _ in range(rounds_to_death(others + 1) - 1):
        assert "n0" in bench.round().probes
        for _ in range(5):
            bench.fail("n0")
        assert bench.status("n0") == "suspect"
    assert "n0" in bench.round().probes
    bench.fail("n0")
    assert bench.status("n0") == "dead"
    assert bench.here.members()["n0"].state == {}
    assert bench.here.remembered("n0") == {"k": b"1"}
    assert bench.here.take_events() == [Suspected("n0"), Died("n0")]
    assert "n0" not in bench.round().probes


def test_an_answer_ends_suspicion_and_the_count_begins_anew() -> None:
    bench = Bench(*"abc")
    for _ in range(3):
        bench.round()
        bench.fail("a")
        bench.here.probe_result("a", True, bench.now)
        assert bench.status("a") == "alive"
    assert bench.here.take_events() == [Suspected("a"), Recovered("a")] * 3


def test_a_message_from_a_suspect_ends_suspicion() -> None:
    bench = Bench(*"abc")
    bench.round()
    bench.fail("a")
    reply = bench.tell("a")
    assert "you" not in reply
    assert bench.status("a") == "alive"


def test_a_suspect_is_told_and_its_refutation_counts_from_anybody() -> None:
    bench = Bench(*"abc")
    bench.round()
    bench.fail("a")
    [message] = [json.loads(message) for name, message in bench.round().gossip if name != "a"][:1]
    assert ["a", 5, 0, 1] in message["lives"]
    bench.tell("b", lives=[["a", 5, 1, 0]])
    assert bench.status("a") == "alive"
    assert bench.here.take_events() == [Suspected("a"), Recovered("a")]
    assert bench.here.members()["a"].incarnation == 1


def test_a_member_that_others_reach_is_alive_but_not_direct() -> None:
    bench = Bench(*"abcde")
    bench.round()
    bench.fail("a", True)
    assert not bench.here.members()["a"].direct
    assert bench.status("a") == "alive"
    assert bench.here.take_events() == [Suspected("a"), Recovered("a")]
    # From now on our own failure is nothing new.
    for _ in range(5):
        bench.round()
        bench.fail("a", True)
        assert bench.status("a") == "alive"
    assert bench.here.take_events() == []
    # Nobody asks through it.
    bench.round()
    assert "a" not in bench.fail("b", None)
    # Until the others don't reach it either, or don't say.
    bench.here.probe_result("b", True, bench.now)
    bench.fail("a", False)
    assert bench.status("a") == "suspect"
    bench.round()
    bench.fail("a", None)
    bench.round()
    bench.fail("a", None)
    assert bench.status("a") == "dead"


def test_reached_again_it_is_direct_again() -> None:
    bench = Bench(*"abcde")
    bench.round()
    bench.fail("a", True)
    bench.tell("a")  # it reaches us, which is another way
    assert not bench.here.members()["a"].direct
    bench.here.probe_result("a", True, bench.now)
    assert bench.here.members()["a"].direct


def test_a_death_that_one_hears_of_is_believed_when_ones_own_probe_fails() -> None:
    bench = Bench(*"abcde")
    for _ in range(4):
        bench.round()  # long enough ago that a was heard
    bench.tell("b", lives=[["a", 5, 0, 2]])
    assert bench.status("a") == "alive"
    assert bench.here.take_events() == []
    bench.round()
    bench.fail("a")
    assert bench.status("a") == "dead"
    assert bench.here.take_events() == [Died("a")]


def test_a_death_may_be_of_a_later_incarnation_than_the_one_we_know() -> None:
    bench = Bench(*"abcde")
    for _ in range(4):
        bench.round()
    bench.tell("b", lives=[["a", 5, 3, 2]])
    bench.round()
    bench.fail("a")
    assert (bench.status("a"), bench.here.members()["a"].incarnation) == ("dead", 3)


def test_one_who_is_called_dead_and_answers_is_told() -> None:
    bench = Bench("a", *(f"n{number}" for number in range(40)))
    for _ in range(4):
        bench.round()
    bench.tell("n1", lives=[["a", 5, 0, 2]])
    assert "a" in bench.round().probes
    bench.here.probe_result("a", True, bench.now)
    told = [json.loads(message) for name, message in bench.round().gossip if name == "a"]
    assert [one["you"] for one in told] == [[5, 0, 2]]
    # Once; and somebody who says so again, so soon after it answered, is told nothing else.
    assert not any("you" in json.loads(message) for _, message in bench.round().gossip)
    assert bench.here.take_events() == []


def test_one_who_answered_just_now_is_told_without_another_probe() -> None:
    bench = Bench(*"abcde")
    bench.round()
    bench.here.probe_result("a", True, bench.now)
    bench.tell("b", lives=[["a", 5, 0, 2]])
    work = bench.round()
    bench.fail("a")
    assert bench.status("a") == "suspect"
    messages = {name: json.loads(message) for name, message in work.gossip}
    assert messages["a"]["you"] == [5, 0, 2]
    assert not any("lives" in message for message in messages.values())


def test_many_deaths_at_once_are_checked_before_they_are_passed_on() -> None:
    names = [f"n{number}" for number in range(30)]
    bench = Bench(*names)
    for _ in range(4):
        bench.round()
    bench.tell("n0", lives=[[name, 5, 0, 2] for name in names[1:]])
    work = bench.round()
    assert set(names[1:]) <= set(work.probes)
    [first, *_] = [json.loads(message) for _, message in work.gossip]
    assert len(first["lives"]) == 8


def test_the_dead_come_back_by_their_own_word_only() -> None:
    bench = Bench(*"abc", options=Options(suspect_rounds=1))
    bench.round()
    bench.fail("a")
    bench.here.take_events()
    bench.tell("b", deltas=[["a", 5, 0, 0, 0, 9, [["k", 9, 2]]]])
    while bench.tell("b").get("lives"):
        pass  # until it isn't a rumour any more
    reply = bench.tell("b", bits=0, buckets=[0], digests=[["a", 5, 0, 9], ["b", 5, 0, 2]])
    assert ["a", 5, 0, 2] in reply["lives"]
    assert bench.status("a") == "dead"
    # Nor does it go to somebody who doesn't know it, as if it lived.
    assert "deltas" not in bench.tell("b", want=[["a", 5, 0]])
    assert "deltas" not in bench.tell(
        "b", bits=0, buckets=[0], digests=[["b", 5, 0, 2], ["c", 5, 0, 2], ["me", 1000, 0, 1]]
    )
    # It hears of it ...
    assert bench.tell("a")["you"] == [5, 0, 2]
    assert bench.status("a") == "dead"
    # ... and says otherwise.
    assert "you" not in bench.tell("a", (5, 1))
    assert bench.status("a") == "alive"
    assert bench.here.take_events() == [Recovered("a")]
    assert bench.here.members()["a"].state == {"k": b"2"}


def test_who_came_back_is_not_forgotten_with_its_tombstone() -> None:
    bench = Bench(*"abc", options=Options(suspect_rounds=1, tombstone_seconds=5))
    bench.round()
    bench.fail("a")
    bench.here.take_events()
    bench.tell("a", (5, 1))
    assert bench.here.take_events() == [Recovered("a")]
    for _ in range(10):
        bench.round()
    assert bench.status("a") == "alive"


def test_a_new_life_of_the_dead_comes_with_its_state() -> None:
    bench = Bench(*"abc", options=Options(suspect_rounds=1))
    bench.round()
    bench.fail("a")
    bench.tell("a", (6, 0))
    assert bench.status("a") == "dead"
    assert "a" in [name for name, _ in bench.round().gossip]
    bench.tell("a", (6, 0), deltas=[["a", 6, 0, 0, 0, 2, [["new", 2, 1]]]])
    assert bench.status("a") == "alive"
    assert bench.here.members()["a"].state == {"new": b"1"}
    assert bench.here.take_events()[-1] == Joined("a")


def test_a_dead_one_that_answers_a_probe_is_written_to() -> None:
    bench = Bench(*(f"n{number}" for number in range(30)), options=Options(suspect_rounds=1))
    bench.round()
    bench.fail("n0")
    assert bench.here.probe_result("n0", True, bench.now) == ()
    told = [json.loads(message) for name, message in bench.round().gossip if name == "n0"]
    assert [one["you"] for one in told] == [[5, 0, 2]]


@pytest.mark.parametrize("gap", [5.5, 1e9, -0.5, -1e9])
def test_who_slept_blames_nobody(gap: float) -> None:
    bench = Bench(*"abc", options=Options(tombstone_seconds=50))
    bench.round()
    bench.fail("a")
    for _ in range(2):
        bench.fail("c")
        bench.round()
    bench.fail("c")
    assert bench.status("c") == "dead"
    bench.tell("b")
    # Probes from before end badly, before and after the round that finds out.
    bench.now += gap
    assert bench.here.probe_result("b", False, bench.now) == ()
    bench.here.indirect_result("a", False, bench.now)
    bench.round(0)
    assert bench.here.probe_result("b", False, bench.now) == ()
    assert bench.status("a") == bench.status("b") == "alive"
    # The tombstone didn't age by more than a round.
    assert bench.status("c") == "dead"
    # What was heard before is old by now.
    bench.tell("a", lives=[["b", 5, 0, 2]])
    bench.round()
    bench.fail("b")
    assert bench.status("b") == "dead"


def test_everybody_is_probed_in_turn_and_those_in_use_each_round() -> None:
    names = [f"n{number}" for number in range(40)]
    bench = Bench(*names)
    bench.here.use(["n7", "n9", "stranger"])
    last = dict.fromkeys(names, 0)
    for number in range(1, 40):
        probes = bench.round().probes
        assert len(probes) <= 10
        assert {"n7", "n9"} <= set(probes)
        assert len(set(probes)) == len(probes)
        last.update(dict.fromkeys(probes, number))
        # Twice the length of a turn: the end of one and the beginning of the next.
        assert number - min(last.values()) <= 10


def test_a_small_mesh_is_probed_as_a_whole() -> None:
    bench = Bench(*"abcdefgh")
    assert sorted(bench.round().probes) == list("abcdefgh")


def test_results_about_strangers_and_about_oneself_are_nothing() -> None:
    bench = Bench("a")
    bench.round()
    for name in ("me", "nobody", "bad name"):
        for ok in (True, False):
            assert bench.here.probe_result(name, ok, bench.now) == ()
            bench.here.indirect_result(name, ok, bench.now)
    assert bench.here.take_events() == []
    assert sorted(bench.here.members()) == ["a", "me"]
