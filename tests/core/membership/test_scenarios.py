"""What happens to whole meshes, told in the language of `scenario`."""

from __future__ import annotations

import pytest

from llamesh.core.membership import Contested, Died, Options
from tests.core.membership.scenario import play
from tests.core.membership.world import World

FIVE = """
    start a b c d e
    a sets models=["m1"]
    e sets models=["m2"]
    settle
    forget
"""


@pytest.mark.parametrize("seed", range(5))
def test_five_nodes_find_each_other_and_tell_what_they_have(seed: int) -> None:
    play(
        """
        start a b c d e
        a sets models=["m1"]
        settle 6
        all see all alive
        all see a.models=["m1"]
        a sets models=["m1", "m2"]
        a sets tps={"m1": 3.5}
        settle 6
        all see a.models=["m1", "m2"]
        all see a.tps={"m1": 3.5}
        a deletes tps
        settle 6
        all see a.tps=nothing
        """,
        seed=seed,
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_dead_are_gone_within_three_intervals(seed: int) -> None:
    world = play(FIVE, seed=seed)
    for how in (world.crash, world.freeze):
        victim = "b" if how == world.crash else "c"
        how(victim)
        world.run(3)
        for here in world.up:
            member = here.membership.members()[victim]
            assert (member.status, dict(member.state)) == ("dead", {})
            assert Died(victim) in world.events(here.id)
    play("settle 2\n all see d e alive\n all never heard Died d\n all never heard Suspected e", world=world)


@pytest.mark.parametrize("seed", range(5))
def test_a_crashed_node_comes_back_in_a_new_life(seed: int) -> None:
    play(
        FIVE
        + """
        crash e
        run 4
        a b c d see e dead
        restart e
        settle
        all see all alive
        all see e.models=nothing       # the new life has said nothing yet
        a b c d heard Joined e
        a b c d never heard Recovered e
        """,
        seed=seed,
    )


def test_a_restart_that_nobody_noticed_replaces_the_state_as_a_whole() -> None:
    play(
        FIVE
        + """
        restart e
        e sets other=1
        settle
        all see e.models=nothing
        all see e.other=1
        a b c d heard Restarted e
        a b c d never heard Died e
        """
    )


@pytest.mark.parametrize("seed", range(3))
def test_a_frozen_node_dies_and_returns_with_its_state(seed: int) -> None:
    play(
        FIVE
        + """
        freeze e
        run 20
        a b c d see e dead
        thaw e
        settle 5
        all see all alive
        all see e.models=["m2"]
        a b c d heard Recovered e
        e never heard Died a           # it slept; nobody can be blamed for that
        """,
        seed=seed,
    )


@pytest.mark.parametrize("seed", range(5))
def test_halves_of_a_mesh_bury_each_other_and_come_together_again(seed: int) -> None:
    play(
        FIVE
        + """
        cut a b | c d e
        settle a b
        settle c d e
        a b see c d e dead
        c d e see a b dead
        a sets models=["m3"]
        e deletes models
        run 10
        forget
        heal
        settle 10
        all see all alive
        all see a.models=["m3"]
        all see e.models=nothing
        a never heard Died b           # each side was called dead by the other
        c never heard Died d
        d never heard Died e
        """,
        seed=seed,
    )


@pytest.mark.parametrize("seed", range(5))
def test_one_that_was_cut_off_does_not_bury_the_others_in_everybody_s_eyes(seed: int) -> None:
    play(
        """
        start a b c d e f g h i j k l
        settle
        cut a | b c d e f g h i j k l
        run 15
        b sees a dead
        a sees b c d e f g h i j k l dead
        forget
        heal
        settle 12
        all see all alive
        b never heard Died c d e f g h i j k l
        f never heard Died b c d e g h i j k l
        l never heard Died b c d e f g h i j k
        l never heard Suspected b c d e f g h i j k
        """,
        seed=seed,
    )


@pytest.mark.parametrize("seed", range(5))
def test_no_way_from_here_is_not_death(seed: int) -> None:
    """a's calls to b are lost, but c reaches both."""
    world = play(
        """
        start a b c
        settle
        a can't reach b
        run 6
        a doesn't reach b
        """,
        seed=seed,
    )
    play("forget\n run 20\n a sees b alive\n a never heard Died b\n a never heard Suspected b", world=world)
    play("b sets x=1\n settle\n a sees b.x=1\n heal\n run 3\n a reaches b\n settle", world=world)


def test_of_those_that_only_others_reach_a_death_is_noticed_too() -> None:
    play(
        """
        start a b c d
        settle
        a can't reach b
        run 6
        a doesn't reach b
        crash b
        run 5
        all see b dead
        """
    )


def test_two_that_cannot_reach_each_other_live_through_the_third() -> None:
    play(
        """
        start c a b
        settle
        a can't reach b
        b can't reach a
        run 6
        forget
        run 20
        a doesn't reach b
        b doesn't reach a
        all never heard Died a b c
        a sets x=2
        settle
        b sees a.x=2
        """
    )


def test_leaving_is_known_at_once_and_is_no_death() -> None:
    play(
        FIVE
        + """
        e leaves
        run 0.1
        a b c d see e left
        run 10
        a b c d heard Left e
        a b c d never heard Died e
        a b c d never heard Suspected e
        settle
        restart e
        settle
        a b c d see e alive
        a b c d heard Joined e
        """
    )


@pytest.mark.parametrize("seed", range(5))
def test_who_heard_of_a_leaving_by_hearsay_only_believes_it(seed: int) -> None:
    play(
        FIVE
        + """
        cut d | e
        e leaves
        run 3
        a b c d see e left
        d never heard Died e
        """,
        seed=seed,
    )


@pytest.mark.parametrize("seed", range(8))
def test_the_dead_stay_dead_when_somebody_stale_returns(seed: int) -> None:
    """d sleeps through the death of e and still lists it as alive when it wakes."""
    play(
        FIVE
        + """
        freeze d
        crash e
        run 8
        a b c see d e dead
        forget
        thaw d
        settle 8
        all see e dead
        a b c never heard Recovered e
        a b c never heard Joined e
        run 10
        all see e dead
        a b c never heard Recovered e
        """,
        seed=seed,
    )


def test_a_tombstone_is_forgotten_after_its_time() -> None:
    play(
        """
        start a b c
        settle
        crash c
        run 10
        a b see c dead
        run 25
        a b see c unknown
        restart c
        settle
        all see all alive
        """,
        options=Options(tombstone_seconds=30),
    )


@pytest.mark.parametrize("seed", range(3))
def test_a_rolling_restart_ends_with_everybody_in_a_new_life(seed: int) -> None:
    world = play(FIVE, seed=seed)
    epochs = {one: world.nodes[one].membership.members()[one].epoch for one in "abcde"}
    for one in "abcde":
        play(f"{one} leaves\n run 2\n restart {one}\n {one} sets again=1\n settle 8", world=world)
    play("all see all alive\n all see a.again=1\n all see a.models=nothing", world=world)
    assert all(world.nodes[one].membership.members()[one].epoch > epochs[one] for one in "abcde")


def test_a_clock_that_jumped_back_before_a_restart_is_outdone() -> None:
    world = play(FIVE + "restart e at 1000\n e sets models=[]\n settle\n all see e.models=[]")
    assert world.nodes["e"].membership.members()["e"].epoch > world.wall
    assert any(isinstance(event, Contested) for event in world.events("e"))


@pytest.mark.parametrize("jump", ["-100000", "+100000", "-3", "+7"])
@pytest.mark.parametrize("seed", range(2))
def test_a_clock_that_is_set_kills_nobody(jump: str, seed: int) -> None:
    play(
        FIVE
        + f"""
        clock a {jump}
        run 10
        all see all alive
        all never heard Died all
        crash e
        run 4
        all see e dead
        """,
        seed=seed,
        options=Options(tombstone_seconds=100),
    )


@pytest.mark.parametrize(
    "weather", ["loss 0.2", "double 0.5", "delay 0.01 1.5", "loss 0.1 double 0.3 delay 0 1"]
)
@pytest.mark.parametrize("seed", range(3))
def test_bad_weather_delays_the_truth_and_does_not_change_it(weather: str, seed: int) -> None:
    play(
        f"""
        start a b c d e f
        weather {weather}
        a sets x=1
        run 5
        a sets x=2
        b sets y=[1, 2]
        crash f
        run 10
        restart f
        f sets z=null
        run 5
        b deletes y
        calm
        run 3
        settle
        all see all alive
        all see a.x=2
        all see b.y=nothing
        all see f.z=null
        """,
        seed=seed,
    )


def test_much_news_at_once_comes_in_pieces_within_the_budget() -> None:
    world = World(options=Options(message_budget=8192))
    play("start a b c d\n settle", world=world)
    sizes: list[int] = []
    deliver = world._call

    def measured(node, peer, message, replied):  # type: ignore[no-untyped-def]
        sizes.append(len(message))
        deliver(node, peer, message, lambda reply: (sizes.append(len(reply)), replied(reply))[1])

    world._call = measured  # type: ignore[method-assign]
    for number in range(200):
        world.nodes["a"].membership.set(f"profile-{number}", b'"' + b"x" * 500 + b'"')
    play("settle 5\n b c d see a alive", world=world)
    assert max(sizes) <= 8192
    assert len(world.nodes["d"].membership.members()["a"].state) == 200


def test_two_hundred_profiles_everywhere_changed_at_once() -> None:
    world = play("start " + " ".join(f"n{number}" for number in range(12)) + "\n settle")
    for node in world.up:
        for number in range(200):
            node.membership.set(f"p{number}", b'{"ctx": 8192, "tps": 31.5, "name": "%d"}' % number)
    play("settle 8", world=world)


def test_a_node_alone_waits_for_nobody() -> None:
    world = play("start a\n run 5\n a sets x=1\n run 5")
    assert world.sent == {}


def test_two_nodes_with_one_id_say_so() -> None:
    """A copied machine: both contest, and the mesh goes on."""
    world = play(FIVE)
    other = World(seed=7, wall=world.wall + 5000)
    twin = other.start("e").membership
    [(_, message)] = (twin.introduce("a"), twin.start_round(0.0))[1].gossip
    world.nodes["a"].membership.answer("e", message, world.now)
    reply = world.nodes["a"].membership.answer("e", message, world.now)
    following = twin.take_reply("a", reply, 0.0)
    while following is not None:
        following = twin.take_reply("a", world.nodes["a"].membership.answer("e", following, world.now), 0.0)
    play("settle 5\n all see all alive", world=world)
    assert any(isinstance(event, Contested) for event in world.events("e"))
