"""Whole meshes over real sockets: joining, dying, coming back, and what must not happen meanwhile."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest
import trio

from llamesh.net.exchange import UpstreamBroken
from tests.mesh.lives import INTERVAL, lives


async def test_who_knows_one_knows_all(tmp_path: Path) -> None:
    async with lives(tmp_path) as world:
        a = await world.start("a")
        b = await world.start("b", ["a"])
        c = await world.start("c", ["b"])
        d = await world.start("d", ["c"])
        await world.joined(a, b, c, d)
        assert await a.ask("d") == (200, b"hello")
        assert d.served == 1


async def test_a_restart_is_a_new_life(tmp_path: Path) -> None:
    async with lives(tmp_path) as world:
        a = await world.start("a")
        b = await world.start("b", ["a"])
        await world.joined(a, b)
        await b.kill()
        again = await world.start("b", ["a"])
        again.offers = {}
        await world.until(
            lambda: a.mesh.membership.members()["b"].epoch == again.mesh.epoch, "a knows the new life"
        )
        await world.until(
            lambda: a.sees("b") and not a.mesh.peers.has("b:default"), "nothing of the old life"
        )
        assert await a.ask("b") == (200, b"hello")


async def test_one_key_may_own_two_ids(tmp_path: Path) -> None:
    private = secrets.token_bytes(32)
    async with lives(tmp_path) as world:
        a = await world.start("a", private=private)
        b = await world.start("b", ["a"], private=private)
        await world.joined(a, b)


async def test_nobody_takes_the_id_of_another(tmp_path: Path) -> None:
    async with lives(tmp_path) as world:
        a = await world.start("a")
        b = await world.start("b", ["a"])
        await world.joined(a, b)
        thief = await world.start("b", ["a"], place="elsewhere", private=secrets.token_bytes(32))
        await world.until(lambda: bool(thief.mesh.seeker.problems()), "the thief is refused")
        assert "has another key than a knows for that id" in thief.mesh.seeker.problems()[0]
        assert not thief.sees()
        await world.rounds(a, 5)
        await world.joined(a, b)
        # However often it knocks, from whatever port: that is one line a minute.
        await world.until(lambda: a.mesh.greeting.outcomes["untrusted"] >= 3, "it knocks again")
        assert len(world.said("a node wasn't let in")) == 1


async def test_a_wrong_token_is_said_on_both_sides_and_the_rest_goes_on(tmp_path: Path) -> None:
    async with lives(tmp_path) as world:
        a = await world.start("a")
        b = await world.start("b", ["a"])
        stranger = await world.start("c", ["a"], token=b"x" * 32)
        await world.until(lambda: bool(stranger.mesh.seeker.problems()), "it hears why")
        assert "the cluster tokens differ" in stranger.mesh.seeker.problems()[0]
        assert "llamesh token" in stranger.mesh.seeker.problems()[0]
        await world.until(lambda: bool(world.said("a handshake failed")), "a says so")
        assert "token" in world.said("a handshake failed")[0]["problem"]
        await world.joined(a, b)
        assert not stranger.sees()
        assert a.mesh.greeting.outcomes["token"] >= 1
        assert stranger.mesh.dialler.outcomes["token"] >= 1
        assert "c" not in a.known.pins()


async def test_leaving_is_heard_at_once(tmp_path: Path) -> None:
    async with lives(tmp_path) as world:
        # A long interval: nothing but the goodbye can tell.
        a = await world.start("a", interval=1.0)
        b = await world.start("b", ["a"], interval=1.0)
        c = await world.start("c", ["a"], interval=1.0)
        await world.joined(a, b, c)
        await b.leave()
        assert (a.status("b"), c.status("b")) == ("left", "left")
        assert not a.mesh.peers.has("b:default")
        assert len(a.mesh.seeker) == 0  # nobody looks for it


async def test_a_killed_node_is_missed_within_three_intervals(tmp_path: Path) -> None:
    interval = 0.6  # probes are given half of it
    async with lives(tmp_path) as world:
        a = await world.start("a", interval=interval)
        b = await world.start("b", ["a"], interval=interval)
        c = await world.start("c", ["b"], interval=interval)
        await world.joined(a, b, c)
        begun = {life.id: life.mesh.gossip for life in (a, c)}
        counts = dict.fromkeys(begun, 0)
        for name, gossip in begun.items():
            after = gossip.end_round

            def count_one(name: str = name, after=after) -> None:  # type: ignore[no-untyped-def]
                counts[name] += 1
                after()

            gossip.end_round = count_one
        b.tap.down()
        await b.kill()
        await world.until(lambda: a.status("b") == "dead" and c.status("b") == "dead", "both miss it")
        assert max(counts.values()) <= 4, counts
        assert not a.mesh.peers.has("b:default")
        # And it comes back by itself, without being configured anywhere.
        b.tap.up()
        again = await world.start("b")
        await world.joined(a, again, c)


async def test_a_frozen_path_ends_what_waits_and_thaws(tmp_path: Path) -> None:
    async with lives(tmp_path) as world:
        a = await world.start("a")
        b = await world.start("b", ["a"])
        await world.joined(a, b)
        for tap in (a.tap, b.tap):
            tap.stall()
        answers: list[object] = []

        async def ask() -> None:
            try:
                answers.append(await a.ask("b"))
            except UpstreamBroken as error:
                answers.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await world.until(
                lambda: a.status("b") == "dead" and b.status("a") == "dead", "both miss the other"
            )
            await world.until(lambda: bool(answers), "who waits is told")
        assert isinstance(answers[0], UpstreamBroken)
        for tap in (a.tap, b.tap):
            tap.resume()
        await world.joined(a, b)
        assert await a.ask("b") == (200, b"hello")


async def test_halves_of_a_cut_mesh_find_each_other_again(tmp_path: Path) -> None:
    async with lives(tmp_path) as world:
        # Only b was ever told of a; what brings them together again is what each remembers.
        a = await world.start("a")
        b = await world.start("b", ["a"])
        await world.joined(a, b)
        b.mesh.set_static([])
        for tap in (a.tap, b.tap):
            tap.down()
        await world.until(lambda: a.status("b") == "dead" and b.status("a") == "dead", "both miss the other")
        for tap in (a.tap, b.tap):
            tap.up()
        await world.joined(a, b)
        await world.until(lambda: len(a.mesh.seeker) == len(b.mesh.seeker) == 0, "nobody is sought any more")


async def test_in_the_steady_state_there_are_no_handshakes(tmp_path: Path) -> None:
    async with lives(tmp_path) as world:
        group = [await world.start(name, ["a"] * (name != "a")) for name in "abc"]
        await world.joined(*group)
        await world.rounds(group[0], 10)
        before = [life.mesh.dialler.handshakes for life in group]
        await world.rounds(group[0], 40)
        assert [life.mesh.dialler.handshakes for life in group] == before
        assert all(life.mesh.dialler.failures == 0 for life in group)


async def test_nothing_is_left_open_at_the_end(tmp_path: Path) -> None:
    async with lives(tmp_path) as world:
        a = await world.start("a")
        b = await world.start("b", ["a"])
        await world.joined(a, b)
        links = [stream for peer in a.mesh.peers for stream in peer.links._streams.values()]
        assert links
        await a.kill()
        await b.kill()
        assert all(stream.closed for stream in links)
        await world.until(lambda: not a.tap.alive and not b.tap.alive, "no connection is left")


@pytest.mark.parametrize("what", ["entries", "news", "on_change"])
async def test_a_defect_around_it_does_not_end_the_mesh(tmp_path: Path, what: str) -> None:
    async with lives(tmp_path) as world:
        a = await world.start("a")
        b = await world.start("b", ["a"])
        await world.joined(a, b)

        def fail(*_: object) -> None:
            raise RuntimeError("a defect")

        if what == "on_change":
            a.mesh.peers.on_change = fail
        else:
            setattr(a.mesh, what, fail)
        await world.until(lambda: bool(world.said("defect")), "it is logged")
        await world.rounds(b, 10)
        assert b.status("a") == "alive"
        assert a.status("b") == "alive"
        assert await b.ask("a") == (200, b"hello")
        assert b.mesh.peers.has("a:default")
        if what == "news":
            assert "defect" in b.mesh.peers.of("a").news.closed
        c = await world.start("c", ["a"])
        await world.until(lambda: c.sees("a", "b"), "others join all the same")
        # Said once, not each round.
        assert len(world.said("defect")) <= 3
        world.forgive()


async def test_who_is_drained_says_so(tmp_path: Path) -> None:
    async with lives(tmp_path) as world:
        a = await world.start("a")
        b = await world.start("b", ["a"])
        await world.joined(a, b)
        assert [one.node for one in a.mesh.peers.outlooks("b:default", ())] == ["b"]
        b.closed = "is draining"
        await world.until(lambda: not a.mesh.peers.outlooks("b:default", ()), "nobody sends it anything")
        assert "draining" in a.mesh.peers.explain("b:default")
        assert a.mesh.peers.has("b:default")  # listed all the same
        b.closed = ""
        await world.until(lambda: bool(a.mesh.peers.outlooks("b:default", ())), "it is asked again")


async def test_links_older_than_a_session_may_be_are_not_used_again(tmp_path: Path) -> None:
    async with lives(tmp_path) as world:
        noise = {"session_ttl_seconds": 3 * INTERVAL}
        a = await world.start("a", noise=noise)
        b = await world.start("b", ["a"], noise=noise)
        await world.joined(a, b)
        for _ in range(3):
            before = a.mesh.dialler.handshakes
            await world.until(lambda: a.mesh.dialler.handshakes > before, "a new session")  # noqa: B023
        assert a.status("b") == b.status("a") == "alive"
        for peer in a.mesh.peers:
            assert len(peer.links) <= 4


async def test_pins_are_written_down(tmp_path: Path) -> None:
    async with lives(tmp_path) as world:
        a = await world.start("a")
        b = await world.start("b", ["a"])
        await world.joined(a, b)
        path = tmp_path / "a.known_peers"
        await world.until(
            lambda: path.exists() and b.mesh.identity.public_text in path.read_text(), "b is known"
        )


async def test_pins_that_cannot_be_written_are_a_warning(tmp_path: Path) -> None:
    async with lives(tmp_path) as world:
        (tmp_path / "a.known_peers.lock").mkdir()
        a = await world.start("a")
        b = await world.start("b", ["a"])
        await world.joined(a, b)
        await world.until(lambda: bool(world.said("who was met can't be written down")), "it is said")
