"""`llamesh join` as a person types it: real processes, and a mesh on loopback that answers them."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import socket
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from llamesh.config.cookbook import load_cookbook
from llamesh.config.settings import Address
from llamesh.config.yaml_source import read_yaml
from llamesh.mesh.hello import Hello, Refused, Welcome
from llamesh.mesh.identity import Identity
from llamesh.mesh.invitation import decode, encode
from llamesh.mesh.known_peers import KnownPeers
from llamesh.mesh.stream import accept
from llamesh.mesh.trust import Claim, key_text
from tests.support.machine import COMMAND, Machine

OTHER_TOKEN = "a token of another mesh"


@pytest.fixture
def box_a(tmp_path: Path) -> Machine:
    return Machine(
        tmp_path / "a", 'node_id: box-a\nlisten_addr: "192.0.2.7:8080"\ncluster: {enabled: true}\n'
    )


@pytest.fixture
def box_b(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "b", "# the cellar\nnode_id: box-b   # not box-a\n")


def an_invitation(**changes: Any) -> str:
    told: dict[str, Any] = {"node_id": "box-x", "key": b"k" * 32, "token": "t" * 40, "addresses": ()}
    return encode(**(told | changes))


class Mesh:
    """The inviter's side on loopback: takes connections as its node does."""

    def __init__(self, machine: Machine, token: str | None = None) -> None:
        self.machine = machine
        self.identity = machine.identity()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.known = KnownPeers(machine.store / "known_peers", (), True)
        self.seen: list[Claim] = []

    async def run(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self.listener)
            sock, _ = self.listener.accept()
            transport = await accept(sock, b"", self.identity, self.welcome, self.check)
            with contextlib.closing(transport), contextlib.suppress(Refused):
                assert await transport.receive() == b""

    def welcome(self, hello: Hello, address: str) -> Welcome:
        return Welcome(self.identity.node_id, "1.2.3", 1, address)

    def check(self, claim: Claim) -> None:
        self.known.check(claim, self.identity)
        self.seen.append(claim)


async def joining(mesh: Mesh, machine: Machine, *arguments: str, stdin: str = "") -> Any:
    """Run `join` while the mesh takes connections."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mesh.run)
        done = await trio.to_thread.run_sync(partial(machine.run, "join", *arguments, stdin=stdin))
        nursery.cancel_scope.cancel()
    mesh.listener.close()
    return done


def line_of(mesh: Mesh) -> str:
    """The inviter's own line, as it is with the port that the test got."""
    config = mesh.machine.config
    config.write_text(config.read_text().replace('"192.0.2.7:8080"', f'"{mesh.address}"'))
    return mesh.machine.say("invite")


async def test_joining(box_a: Machine, box_b: Machine) -> None:
    mesh = Mesh(box_a)
    line = line_of(mesh)
    before = box_b.config.read_text()
    done = await joining(mesh, box_b, "-", stdin=f"{line}\n")
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert "box-b is set up for the mesh of box-a" in done.stdout
    assert f"{mesh.address}: reached box-a" in done.stdout
    assert "Start box-b now" in done.stderr
    assert box_b.config.read_text().startswith(before)
    cluster = read_yaml(box_b.config).data["cluster"]
    assert cluster == {"enabled": True, "peers": [mesh.address]}
    assert box_b.say("token") == box_a.say("token")
    assert box_b.pins() == {"box-a": box_a.identity().public}
    assert [(claim.node_id, claim.key) for claim in mesh.seen] == [("box-b", box_b.identity().public)]
    assert {path.stat().st_mode & 0o077 for path in box_b.store.iterdir()} == {0}
    for secret in (box_a.say("token"), line):
        assert secret not in done.stdout + done.stderr


async def test_joining_again_changes_nothing(box_a: Machine, box_b: Machine) -> None:
    first = Mesh(box_a)
    line = line_of(first)
    await joining(first, box_b, line)
    before = box_b.files()
    done = await trio.to_thread.run_sync(partial(box_b.run, "join", line))
    assert done.returncode == 3  # nobody listens there any more
    assert "connection refused; is llamesh running there" in done.stdout
    assert "all is set up" in done.stderr
    assert "nothing to change" in done.stdout
    assert "shell's history" in done.stderr
    assert box_b.files() == before


async def test_the_inviter_was_somebody_else(box_a: Machine, box_b: Machine, tmp_path: Path) -> None:
    """Another node of the mesh took the address: it has the token, but not the inviter's key."""
    mesh = Mesh(box_a)
    line = line_of(mesh)
    mesh.identity = Identity("box-z", os.urandom(32), mesh.identity.token)
    done = await joining(mesh, box_b, "-", stdin=line)
    assert done.returncode == 3
    assert "another node than the inviter answers there: box-z" in done.stdout
    assert list(box_b.pins()) == ["box-a"]


async def test_the_inviter_has_a_new_key_since(box_a: Machine, box_b: Machine) -> None:
    line = encode("box-a", box_a.identity().public, box_a.say("token"), ())
    box_a.say("key", "--rotate")
    mesh = Mesh(box_a)
    line = encode("box-a", decode(line).key, decode(line).token, decode(line_of(mesh)).addresses)
    done = await joining(mesh, box_b, "-", stdin=line)
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert box_b.pins() == {"box-a": box_a.identity().public}


async def test_a_rotated_token_reaches_the_others(box_a: Machine, box_b: Machine) -> None:
    first = Mesh(box_a)
    await joining(first, box_b, "-", stdin=line_of(first))
    former = box_b.say("token")
    box_a.say("token", "--rotate")
    second = Mesh(box_a)
    box_a.config.write_text(box_a.config.read_text().replace(first.address, second.address))
    line = box_a.say("invite")
    assert "its token was changed since" in box_b.refuse("join", "-", stdin=line)
    done = await joining(second, box_b, "--force", "-", stdin=line)
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert box_b.say("token") == box_a.say("token") != former
    assert (box_b.store / "cluster_token.previous").read_text().strip() == former


def test_another_mesh_is_left_by_force_only(box_a: Machine, box_b: Machine) -> None:
    own = box_b.say("token")
    line = encode("box-a", box_a.identity().public, box_a.say("token"), ())
    error = box_b.refuse("join", line)
    assert "holds another token" in error
    assert "--force" in error
    assert own not in error
    done = box_b.run("join", "--force", line)
    assert done.returncode == 3
    assert "no address" in done.stderr
    assert box_b.say("token") == box_a.say("token")
    # Whoever has the token of the mesh that was left mustn't get in here with it.
    assert not (box_b.store / "cluster_token.previous").exists()


def test_a_new_configuration_file(box_a: Machine, box_b: Machine) -> None:
    box_b.config.unlink()
    line = encode("box-a", box_a.identity().public, box_a.say("token"), ())
    assert box_b.run("join", line, "--config", "new.yaml").returncode == 3
    assert read_yaml(box_b.directory / "new.yaml").data == {"cluster": {"enabled": True}}
    assert not box_b.config.exists()
    # A node doesn't start without a cookbook, and one that joins may have nothing to put into it.
    assert load_cookbook(box_b.directory / "cookbook.yaml").profiles == ()


def test_a_cookbook_that_is_there_stays(box_a: Machine, box_b: Machine) -> None:
    cookbook = box_b.directory / "cookbook.yaml"
    cookbook.write_text("models: []  # mine\n")
    line = encode("box-a", box_a.identity().public, box_a.say("token"), ())
    assert box_b.run("join", line).returncode == 3
    assert cookbook.read_text() == "models: []  # mine\n"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "it is empty"),
        ("hello", "doesn't start with llamesh1:"),
        (an_invitation()[:-7], "cut short"),
        (an_invitation(token="t" * 15), "doesn't hold"),
        ("llamesh1:" + "A" * 9000, "longer than"),
    ],
)
def test_a_bad_line(box_b: Machine, line: str, words: str) -> None:
    for error in (box_b.refuse("join", line), box_b.refuse("join", "-", stdin=line)):
        assert "llamesh: this isn't an invitation" in error
        assert words in error
        assert len(error) < 300


@pytest.mark.parametrize(
    ("config", "env", "words"),
    [
        ("node_id: box-x\n", {}, "give each node its own node_id"),
        ("", {"CLUSTER_TOKEN": OTHER_TOKEN}, "CLUSTER_TOKEN is set to another token"),
        ("", {"LLAMESH_CLUSTER__ENABLED": "false"}, "LLAMESH_CLUSTER__ENABLED sets cluster.enabled to false"),
        ("", {"LLAMESH_CLUSTER__PEERS": "h:1"}, "LLAMESH_CLUSTER__PEERS sets cluster.peers"),
        ("cluster: {noise: {enabled: false}}\n", {}, "cluster.noise.enabled is false"),
        (
            "listen_addr: 0.0.0.0:80\ncluster:\n  noise: {enabled: false}\n",
            {},
            "config.yaml: cluster.noise.enabled: is off while other machines can reach",
        ),
        (
            f"cluster: {{noise: {{allowed_keys: ['{key_text(b'z' * 32)}']}}}}\n",
            {},
            f"add {key_text(b'k' * 32)}",
        ),
        ("node_id: b\n...\n", {}, "write this into it yourself"),
        ("nonsense: 1\n", {}, "config.yaml:1: nonsense"),
        ("cluster: 7\n", {}, "config.yaml:1: cluster"),
    ],
)
def test_what_stands_against_it(box_b: Machine, config: str, env: dict[str, str], words: str) -> None:
    box_b.config.write_text(config)
    line = an_invitation(addresses=[Address("192.0.2.7", 8080)])
    error = box_b.refuse("join", line, env=env)
    assert words in error, error
    assert not re.search(r"\.config\.\d+", error)
    assert "t" * 40 not in error
    assert OTHER_TOKEN not in error


def test_the_same_token_in_the_environment_is_enough(box_b: Machine) -> None:
    done = box_b.run("join", an_invitation(), env={"CLUSTER_TOKEN": "t" * 40})
    assert done.returncode == 3
    assert not (box_b.store / "cluster_token").exists()


def test_a_key_that_is_pinned_already(box_b: Machine) -> None:
    assert box_b.run("join", an_invitation()).returncode == 3
    other = an_invitation(key=b"l" * 32)
    error = box_b.refuse("join", other)
    assert f"{box_b.store / 'known_peers'}:2" in error
    assert "--force" in error
    assert box_b.run("join", "--force", other).returncode == 3
    assert box_b.pins() == {"box-x": b"l" * 32}


def test_a_line_pasted_at_a_terminal_doesnt_show(box_b: Machine) -> None:
    master, terminal = pty.openpty()
    try:
        process = subprocess.Popen(
            [*COMMAND, "join", "-"],
            cwd=box_b.directory,
            env=box_b.environment,
            stdin=terminal,
            stdout=subprocess.PIPE,
            stderr=terminal,
            start_new_session=True,
        )
        shown = b""
        while b"Paste the line" not in shown:
            shown += os.read(master, 4096)
        os.write(master, an_invitation().encode() + b"\n")
        while b"no address" not in shown:
            shown += os.read(master, 4096)
        said, _ = process.communicate(timeout=60)
    finally:
        os.close(master)
        os.close(terminal)
    assert process.returncode == 3
    assert b"set up for the mesh of box-x" in said
    assert b"llamesh1:" not in shown


def test_bytes_that_are_no_text(box_b: Machine) -> None:
    done = subprocess.run(
        [*COMMAND, "join", "-"],
        cwd=box_b.directory,
        env=box_b.environment,
        input=b"\xff\xfe" * 10,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert b"isn't an invitation" in done.stderr
    assert b"Traceback" not in done.stderr
