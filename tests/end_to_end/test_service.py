"""A node under a service manager: sockets that outlive it, what it tells, and what signals do."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import trio

from tests.end_to_end.cookbooks import (
    CHAT,
    ask,
    ask_well,
    chat,
    cookbook,
    pid_of,
    profile,
    wait_running,
)
from tests.support.clients import Clients
from tests.support.fake import FAKE_LLAMA_SERVER, fake_profile_file
from tests.support.node import PATIENCE_SECONDS, prepare, running_node, wait_until
from tests.support.service import Manager


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    with Manager(tmp_path) as manager:
        yield manager


def faked(tmp_path: Path, **behaviour: Any) -> dict[str, Any]:
    return cookbook(m=profile(fake_profile_file(tmp_path, "m", **behaviour), "-np 4"))


async def test_a_restart_fails_no_request(tmp_path: Path, manager: Manager) -> None:
    port = manager.listen("api")
    recipes = faked(tmp_path, tokens=3)
    clients = Clients(f"http://127.0.0.1:{port}")
    async with trio.open_nursery() as nursery:
        for life in range(3):
            async with manager.running(tmp_path / "node", recipes, binary_path=FAKE_LLAMA_SERVER) as node:
                assert node.port == port
                if life == 0:
                    for kept in (True, True, False, False):
                        nursery.start_soon(lambda kept=kept: clients.ask(kept=kept))
                await clients.wait_answered(30)
                if life == 2:
                    clients.stopped = True
                    await clients.wait_gone()
                assert await node.stop() == 0
                assert node.errors == []
    assert clients.failed == []
    assert clients.answered >= 90


async def test_who_comes_during_the_end_waits_for_the_next_life(tmp_path: Path, manager: Manager) -> None:
    """And what runs is finished, as is what is asked on a connection that is open."""
    port = manager.listen("api")
    gate = tmp_path / "gate"
    recipes = faked(tmp_path, launches=[{"gate": str(gate), "gate_after": 1, "tokens": 3}, {}])
    replies: list[httpx.Response] = []

    async def come_late() -> None:
        async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE_SECONDS) as client:
            replies.append(await client.post(f"http://127.0.0.1:{port}{CHAT}", json=chat("m")))

    async with trio.open_nursery() as nursery:
        async with manager.running(tmp_path / "node", recipes, binary_path=FAKE_LLAMA_SERVER) as node:
            assert (await node.client.get("/readyz")).status_code == 200  # a connection that stays open
            async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE_SECONDS) as other:
                async with other.stream("POST", f"{node.url}{CHAT}", json=chat("m", stream=True)) as reply:
                    pieces = reply.aiter_text()
                    assert "data: " in await anext(pieces)
                    node.send_signal(signal.SIGTERM)
                    await manager.wait_told("STOPPING")
                    nursery.start_soon(come_late)
                    late = await node.client.get("/v1/models")
                    assert (late.status_code, late.headers["connection"]) == (200, "close")
                    assert replies == []
                    gate.touch()
                    rest = "".join([piece async for piece in pieces])
                assert rest.rstrip().endswith("[DONE]")
            assert await node.wait_end() == 0
        assert replies == []
        async with manager.running(tmp_path / "node", recipes, binary_path=FAKE_LLAMA_SERVER) as node:
            await wait_until(lambda: bool(replies), "nobody answered who came late")
            assert replies[0].status_code == 200
            assert await node.stop() == 0


async def test_what_the_manager_is_told_and_children_arent(tmp_path: Path, manager: Manager) -> None:
    manager.listen("api")
    env = {"WATCHDOG_USEC": "200000"}
    settings = {"shutdown_grace_period_seconds": 7}
    recipes = faked(tmp_path)
    loaded = "profiles 1, instances 1, requests 0, of them waiting 0"
    async with manager.running(
        tmp_path / "node", recipes, settings, binary_path=FAKE_LLAMA_SERVER, env=env
    ) as node:
        await manager.wait_told("READY")
        empty = "profiles 1, instances 0, requests 0, of them waiting 0"
        assert manager.told[0] == {"READY": "1", "STATUS": empty}
        await ask_well(node, "m")
        await wait_until(
            lambda: loaded in [m.get("STATUS") for m in manager.hear()],
            lambda: str(manager.told),
        )
        await manager.wait_told("WATCHDOG", count=3)
        child = psutil.Process(pid_of(node, "m:default"))
        given = child.environ()
        assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} & set(
            given
        )
        # Held by a child, the socket would outlive a manager that closes it.
        assert node.port not in [c.laddr.port for c in child.net_connections("tcp") if c.status == "LISTEN"]
        assert await node.stop() == 0
    [end] = [message for message in manager.hear() if "STOPPING" in message]
    assert end["EXTEND_TIMEOUT_USEC"] == "37000000"
    assert end["STATUS"] == f"finishing: {loaded}"
    assert manager.kinds() == ["READY", "STOPPING"]


async def test_sighup_reads_the_files(tmp_path: Path, manager: Manager) -> None:
    recipes = faked(tmp_path)
    async with manager.running(tmp_path / "node", recipes, binary_path=FAKE_LLAMA_SERVER) as node:
        await manager.wait_told("READY")
        node.send_signal(signal.SIGHUP)
        await node.wait_event("SIGHUP: the files were read", changed=False)
        await manager.wait_told("READY", count=2)
        book = node.directory / "cookbook.yaml"
        good = json.loads(book.read_text())
        good["models"][0]["aliases"] = ["other"]
        book.write_text(json.dumps(good))
        node.send_signal(signal.SIGHUP)
        await node.wait_event("reloaded", aliases=["other"])
        await manager.wait_told("READY", count=3)
        await ask_well(node, "other")
        book.write_text("models: [")
        node.send_signal(signal.SIGHUP)
        await node.wait_event("SIGHUP: nothing was taken in")
        await manager.wait_told("READY", count=4)
        assert "see the log" in manager.told[-1]["STATUS"]
        assert node.find_events("a file was changed and has a mistake; the old one stays")
        await ask_well(node, "other")
        assert await node.stop() == 0
    assert manager.kinds() == ["READY", *["RELOADING", "READY"] * 3, "STOPPING"]


async def test_peers_have_a_socket_of_their_own(tmp_path: Path, manager: Manager) -> None:
    manager.listen("api")
    port = manager.listen("peers")
    cluster = {
        "enabled": True,
        "listen_addr": f"127.0.0.1:{port}",
        "discovery": {"mdns": False},
    }
    async with manager.running(
        tmp_path / "node", faked(tmp_path), {"cluster": cluster}, binary_path=FAKE_LLAMA_SERVER
    ) as node:
        assert (await node.wait_event("mesh"))["port"] == port
        await ask_well(node, "m")
        with pytest.raises(httpx.TransportError):
            await node.client.get(f"http://127.0.0.1:{port}/health")
        assert await node.stop() == 0


async def test_an_open_address_is_judged_by_the_socket(tmp_path: Path, manager: Manager) -> None:
    port = manager.listen("api", "0.0.0.0")
    async with manager.running(tmp_path / "node", faked(tmp_path), binary_path=FAKE_LLAMA_SERVER) as node:
        said = await node.wait_event(
            "whoever reaches this address can use the models: set auth.enabled and auth.allowed_keys"
        )
        assert said["listen_addr"] == f"0.0.0.0:{port}"
        assert node.find_events("this address is set, but the service manager's socket is used")
        assert await node.stop() == 0


@pytest.mark.parametrize(
    ("env", "complaint"),
    [
        ({"LISTEN_FDS": "many"}, "LISTEN_FDS is 'many', not a number from 0 to 64"),
        (
            {"LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b"},
            "descriptor 4 ('b') was passed by LISTEN_FDS, but is no",
        ),
        ({"NOTIFY_SOCKET": "here"}, "NOTIFY_SOCKET is 'here'"),
        ({"WATCHDOG_USEC": "1s"}, "WATCHDOG_USEC is '1s'"),
    ],
)
async def test_a_bad_handover_is_refused_in_words(
    tmp_path: Path, manager: Manager, env: dict[str, str], complaint: str
) -> None:
    manager.listen("api")
    node = manager.start(tmp_path / "node", cookbook(), binary_path=FAKE_LLAMA_SERVER, env=env)
    try:
        assert await node.wait_end() == 1
        await wait_until(lambda: len(node.errors) == 1, lambda: f"{node.errors}")
        assert complaint in node.errors[0]
    finally:
        await node.close()


async def test_alone_a_hangup_reloads_too(tmp_path: Path) -> None:
    async with running_node(tmp_path / "node", faked(tmp_path), binary_path=FAKE_LLAMA_SERVER) as node:
        node.send_signal(signal.SIGHUP)
        await node.wait_event("SIGHUP: the files were read")
        reply = await ask(node, "m")
        assert reply.status_code == 200
        await wait_running(node, 0)
        assert await node.stop() == 0


async def test_closing_the_terminal_ends_the_node(tmp_path: Path) -> None:
    command, directory, environment = prepare(tmp_path / "node", faked(tmp_path))
    near, far = pty.openpty()
    try:
        with (directory / "log").open("wb") as log:
            # setsid makes the terminal its own, so that the kernel tells it when the terminal goes.
            process = subprocess.Popen(
                ["setsid", "--ctty", *command],
                cwd=directory,
                env=environment,
                stdin=far,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
    finally:
        os.close(far)

    def said() -> str:
        return (directory / "log").read_text()

    try:
        await wait_until(lambda: '"listening"' in said(), said)
        process.send_signal(signal.SIGHUP)
        await wait_until(lambda: "the files were read" in said(), said)
        os.close(near)
        near = -1
        await wait_until(lambda: process.poll() is not None, said)
        assert process.returncode == 0
        assert "the terminal was closed" in said()
        assert '"ended"' in said()
    finally:
        if near >= 0:
            os.close(near)
        process.kill()
        process.wait()
