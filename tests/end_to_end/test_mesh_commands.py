"""`llamesh token`, `key` and `invite` as a person types them, each its own process."""

from __future__ import annotations

import os
import pty
import re
import subprocess
from pathlib import Path

import pytest

from llamesh.mesh.invitation import decode, encode
from llamesh.mesh.trust import key_bytes
from tests.support.machine import COMMAND, Machine

OTHER_TOKEN = "a token of another mesh"


@pytest.fixture
def box_a(tmp_path: Path) -> Machine:
    return Machine(
        tmp_path / "a", 'node_id: box-a\nlisten_addr: "192.0.2.7:8080"\ncluster: {enabled: true}\n'
    )


def test_the_token_is_made_once(box_a: Machine) -> None:
    token = box_a.say("token")
    assert box_a.say("token") == token
    assert (box_a.store / "cluster_token").read_text() == f"{token}\n"
    assert (box_a.store / "cluster_token").stat().st_mode & 0o777 == 0o600
    assert box_a.store.stat().st_mode & 0o777 == 0o700
    assert box_a.say("token", env={"CLUSTER_TOKEN": OTHER_TOKEN}) == OTHER_TOKEN


def test_a_rotated_token(box_a: Machine) -> None:
    before = box_a.say("token")
    done = box_a.run("token", "--rotate")
    assert done.stdout.strip() == box_a.say("token") != before
    assert "7 days" in done.stderr
    assert (box_a.store / "cluster_token.previous").read_text().strip() == before
    error = box_a.refuse("token", "--rotate", env={"CLUSTER_TOKEN": OTHER_TOKEN})
    assert "CLUSTER_TOKEN: is set" in error
    assert OTHER_TOKEN not in error


def test_the_key_is_for_allowed_keys(box_a: Machine) -> None:
    text = box_a.say("key")
    assert key_bytes(text) == box_a.identity().public
    assert box_a.say("key", "--rotate") == box_a.say("key") != text
    assert box_a.identity().previous_private is not None


def test_options_stand_before_or_after(box_a: Machine, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(f"cluster: {{noise: {{config_dir: {tmp_path / 'keys'}}}}}\n")
    assert box_a.say("key", "--config", str(other)) == box_a.say("--config", str(other), "key")
    assert (tmp_path / "keys" / "node.key").exists()
    assert not box_a.store.exists()


def test_on_a_terminal_it_says_what_to_do_with_it(box_a: Machine) -> None:
    """The hint goes to stderr: a pipe gets the token alone."""
    master, terminal = pty.openpty()
    try:
        done = subprocess.run(
            [*COMMAND, "token"],
            cwd=box_a.directory,
            env=box_a.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=terminal,
            timeout=60,
        )
        said = os.read(master, 4096).decode()
    finally:
        os.close(master)
        os.close(terminal)
    assert done.stdout.decode().strip() == box_a.say("token")
    assert "who has it can join" in said


@pytest.mark.parametrize("command", ["token", "key", "invite"])
def test_a_store_that_others_can_look_into(box_a: Machine, command: str) -> None:
    box_a.say("token")
    box_a.store.chmod(0o755)
    assert f"chmod 700 {box_a.store}" in box_a.refuse(command)


def test_a_bad_configuration(box_a: Machine) -> None:
    box_a.config.write_text("node_id: a b\n")
    for arguments in (("token",), ("key",), ("invite",), ("join", "llamesh1:x")):
        error = box_a.refuse(*arguments)
        assert "config.yaml:1: node_id" in error or "isn't an invitation" in error
    line = encode("box-x", b"k" * 32, "t" * 40, ())
    assert "config.yaml:1: node_id" in box_a.refuse("join", line)


def test_an_invitation(box_a: Machine) -> None:
    done = box_a.run("invite")
    assert done.returncode == 0
    found = decode(done.stdout)
    assert (found.node_id, found.key) == ("box-a", box_a.identity().public)
    assert found.token == box_a.say("token")
    assert [str(address) for address in found.addresses] == ["192.0.2.7:8080"]
    assert "Secret" in done.stderr
    assert "192.0.2.7:8080" in done.stderr
    assert "Warning" not in done.stderr
    assert found.token not in done.stderr


@pytest.mark.parametrize(
    ("config", "addresses", "warning"),
    [
        ("cluster: {enabled: true}\n", ["127.0.0.1:8080"], "which only this machine can reach"),
        ('listen_addr: "192.0.2.7:1"\n', ["192.0.2.7:1"], "cluster.enabled is false"),
        (
            'cluster: {enabled: true, listen_addr: "192.0.2.7:9", noise: {tofu: false}}\n',
            ["192.0.2.7:9"],
            "takes known keys only",
        ),
        ("public_url: https://box.example\n", ["box.example:443", "127.0.0.1:8080"], "cluster.enabled"),
        ("public_url: http://[fd00::7]\nlisten_addr: 127.0.0.1:0\n", ["[fd00::7]:80"], "cluster.enabled"),
        (
            "public_url: box.example:77\nlisten_addr: name.example:1\n",
            ["box.example:77", "name.example:1"],
            "",
        ),
    ],
)
def test_where_an_invitation_leads(box_a: Machine, config: str, addresses: list[str], warning: str) -> None:
    box_a.config.write_text(config)
    done = box_a.run("invite")
    assert done.returncode == 0, done.stderr
    assert [str(address) for address in decode(done.stdout).addresses] == addresses
    assert warning in done.stderr


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("listen_addr: 127.0.0.1:0\n", "listen_addr has port 0"),
        ("cluster: {listen_addr: '127.0.0.1:0'}\n", "cluster.listen_addr has port 0"),
        ("cluster: {noise: {enabled: false}}\n", "cluster.noise.enabled is false"),
        ("listen_addr: 0.0.0.0:80\ncluster: {discovery: {interfaces: [none-such]}}\n", "has no address"),
    ],
)
def test_no_invitation(box_a: Machine, config: str, words: str) -> None:
    box_a.config.write_text(config)
    assert words in box_a.refuse("invite")


def test_help_names_the_commands(box_a: Machine) -> None:
    shown = box_a.run("--help").stdout
    for command in ("pause", "token", "key", "invite", "join"):
        assert re.search(rf"^  {command} ", shown, re.MULTILINE)
        assert box_a.run(command, "--help").returncode == 0
    assert box_a.run("join").returncode == 2
