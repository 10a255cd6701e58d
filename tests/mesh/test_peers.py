"""What a node knows of the others: who has what, who may be asked, by which way, what a forward counts."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from llamesh.config.cookbook import Elsewhere
from llamesh.config.sections import CircuitBreaker
from llamesh.core.breaker import State
from llamesh.core.offers import IDLE, NODE_KEY, News, NodeEntry, Offer, Situation, encode
from llamesh.mesh.peer import Peer
from llamesh.mesh.peers import Peers
from llamesh.net.exchange import UpstreamBroken
from tests.mesh.noise_pairs import open_pair

KEY = "m:default"


class Mesh:
    """Peers with a count of the calls that they make."""

    def __init__(self, breaker: CircuitBreaker | None = None) -> None:
        self.changes = 0
        self.woken: list[str] = []
        self.options = breaker or CircuitBreaker()
        self.peers = Peers(lambda node: Peer(node, self.dial, self.options, 3600), self.wake)
        self.peers.on_change = self.changed

    def changed(self) -> None:
        self.changes += 1

    async def dial(self, peer: Peer) -> object:
        raise ConnectionRefusedError(f"{peer.node} isn't there")

    async def wake(self, peer: Peer) -> None:
        self.woken.append(peer.node)
        await trio.lowlevel.checkpoint()
        raise UpstreamBroken("it sleeps on", started=False)

    def peer(self, node: str, *offers: Offer, cut: tuple[str, ...] = (), **news: object) -> Peer:
        state = {f"p:{offer.key}": encode(offer) for offer in offers}
        self.peers.update(node, {NODE_KEY: encode(NodeEntry(cut=cut)), **state})
        self.peers.set_alive(node, alive=True)
        peer = self.peers.of(node)
        peer.note_news(News(**news))  # type: ignore[arg-type]
        return peer

    def candidates(self, key: str = KEY, **more: object) -> list[str]:
        return [one.node for one in self.peers.outlooks(key, more.pop("excluded", ()), **more)]  # type: ignore[arg-type]


@pytest.fixture
def mesh() -> Mesh:
    return Mesh()


async def test_names(mesh: Mesh) -> None:
    mesh.peer("b", Offer("Qwen", "default", aliases=("Best",)), Offer("Qwen", "Fast", aliases=("Best",)))
    for name in ("qwen", "QWEN:default", "best", "Best:DEFAULT"):
        found = mesh.peers.find(name)
        assert found is not None
        assert (found.key, found.source) == ("Qwen:default", Elsewhere())
    fast = mesh.peers.find("best:fast")
    assert fast is not None
    assert fast.key == "Qwen:Fast"
    assert mesh.peers.find("fast") is None
    assert mesh.peers.has("QWEN:FAST")
    assert not mesh.peers.has("best:fast")  # that is no key


async def test_a_profile_is_as_it_is_offered_now(mesh: Mesh) -> None:
    mesh.peer("b", Offer("m", kind="text"))
    assert mesh.peers.find("m").kind == "text"  # type: ignore[union-attr]
    mesh.peer("b", Offer("m", kind="embedding"))
    assert mesh.peers.find("m").kind == "embedding"  # type: ignore[union-attr]
    mesh.peer("b")
    assert mesh.peers.find("m") is None


async def test_what_cant_be_understood_is_left_out(mesh: Mesh) -> None:
    good = encode(Offer("m"))
    mesh.peers.update(
        "b", {"p:m:default": good, "p:x:default": b"{", "q:future": b"1", NODE_KEY: b"nonsense"}
    )
    assert [key for key, _ in mesh.peers.offered()] == [KEY]
    assert mesh.peers.of("b").entry == NodeEntry()


async def test_a_suspected_node_gets_nothing_new_and_loses_nothing(mesh: Mesh) -> None:
    """The suspicion may be a third node's, which can't reach it: ours goes on."""
    b = mesh.peer("b", Offer("m"))
    stream, far = await open_pair()
    b.links.add(stream)
    changes = mesh.changes
    mesh.peers.set_alive("b", alive=False)
    assert mesh.candidates() == []
    assert mesh.peers.seat("b", KEY) is None
    assert not stream.closed
    assert mesh.peers.find("m") is not None
    assert mesh.peers.explain(KEY) == "node b is asleep or not reachable"
    mesh.peers.set_alive("b", alive=True)
    assert mesh.candidates() == ["b"]
    assert mesh.changes == changes + 2
    # Its death ends it.
    mesh.peers.forget("b")
    assert stream.closed
    assert list(mesh.peers.offered()) == []
    assert mesh.peers.find("m") is None
    assert mesh.peers.explain(KEY) == ""
    far.close()


async def test_who_left_may_be_back_in_a_moment(mesh: Mesh, autojump_clock: MockClock) -> None:
    mesh.peer("b", Offer("m"))
    mesh.peers.forget("b", left=True)
    assert list(mesh.peers.offered()) == []
    assert not mesh.peers.has(KEY)
    assert mesh.peers.find("M") is not None
    await trio.sleep(5)
    assert mesh.peers.explain(KEY) == "node b, which had it, left 5 s ago"
    await trio.sleep(55)
    assert mesh.peers.find("m") is None
    assert mesh.peers.explain(KEY) == ""


async def test_only_what_nobody_has_is_missed(mesh: Mesh) -> None:
    mesh.peer("b", Offer("m", aliases=("n",)), Offer("only", "fast", aliases=("o",)))
    mesh.peer("c", Offer("m"))
    mesh.peers.forget("b", left=True)
    assert mesh.peers.find("n") is not None
    assert mesh.peers.find("O:Fast") is not None
    assert mesh.peers.find("o") is None
    assert mesh.candidates() == ["c"]
    assert mesh.peers.explain("only:fast").startswith("node b, which had it, left")
    # What an operator takes away is gone at once.
    mesh.peers.update("c", {})
    assert mesh.peers.find("m") is None
    # What is there again is as it is there.
    mesh.peer("d", Offer("n", description="another"))
    found = mesh.peers.find("n")
    assert found is not None
    assert found.model_description == "another"


async def test_a_sleeping_one_stays_and_is_woken(mesh: Mesh) -> None:
    b = mesh.peer("b", Offer("m"), closed="is shutting down")
    b.wake_mac = "02:00:00:00:00:01"
    mesh.peers.forget("b")
    [outlook] = mesh.peers.outlooks(KEY, ())
    assert (outlook.node, outlook.wake_ms) == ("b", 30_000.0)
    seat = mesh.peers.seat("b", KEY)
    assert seat is not None
    assert seat.asleep
    with pytest.raises(UpstreamBroken, match="sleeps on"):
        await seat.connect(fresh=False)
    assert mesh.woken == ["b"]
    seat.leave(None, complete=False, failed=True)
    assert (b.lost, b.in_flight) == (1, {})


async def test_who_may_be_asked(mesh: Mesh, autojump_clock: MockClock) -> None:
    mesh.peer("b", Offer("m", fingerprint="one"))
    mesh.peer("c", Offer("M", "Default", fingerprint="two"))
    mesh.peer("listed", Offer("m", runs=False))
    shut = mesh.peer("shut", Offer("m"), closed="is draining")
    assert mesh.candidates() == ["b", "c"]
    assert mesh.candidates(excluded={"b"}) == ["c"]
    assert mesh.candidates(fingerprint="one") == ["b"]
    assert mesh.candidates("M:DEFAULT") == ["b", "c"]
    assert mesh.peers.explain(KEY, {"b", "c"}) == "node shut is draining"
    # Old news says nothing any more: it is asked, and its answer tells.
    await trio.sleep(31)
    assert shut.closed == ""
    assert mesh.candidates() == ["b", "c", "shut"]


async def test_one_version_of_embeddings_is_used(mesh: Mesh) -> None:
    """What most nodes run, then the same for as long as anybody has it."""

    def has(node: str, fingerprint: str, *, runs: bool = True) -> None:
        mesh.peer(node, Offer("e", kind="embedding", fingerprint=fingerprint, runs=runs))

    assert mesh.peers.fingerprint("e:default") == ""
    for number in range(5):
        has(f"listed{number}", "zero", runs=False)
    assert mesh.peers.fingerprint("e:default") == ""
    has("b", "two")
    assert mesh.peers.fingerprint("E:default") == "two"
    has("c", "one")
    has("d", "one")
    assert mesh.peers.fingerprint("e:default") == "two"
    mesh.peers.set_alive("b", alive=False)
    assert mesh.peers.fingerprint("e:default") == "two"
    mesh.peers.forget("b")
    assert mesh.peers.fingerprint("e:default") == "one"
    # As many of each: the same everywhere, whoever came first.
    other = Mesh()
    for node, fingerprint in (("x", "b"), ("y", "a")):
        other.peers.update(node, {})
        other.peers.of(node).offers = {"e:default": Offer("e", kind="embedding", fingerprint=fingerprint)}
    other.peers._index()
    assert other.peers.fingerprint("e:default") == "a"


async def test_ways(mesh: Mesh) -> None:
    target = mesh.peer("t", Offer("m"))
    target.note_rtt(0.001)
    assert mesh.peers.outlooks(KEY, ())[0].link_ms == 1.0
    v, w = mesh.peer("v", cut=("t",)), mesh.peer("w")
    w.note_rtt(0.002)
    target.direct = False
    # By a third one that says it reaches it, at twice its round trip and more.
    [outlook] = mesh.peers.outlooks(KEY, ())
    assert outlook.link_ms == 9.0
    seat = mesh.peers.seat("t", KEY)
    assert seat is not None
    assert (seat.node, seat.first_hop) == ("t", "w")
    seat.leave(None, complete=False, failed=False)
    mesh.peer("v")
    assert mesh.peers.seat("t", KEY, {"v", "w"}) is not None  # itself, when nothing else is left
    second = mesh.peers.seat("t", KEY, {"v"})
    assert second is not None
    assert second.first_hop == "w"
    # What breaks on the way says nothing about the target, and what comes back nothing of its load.
    second.hear(encode(Situation(slots=9)))
    assert target.situation(KEY) == IDLE
    for _ in range(10):
        one = mesh.peers.seat("t", KEY, {"v"})
        assert one is not None
        one.leave(None, complete=False, failed=True)
    assert (target.lost, target.breaker.state) == (0, State.CLOSED)
    v.alive = w.alive = False
    target.links.can_dial = False
    assert mesh.candidates() == []
    assert "can't be reached from here" in mesh.peers.explain(KEY)


async def test_forwards_in_flight(mesh: Mesh) -> None:
    b = mesh.peer("b", Offer("M", "Default"), profiles={"M:Default": Situation(slots=2, others=3)})
    changes = mesh.changes
    seats = [mesh.peers.seat("b", "m:default") for _ in range(3)]
    assert b.in_flight == {"M:Default": 3}
    [outlook] = mesh.peers.outlooks(KEY, ())
    assert (outlook.ready_slots, outlook.busy, outlook.queued, outlook.sent) == (2, 2, 1, 3)
    assert seats[0] is not None
    assert seats[0].model == "M:Default"
    for seat in seats:
        assert seat is not None
        seat.leave(None, complete=True, failed=False)
    assert not b.in_flight
    assert mesh.changes == changes + 3
    # Offers that change under a forward change nothing of its count.
    seat = mesh.peers.seat("b", KEY)
    mesh.peer("b", Offer("m", "default"))
    assert seat is not None
    seat.leave(None, complete=False, failed=False)
    assert not b.in_flight


async def test_breakers(autojump_clock: MockClock) -> None:
    mesh = Mesh(CircuitBreaker(failure_threshold=2, success_threshold=1, half_open_probe_interval_ms=1000))
    b = mesh.peer("b", Offer("m"))
    for _ in range(2):
        seat = mesh.peers.seat("b", KEY)
        assert seat is not None
        seat.leave(None, complete=False, failed=True)
    assert b.breaker.state is State.OPEN
    assert mesh.candidates() == []
    assert mesh.peers.seat("b", KEY) is None
    assert "failed a moment ago" in mesh.peers.explain(KEY)
    await trio.sleep(5.1)
    assert mesh.candidates() == ["b"]
    probe = mesh.peers.seat("b", KEY)
    assert probe is not None
    assert mesh.peers.seat("b", KEY) is None
    # A client that leaves frees the probe for the next one.
    probe.leave(None, complete=False, failed=False)
    second = mesh.peers.seat("b", KEY)
    assert second is not None
    second.leave(None, complete=True, failed=False)
    assert b.breaker.state is State.CLOSED


async def test_a_seat_at_who_has_left(mesh: Mesh) -> None:
    mesh.peer("b", Offer("m"))
    seat = mesh.peers.seat("b", KEY)
    assert seat is not None
    mesh.peers.forget("b")
    with pytest.raises(UpstreamBroken, match="has left"):
        await seat.connect(fresh=False)
    seat.leave(None, complete=False, failed=True)
    assert mesh.peers.seat("nobody", KEY) is None
    mesh.peers.forget("nobody")
    mesh.peers.set_alive("nobody", alive=True)
    assert len(mesh.peers) == 1


async def test_news_of_one_profile_says_nothing_of_another(autojump_clock: MockClock) -> None:
    mesh = Mesh()
    busy = Situation(slots=1, others=9)
    b = mesh.peer("b", Offer("m"), Offer("n"), profiles={KEY: busy, "n:default": busy})
    await trio.sleep(29)
    b.note_situation("n:default", busy)
    await trio.sleep(2)
    assert (b.situation(KEY), b.situation("n:default")) == (IDLE, busy)
    await trio.sleep(29)
    assert b.situation("n:default") == IDLE
    b.note_news(News(profiles={KEY: busy}))
    assert (b.situation(KEY), b.situation("n:default")) == (busy, IDLE)
    seat = mesh.peers.seat("b", KEY)
    assert seat is not None
    seat.hear(b"nonsense")
    assert b.situation(KEY) == busy
    seat.hear(b"{}")
    assert b.situation(KEY) == IDLE
    seat.leave(None, complete=True, failed=False)
