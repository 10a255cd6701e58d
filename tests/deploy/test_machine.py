"""The package on a machine with systemd: the unit, its sandbox, its socket, restarts and updates."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from tests.end_to_end.cookbooks import CHAT, chat, cookbook
from tests.support.clean_root import CleanRoot, why_not
from tests.support.clients import Clients
from tests.support.node import PATIENCE_SECONDS, wait_until

COOKBOOK = cookbook(
    tiny={"id": "default", "model_path": "models/tiny.gguf", "llama_server_args": "-c 1024 -np 2 -t 1"}
)
UNIT = "llamesh.service"
DROP_IN = "/etc/systemd/system/{}.d/test.conf"


@dataclass
class Machine:
    """A booted Debian with llamesh installed, as its administrator sees it."""

    root: CleanRoot
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def systemctl(self, *words: str) -> str:
        return self.root.inside("systemctl", *words)

    def property(self, name: str, unit: str = UNIT) -> str:
        return self.systemctl("show", "--value", "--property", name, unit).strip()

    def configure(self, unit: str, lines: str) -> None:
        """What `systemctl edit` does; "" takes it back."""
        if lines:
            self.root.write(DROP_IN.format(unit), lines)
        else:
            (self.root.files / DROP_IN.format(unit).lstrip("/")).unlink()
        self.systemctl("daemon-reload")

    def events(self) -> list[dict[str, Any]]:
        """What the node has logged so far."""
        lines = self.root.inside("journalctl", "--no-pager", "-u", UNIT, "-o", "cat").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def said(self, event: str, **fields: object) -> bool:
        """Whether there was such an event."""
        return any(e["event"] == event and fields.items() <= e.items() for e in self.events())

    def journal(self) -> str:
        return self.root.inside("journalctl", "--no-pager", "-u", UNIT, "-o", "cat")

    async def ask(self) -> httpx.Response:
        async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE_SECONDS) as client:
            return await client.post(f"{self.url}{CHAT}", json=chat("tiny"))


@pytest.fixture(scope="module")
def machine(
    lowest: Path, package: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Machine]:
    if reason := why_not("systemd-nspawn"):
        pytest.skip(reason)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with CleanRoot(lowest, tmp_path_factory.mktemp("machine")) as root:
        root.copy(package, "/root/llamesh.deb")
        root.run("dpkg", "--force-unsafe-io", "-i", "/root/llamesh.deb")
        assert "engine embedded" in root.run("llamesh", "--version")
        root.write("/etc/llamesh/config.yaml", f"listen_addr: 127.0.0.1:{port}\n")
        root.write("/etc/llamesh/cookbook.yaml", json.dumps(COOKBOOK).replace("models/", "/var/lib/llamesh/"))
        root.copy(tiny_model, "/var/lib/llamesh/tiny.gguf")
        root.write(
            DROP_IN.format("llamesh.socket"), f"[Socket]\nListenStream=\nListenStream=127.0.0.1:{port}\n"
        )
        with root.booted():
            yield Machine(root, port)


async def test_it_starts_at_boot_and_serves_from_its_sandbox(machine: Machine) -> None:
    assert (machine.property("ActiveState"), machine.property("User")) == ("active", "llamesh")
    assert machine.property("StatusText").startswith("profiles 1, instances ")
    reply = await machine.ask()
    assert reply.status_code == 200, reply.text
    pid = machine.property("MainPID")
    status = machine.root.inside("cat", f"/proc/{pid}/status")
    facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert (facts["NoNewPrivs"].strip(), facts["Seccomp"].strip()) == ("1", "2")
    assert {int(facts[name], 16) for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb")} == {0}
    # The files of the system are as read-only to it as its programs; its own folder isn't.
    namespace = ("nsenter", "--target", pid, "--mount")
    for path in ("/etc/llamesh/x", "/usr/x", "/opt/llamesh/x"):
        assert "Read-only" in machine.root.inside(*namespace, "touch", path, fails=True)
    assert machine.root.inside(*namespace, "ls", "/home").strip() == ""
    machine.root.inside(*namespace, "touch", "/var/lib/llamesh/x")
    # With DevicePolicy closed the GPUs would be hidden, too, and not one of these directives says so.
    assert machine.property("DevicePolicy") == "auto"
    assert machine.property("DeviceAllow") == ""
    start = machine.events()
    start = start[: [e["event"] for e in start].index("listening")]
    assert [e for e in start if e["level"] in ("warning", "error")] == []
    scored = machine.root.inside("systemd-analyze", "security", "--no-pager", UNIT)
    exposure = re.search(r"Overall exposure level for \S+: ([0-9.]+)", scored)
    assert exposure is not None
    assert float(exposure[1]) <= 2.5


async def test_reload_reads_the_files(machine: Machine) -> None:
    book = machine.root.files / "etc/llamesh/cookbook.yaml"
    good = book.read_text()
    before = machine.property("MainPID")
    try:
        machine.systemctl("reload", UNIT)
        await wait_until(lambda: machine.said("SIGHUP: the files were read"), machine.journal)
        # It is the node's to say when it is done: systemd 252 doesn't wait for it.
        await wait_until(lambda: machine.property("ActiveState") == "active", machine.journal)
        book.write_text("models: [")
        machine.systemctl("reload", UNIT)
        await wait_until(lambda: "see the log" in machine.property("StatusText"), machine.journal)
    finally:
        book.write_text(good)
        machine.systemctl("reload", UNIT)
    await wait_until(lambda: "see the log" not in machine.property("StatusText"), machine.journal)
    assert machine.property("MainPID") == before


async def test_restarts_and_an_update_fail_no_request(machine: Machine) -> None:
    clients = Clients(machine.url, "tiny")
    async with trio.open_nursery() as nursery:
        for kept in (True, False):
            nursery.start_soon(lambda kept=kept: clients.ask(kept=kept))
        await clients.wait_answered(5)
        for words in (
            ("systemctl", "restart", UNIT),
            ("dpkg", "--force-unsafe-io", "-i", "/root/llamesh.deb"),
        ):
            before = machine.property("MainPID")
            await trio.to_thread.run_sync(lambda words=words: machine.root.inside(*words))
            await clients.wait_answered(5)
            assert machine.property("MainPID") != before
        clients.stopped = True
        await clients.wait_gone()
    assert clients.failed == []


async def test_a_node_that_hangs_is_replaced(machine: Machine) -> None:
    machine.configure(UNIT, "[Service]\nWatchdogSec=2\nTimeoutAbortSec=1\n")
    try:
        machine.systemctl("restart", UNIT)
        assert (await machine.ask()).status_code == 200
        before = machine.property("MainPID")
        machine.root.inside("sh", "-c", f"kill -STOP {before}")
        await wait_until(
            lambda: (
                machine.property("MainPID") not in (before, "0")
                and machine.property("ActiveState") == "active"
            ),
            machine.journal,
        )
        assert "Watchdog timeout" in machine.journal()
        # Its children are gone with it, and the next life serves.
        assert machine.property("NRestarts") == "1"
        assert (await machine.ask()).status_code == 200
        running = machine.root.inside("systemctl", "status", "--no-pager", UNIT)
        assert running.count("llamesh.local.engine") == 1
    finally:
        machine.configure(UNIT, "")
        machine.systemctl("restart", UNIT)


async def test_a_stopped_node_wakes_for_a_client(machine: Machine) -> None:
    machine.systemctl("stop", UNIT)
    assert machine.property("ActiveState") == "inactive"
    assert machine.property("Result") == "success"
    assert (await machine.ask()).status_code == 200
    assert machine.property("ActiveState") == "active"


async def test_without_the_socket_the_node_listens_by_itself(machine: Machine) -> None:
    machine.systemctl("stop", "llamesh.socket", UNIT)
    try:
        machine.systemctl("start", UNIT)
        assert (await machine.ask()).status_code == 200
        assert machine.property("ActiveState", "llamesh.socket") == "inactive"
    finally:
        machine.systemctl("stop", UNIT)
        machine.systemctl("start", "llamesh.socket", UNIT)


async def test_the_service_s_user_can_join_a_mesh(machine: Machine) -> None:
    """As docs/operating.md has it. The configuration is replaced, and keeps its group and mode."""
    root = machine.root
    before = (root.files / "etc/llamesh/config.yaml").read_text()
    as_user = ("runuser", "-u", "llamesh", "--", "env", "HOME=/var/lib/llamesh")
    other = ("HOME=/tmp/other", "LLAMESH_NODE_ID=other", "LLAMESH_LISTEN_ADDR=127.0.0.1:1")
    files = ("--config", "/etc/llamesh/config.yaml", "--secrets", "/etc/llamesh/secrets.yaml")
    said = root.inside(*as_user, *other, "llamesh", "invite").splitlines()
    [line] = [line for line in said if line.startswith("llamesh1:")]
    try:
        told = root.inside(*as_user, "llamesh", *files, "join", line, fails=True)
        assert "is set up for the mesh of other" in told
        assert "127.0.0.1:1" in (root.files / "etc/llamesh/config.yaml").read_text()
        assert root.owner("/etc/llamesh/config.yaml") == ("llamesh", "llamesh", 0o640)
        assert root.owner("/var/lib/llamesh/.llama-mesh") == ("llamesh", "llamesh", 0o700)
        machine.systemctl("restart", UNIT)
        await wait_until(lambda: machine.said("mesh", peers=1), machine.journal)
    finally:
        root.write("/etc/llamesh/config.yaml", before)
        machine.systemctl("restart", UNIT)
