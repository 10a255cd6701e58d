"""What the documents say of other nodes: from real meshes, without the nodes around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import trio

from llamesh.core.offers import News, Offer, encode
from llamesh.web.mesh_pages import MeshPages
from tests.mesh.lives import Life, World, lives

CREATED = 1_700_000_000


def offer(life: Life, **said: Any) -> None:
    """Have a node offer "m", or whatever it says, from the next round on."""
    made = Offer(**{"model": "m", **said})
    life.offers = {**life.offers, f"p:{made.key}": encode(made)}


def pages_of(life: Life) -> MeshPages:
    return MeshPages(life.mesh, CREATED)


async def pair(world: World, **cluster: Any) -> tuple[Life, Life]:
    a = await world.start("a")
    b = await world.start("b", ["a"], **cluster)
    await world.joined(a, b)
    return a, b


async def test_an_entry_of_models_is_as_the_contract_has_it(tmp_path: Path) -> None:
    async with lives(tmp_path) as world:
        a, b = await pair(world)
        b.mesh.greeting.url = "http://10.0.0.2:8080"
        offer(
            b,
            profile="fast",
            description="a model",
            profile_description="quick",
            idle_timeout_seconds=300.0,
            n_ctx=8192,
            n_slots=2,
            context_length=4096,
            tps=50.5,
            status="loaded",
        )
        pages = pages_of(a)
        await world.until(
            lambda: (entry := pages.model("M:FAST")) is not None and bool(entry["metadata"]["cluster_url"]),
            "a lists it",
        )
        entry = {
            "id": "m:fast",
            "object": "model",
            "created": CREATED,
            "owned_by": "b",
            "status": {"value": "loaded"},
            "context_length": 4096,
            "metadata": {
                "model": "m",
                "profile_id": "fast",
                "description": "a model",
                "profile_description": "quick",
                "idle_timeout_seconds": 300.0,
                "estimated_tokens_per_second": 50.5,
                "parsed_model_params": {"n_ctx": 8192, "n_ctx_train": None, "n_slots": 2},
                "source": "cluster",
                "advertised_by": "b",
                "cluster_url": "http://10.0.0.2:8080",
                "nodes": ["b"],
            },
        }
        assert pages.model("m:fast") == entry
        assert [one["id"] for one in pages.models(())] == ["b", "m:fast"]
        assert pages.models({"b:default", "m:fast"}) == []
        assert pages.model("m") is None  # it has no default profile
        assert pages.model("") is None


async def test_of_several_who_have_it_one_where_it_is_loaded_is_named(tmp_path: Path) -> None:
    async with lives(tmp_path) as world:
        a = await world.start("a")
        for name, state in (("b", "unloaded"), ("c", "loaded"), ("d", "loaded")):
            life = await world.start(name, ["a"])
            offer(life, status=state, aliases=("nick",))
        pages = pages_of(a)
        await world.until(
            lambda: (e := pages.model("m")) is not None and e["metadata"]["nodes"] == ["b", "c", "d"],
            "all three",
        )
        entry = pages.model("nick")
        assert entry is not None
        assert (entry["id"], entry["owned_by"], entry["status"]) == ("m", "c", {"value": "loaded"})
        assert len([one for one in pages.models(()) if one["id"] == "m"]) == 1


async def test_a_name_at_a_node_that_is_gone_is_gone(tmp_path: Path) -> None:
    async with lives(tmp_path) as world:
        a, b = await pair(world)
        pages = pages_of(a)
        assert pages.model("b") is not None
        await b.leave()
        assert pages.model("b") is None
        assert pages.models(()) == []
        assert pages.nodes() == {}


CONTRACT = {
    "ready", "version", "llama_cpp_version", "address", "active_instances", "current_requests",
    "loaded_models", "supported_models", "model_stats", "available_vram", "available_sysmem",
    "external_vram_mb", "device_vram_used_mb", "device_vram_total_mb", "gpu_telemetry_available",
    "total_queue_length", "last_seen", "started_at_unix",
}  # fmt: skip


async def test_an_entry_of_nodes_is_as_the_contract_has_it(tmp_path: Path) -> None:
    async with lives(tmp_path) as world:
        a, b = await pair(world)
        stats = {"m:default": {"instance_count": 1, "queue_len": 2, "tps": 3.5, "vram_mb": 4, "sysmem_mb": 5}}
        summary = {
            "active_instances": 1,
            "current_requests": 2,
            "model_stats": stats,
            "available_vram": 1000,
            "total_queue_length": 3,
            "loaded_models": ["m:default"],
            "gpu_telemetry_available": True,
            # What it may not say of itself.
            "ready": "surely",
            "status": "king",
            "version": "99",
            "address": "nowhere",
            "last_seen": -1,
            "link": "direct",
        }
        b.mesh.news = lambda _asker: News(node_id="b", closed=b.closed, summary=summary)
        pages = pages_of(a)
        await world.until(lambda: pages.nodes()["b"]["model_stats"] == stats, "a has heard it")
        entry = pages.nodes()["b"]
        assert set(entry) >= CONTRACT
        assert (entry["ready"], entry["reason"], entry["status"]) == (True, None, "alive")
        assert (entry["active_instances"], entry["total_queue_length"]) == (1, 3)
        assert entry["available_vram"] == 1000
        assert entry["loaded_models"] == ["m:default"]
        assert entry["supported_models"] == ["b:default"]
        assert entry["address"] == b.address
        assert entry["last_seen"] > 1_600_000_000
        assert entry["link"]["direct"] is True
        b.closed = "is draining"
        await world.until(lambda: not pages.nodes()["b"]["ready"], "a knows that it takes nothing")
        assert pages.nodes()["b"]["reason"] == "is draining"


async def test_before_it_has_said_anything_all_members_are_there(tmp_path: Path) -> None:
    async with lives(tmp_path) as world:
        a = await world.start("a")
        a.mesh.peers.update("b", {})
        entry = pages_of(a)._node(a.mesh.peers.of("b"), "alive")
        assert set(entry) >= CONTRACT
        assert entry["model_stats"] == {}
        assert entry["last_seen"] is entry["available_vram"] is None


async def test_who_sleeps_is_listed_with_what_it_had(tmp_path: Path) -> None:
    async with lives(tmp_path) as world:
        b = await world.start("b")
        known = {"address": b.address, "wake_mac": "02:00:00:00:00:01", "node_id": "b"}
        a = await world.start("a", [known])
        pages = pages_of(a)
        await world.joined(a, b)
        b.mesh.news = lambda _asker: News(node_id="b", summary={"current_requests": 5})
        await world.until(lambda: pages.nodes()["b"]["current_requests"] == 5, "a has heard it")
        await b.leave()
        await world.until(lambda: pages.nodes()["b"]["status"] == "asleep", "it sleeps")
        entry = pages.nodes()["b"]
        assert entry["supported_models"] == ["b:default"]
        assert (entry["ready"], entry["current_requests"]) == (False, 0)
        assert "woken" in entry["reason"]
        assert pages.model("b") is not None
        assert pages.figures().statuses["asleep"] == 1


async def test_who_sleeps_since_before_our_start_is_listed_without_models(tmp_path: Path) -> None:
    async with lives(tmp_path) as world:
        known = {"address": "127.0.0.1:9", "wake_mac": "02:00:00:00:00:01", "node_id": "b"}
        a = await world.start("a", [known])
        entry = pages_of(a).nodes()["b"]
        assert (entry["status"], entry["ready"], entry["supported_models"]) == ("asleep", False, [])
        assert entry["last_seen"] is None


async def test_figures(tmp_path: Path) -> None:
    async with lives(tmp_path) as world:
        a, b = await pair(world)
        c = await world.start("c", ["a"])
        await world.joined(a, b, c)
        await a.ask("b")
        seat = a.mesh.peers.seat("b", "b:default")
        assert seat is not None
        pages = pages_of(a)
        figures = pages.figures()
        assert dict(figures.statuses) == {"alive": 2}
        assert [peer.node for peer in figures.peers] == ["b", "c"]
        assert figures.peers[0].running == 1
        assert figures.peers[0].forwards == {"lost": 0, "ended": 0}
        assert sum(figures.peers[0].links.values()) == len(a.mesh.peers.of("b").links)
        seat.leave(None, complete=True, failed=False)
        assert pages.figures().peers[0].forwards == {"lost": 0, "ended": 1}
        await world.until(lambda: (pages.figures().peers[0].round_trip or 1) < 1, "it was probed")
        assert figures.handshakes["acceptor", "ok"] >= 2
        messages, size = figures.gossip["in", "root"]
        assert 0 < messages < size
        await c.kill()
        await world.until(lambda: pages.figures().statuses.get("dead") == 1, "c is missed")
        assert [peer.up for peer in pages.figures().peers] == [True, False]


async def test_nothing_here_waits(tmp_path: Path) -> None:
    async with lives(tmp_path) as world:
        a, b = await pair(world)
        for tap in (a.tap, b.tap):
            tap.stall()
        pages = pages_of(a)
        with trio.CancelScope() as scope:
            scope.cancel()  # whatever would wait ends here
            pages.models(())
            pages.nodes()
            pages.model("b")
            pages.figures()
        assert not scope.cancelled_caught
        for tap in (a.tap, b.tap):
            tap.resume()
