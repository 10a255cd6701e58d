"""One membership: what it says, what it believes of itself, and its limits."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from llamesh.core.membership import (
    Contested,
    Joined,
    Left,
    Membership,
    Options,
    Restarted,
    Updated,
)
from llamesh.core.membership.messages import MAX_EPOCH, MAX_INCARNATION
from llamesh.core.membership.records import Life, Rank
from llamesh.core.membership.rumours import Rumours


def member(name: str = "me", epoch: int = 1000, **options: Any) -> Membership:
    return Membership(name, epoch, Options(**options), random.Random(1))


def tell(
    here: Membership, sender: str = "b", life: tuple[int, ...] = (5, 0), **sections: Any
) -> dict[str, Any]:
    message = {"v": 1, "me": [*life, *([2] if len(life) == 2 else [])], **sections}
    reply: dict[str, Any] = json.loads(here.answer(sender, json.dumps(message).encode(), 0.0))
    return reply


def exchange(one: Membership, other: Membership) -> int:
    """One whole exchange, begun by `one`. Returns the number of messages."""
    one.introduce(other.me)
    [message] = [message for peer, message in one.start_round(0.0).gossip if peer == other.me]
    count, following = 0, message
    while following is not None:
        reply = other.answer(one.me, following, 0.0)
        following = one.take_reply(other.me, reply, 0.0)
        count += 2
    return count


def test_one_exchange_makes_two_equal() -> None:
    one, other = member("a"), member("b")
    one.set("x", b"1")
    other.set("y", b' {"z": [1]} ')
    exchange(one, other)
    assert one.root == other.root
    assert one.members()["b"].state == {"y": b'{"z": [1]}'}
    assert other.members()["a"].state == {"x": b"1"}
    assert one.take_events() == [Joined("b")]
    assert one.take_events() == []
    other.set("y", None)
    other.set("w", b"2")
    assert exchange(one, other) <= 4
    assert one.take_events() == [Updated("b", ("w", "y"))]
    assert exchange(one, other) == 2


def test_a_snapshot_of_members_does_not_change() -> None:
    one, other = member("a"), member("b")
    other.set("y", b"1")
    exchange(one, other)
    before = one.members()
    assert one.members() is before
    other.set("y", b"2")
    exchange(one, other)
    assert before["b"].state == {"y": b"1"}
    assert one.members()["b"].state == {"y": b"2"}
    with pytest.raises(TypeError):
        before["b"].state["y"] = b"3"  # type: ignore[index]


def test_the_same_value_again_is_no_news() -> None:
    here = member()
    here.set("x", b"1")
    root = here.root
    here.set("x", b"1")
    here.set("x", b" 1\n")
    here.set("nothing", None)
    assert here.root == root
    here.set("x", b"2")
    assert here.root != root


@pytest.mark.parametrize(
    ("said", "now"),
    [
        ((1000, 0, 1), (1000, 1)),
        ((1000, 0, 2), (1000, 1)),
        ((1000, 0, 3), (1000, 1)),
        ((1000, 7, 0), (1000, 8)),
        ((1000, 7, 2), (1000, 8)),
        ((1000, MAX_INCARNATION, 2), (1001, 0)),
        ((1001, 0, 0), (1002, 0)),
        ((5000, 3, 2), (5001, 0)),
        ((999, 9, 3), (1000, 0)),
        ((1000, 0, 0), (1000, 0)),
        ((MAX_EPOCH, 0, 0), (1000, 0)),
    ],
)
def test_what_others_say_of_us_is_outdone(said: tuple[int, int, int], now: tuple[int, int]) -> None:
    for way in ("you", "lives", "digests"):
        here = member()
        here.set("x", b"1")
        epoch, incarnation, rank = said
        reply = tell(
            here,
            **{
                "you": {"you": list(said)},
                "lives": {"lives": [["me", *said]]},
                "digests": {"buckets": [0], "digests": [["me", epoch, incarnation, 1, rank]]},
            }[way],
        )
        assert tuple(reply["me"][:2]) == now, way
        assert here.members()["me"].status == "alive"
        assert here.members()["me"].state == {"x": b"1"}
        # Everybody hears of it, not only the one who spoke.
        [message] = [json.loads(one) for _, one in here.start_round(0.0).gossip]
        told = [one for one in message.get("lives", []) if one[0] == "me"]
        assert bool(told) is (now[1] > 0)
        contested = [event for event in here.take_events() if isinstance(event, Contested)]
        assert contested == ([Contested("me", epoch)] if now[0] > 1000 else [])


def test_entries_of_ours_above_our_version_are_not_adopted_but_outdone() -> None:
    here = member()
    here.set("x", b"1")
    reply = tell(here, deltas=[["me", 1000, 0, 0, 0, 9, [["x", 9, 666]]]])
    assert reply["me"][0] == 1001
    assert here.members()["me"].state == {"x": b"1"}
    assert here.take_events() == [Contested("me", 1000)]


def test_a_refutation_is_said_at_once_within_the_exchange() -> None:
    one, other = member("a"), member("b", suspect_rounds=1)
    exchange(one, other)
    other.start_round(1.0)
    other.probe_result("a", False, 1.0)
    assert other.members()["a"].status == "dead"
    exchange(one, other)
    assert other.members()["a"].status == "alive"
    assert other.members()["a"].incarnation == 1
    assert one.root == other.root


def test_who_refutes_has_a_message_more_even_when_nothing_else_differs() -> None:
    one, other = member("a"), member("b")
    exchange(one, other)
    tell(other, "c", lives=[["a", 1000, 0, 2]])
    assert exchange(one, other) == 4
    assert other.members()["a"].incarnation == 1
    assert one.root == other.root


def test_who_knows_an_earlier_life_gets_the_present_one_from_the_beginning() -> None:
    here = member()
    here.set("x", b"1")
    here.set("y", b"2")
    for want, keys in (([900, 9], ["x", "y"]), ([1000, 2], ["y"]), ([1000, 0], ["x", "y"])):
        [delta] = tell(here, want=[["me", *want]])["deltas"]
        assert [write[0] for write in delta[6]] == keys
    assert "deltas" not in tell(here, want=[["me", 1001, 0]])


def test_what_is_known_already_changes_nothing() -> None:
    here = member()
    news: dict[str, Any] = {"deltas": [["b", 5, 0, 0, 0, 3, [["k", 2, 1]], [["l", 3]]]]}
    tell(here, **news)
    before = here.members()
    here.take_events()
    tell(here, **news)
    assert here.members() is before
    assert here.take_events() == []


def test_leaving() -> None:
    one, other, third = member("a"), member("b"), member("c")
    for here in (other, third):
        exchange(one, here)
        exchange(other, here) if here is third else None
    other.take_events()
    message = one.leave(5.0)
    assert one.left
    assert one.start_round(6.0).gossip == one.start_round(6.0).probes == ()
    reply = other.answer("a", message, 5.0)
    assert one.take_reply("b", reply, 5.0) is None
    assert other.members()["a"].status == "left"
    assert other.members()["a"].state == {}
    assert other.take_events() == [Left("a")]
    exchange(other, third)
    assert third.members()["a"].status == "left"
    # Who still asks is told, and nobody talks it back into life.
    tell(one, "c", (1000, 0), you=[1000, 0, 2])
    assert tell(one, "c", (1000, 0))["me"] == [1000, 0, 1, 3]


def test_many_deleted_keys_are_forgotten_in_a_new_epoch() -> None:
    one, other = member("a", max_deleted=3), member("b")
    one.set("stays", b"1")
    for number in range(4):
        one.set(f"k{number}", b"1")
    exchange(one, other)
    other.take_events()
    for number in range(4):
        one.set(f"k{number}", None)
    assert one.members()["a"].epoch == 1001
    exchange(one, other)
    assert other.members()["a"].state == {"stays": b"1"}
    assert other.take_events() == [Restarted("a")]
    assert one.root == other.root


def test_the_limits_of_what_a_node_may_say() -> None:
    here = member(max_keys=3, max_state=1000)
    for number in range(3):
        here.set(f"k{number}", b"1")
    with pytest.raises(ValueError, match="no room for 'more': a node has at most 3 keys"):
        here.set("more", b"1")
    here.set("k0", None)
    here.set("more", b"1")  # deleted keys make room when it is needed
    assert sorted(here.members()["me"].state) == ["k1", "k2", "more"]
    with pytest.raises(ValueError, match="a node's state has at most 1000 bytes"):
        here.set("k1", b'"' + b"x" * 1000 + b'"')
    assert here.members()["me"].state["k1"] == b"1"


def test_the_limits_of_what_others_may_say() -> None:
    here = member(max_keys=3, max_state=1000)
    tell(here, deltas=[["b", 5, 0, 0, 0, 9, [[f"k{number}", number + 2, 1] for number in range(4)]]])
    assert "b" not in here.members()
    tell(here, deltas=[["b", 5, 0, 0, 0, 2, [["k", 2, "x" * 990]]]])
    tell(here, deltas=[["b", 5, 0, 0, 2, 3, [["l", 3, "x" * 990]]]])
    assert sorted(here.members()["b"].state) == ["k"]
    assert here.counters["refused.state"] == 2


def test_more_members_than_there_is_room_for() -> None:
    here = member(max_members=4, suspect_rounds=1)
    for number in range(6):
        tell(here, f"n{number}", deltas=[[f"n{number}", 5, 0, 0, 0, 2, []]])
    assert sorted(here.members()) == ["me", "n0", "n1", "n2"]
    assert here.counters["refused.members"] == 3
    # The dead make room.
    here.start_round(1.0)
    here.probe_result("n1", False, 1.0)
    tell(here, "n5", deltas=[["n5", 5, 0, 0, 0, 2, []]])
    assert sorted(here.members()) == ["me", "n0", "n2", "n5"]


def test_more_tombstones_than_there_is_room_for() -> None:
    here = member(max_tombstones=2)
    for number in range(4):
        tell(here, f"n{number}", deltas=[[f"n{number}", 5, 0, 0, 0, 2, []]])
        tell(here, f"n{number}", (5, 0, 2, 3))
    assert sorted(here.members()) == ["me", "n2", "n3"]


def test_the_deaths_of_strangers_are_nobody_s_news() -> None:
    here = member()
    reply = tell(here, lives=[["x", 5, 0, 2]], buckets=[0], digests=[["y", 5, 0, 2, 3]])
    assert sorted(here.members()) == ["me"]
    assert "want" not in reply


def test_events_that_nobody_takes_have_an_end() -> None:
    here = member(max_events=10)
    for version in range(2, 32):
        tell(here, deltas=[["b", 5, 0, 0, 0, version, [["k", version, version]]]])
    assert len(here.take_events()) == 10
    assert here.counters["events_lost"] == 20


def test_who_was_introduced_is_written_to_for_a_while() -> None:
    here = member()
    here.introduce("me")
    here.introduce("b")
    rounds = [[peer for peer, _ in here.start_round(float(now)).gossip] for now in range(15)]
    assert rounds == [["b"]] * 10 + [[]] * 5


def test_an_exchange_that_never_agrees_ends_all_the_same() -> None:
    one, other = member("a", max_steps=6, message_budget=4096), member("b", max_members=2)
    for number in range(300):
        tell(one, f"n{number}", deltas=[[f"n{number}", 5, 0, 0, 0, 2, [["k", 2, "x" * 300]]]])
    assert exchange(one, other) <= 8


def test_many_members_come_over_in_one_exchange_within_the_budget() -> None:
    one, other = (member(name, message_budget=8192, max_steps=1000) for name in "ab")
    for number in range(300):
        name = f"node-{number}-{'x' * (number % 50)}"
        writes = [[f"k{key}", key + 2, "y" * (number * key % 97)] for key in range(number % 9)]
        tell(one, name, deltas=[[name, 5, 0, 0, 0, 20, writes]])
    sizes = []
    other.introduce("a")
    [(_, following)] = other.start_round(0.0).gossip
    message: bytes | None = following
    while message is not None:
        reply = one.answer("b", message, 0.0)
        sizes += [len(message), len(reply)]
        message = other.take_reply("a", reply, 0.0)
    assert len(other.members()) == 302
    assert one.root == other.root
    assert max(sizes) <= 8192
    assert {name: m.state for name, m in one.members().items()} == {
        name: m.state for name, m in other.members().items()
    }


def test_an_entry_larger_than_the_budget_goes_alone() -> None:
    one, other = member("a", message_budget=4096), member("b")
    one.set("small", b"1")
    one.set("large", b'"' + b"x" * 60_000 + b'"')
    one.set("other", b"2")
    exchange(one, other)
    exchange(one, other)
    assert other.members()["a"].state == one.members()["a"].state


def test_the_counters_know_what_was_written() -> None:
    one, other = member("a"), member("b")
    exchange(one, other)
    sent = {key.removeprefix("out."): value for key, value in one.counters.items() if key.startswith("out.")}
    got = {key.removeprefix("in."): value for key, value in other.counters.items() if key.startswith("in.")}
    assert sent == got
    assert {"root.messages", "root.bytes", "deltas.bytes"} <= set(sent)


def test_equal_meshes_say_so_in_two_small_messages() -> None:
    one, other = member("a"), member("b")
    for number in range(200):
        one.set(f"k{number}", b"1")
        for here in (one, other):
            tell(here, f"n{number}", deltas=[[f"n{number}", 5, 0, 0, 0, 2, []]])
    while one.root != other.root:
        exchange(one, other)
    before = sum(value for key, value in one.counters.items() if key.endswith("bytes"))
    one.introduce("b")
    [message, *_] = [message for _, message in one.start_round(1.0).gossip]
    reply = other.answer("a", message, 1.0)
    assert one.take_reply("b", reply, 1.0) is None
    assert len(message) + len(reply) < 200
    assert before > 0


def test_repr_says_what_a_test_wants_to_know() -> None:
    here = member()
    tell(here, deltas=[["b", 5, 0, 0, 0, 2, []]])
    assert repr(here) == f"<me 1000.0 v1 {here.root[:6]}: b alive 5.0 v2>"


@pytest.mark.parametrize(
    "wrong",
    [
        {"interval": 0},
        {"tombstone_seconds": -1},
        {"suspect_rounds": 0},
        {"message_budget": 100},
        {"message_budget": 1 << 20},
        {"max_steps": 3},
    ],
)
def test_options_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Options(**wrong)


def test_a_rumour_is_told_about_three_log_n_times_and_the_freshest_goes_first() -> None:
    rumours = Rumours(limit=4)
    assert rumours.add("a", Life(1, 0, Rank.DEAD))
    assert not rumours.add("a", Life(1, 0, Rank.ALIVE))
    assert rumours.take(2, 15) == [("a", Life(1, 0, Rank.DEAD))]
    assert rumours.add("b", Life(1, 0, Rank.LEFT))
    assert rumours.take(1, 15) == [("b", Life(1, 0, Rank.LEFT))]
    assert sum(len(rumours.take(2, 15)) for _ in range(50)) == 22
    assert len(rumours) == 0
    for number in range(9):
        rumours.add(str(number), Life(1, 0, Rank.DEAD))
    assert len(rumours) == 4
