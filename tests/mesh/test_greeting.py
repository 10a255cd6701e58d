"""What a node says of itself, what it makes of others' words, and how often it says so."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import MockClock

import llamesh
from llamesh.config.settings import Settings
from llamesh.mesh import greeting as module
from llamesh.mesh.greeting import Greeting
from llamesh.mesh.hello import Welcome
from llamesh.mesh.identity import Identity
from llamesh.mesh.mentions import MOST_AT_ONCE, REPEAT_SECONDS, Mentions
from llamesh.mesh.trust import NotTrusted

OWN = "192.168.1.2"


def greeting(monkeypatch: pytest.MonkeyPatch, listen: str = "0.0.0.0", **settings: Any) -> Greeting:
    def announceable(_interfaces: object, host: str) -> tuple[str, ...]:
        return (OWN,) if host == "0.0.0.0" else (host,)

    monkeypatch.setattr(module, "announceable", announceable)
    made = Greeting(
        Settings.model_validate({"node_id": "me", **settings}), Identity("me", b"k" * 32, b"t" * 32), 7
    )
    made.listens([(listen, 8080)])
    return made


async def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    said = greeting(monkeypatch)
    assert said.addresses() == (f"{OWN}:8080",)
    said.seen_from("203.0.113.7:51000")
    assert said.addresses() == (f"{OWN}:8080", "203.0.113.7:8080")
    assert said.hello("send").addresses == said.entry(()).addresses == said.addresses()
    public = greeting(monkeypatch, public_url="https://me.example")
    assert public.addresses() == ("me.example:443", f"{OWN}:8080")
    own_port = greeting(
        monkeypatch, public_url="https://me.example:8443", cluster={"listen_addr": "0.0.0.0:7000"}
    )
    own_port.listens([("0.0.0.0", 7000)])
    assert own_port.addresses()[0] == "me.example:7000"
    nobody = greeting(monkeypatch)
    nobody.listens([])
    assert nobody.addresses() == ()


@pytest.mark.parametrize(
    "told",
    [
        "127.0.0.1:5",
        "[::1]:5",
        "[fe80::1%eth0]:5",
        "0.0.0.0:5",
        "local",
        "",
        f"{OWN}:5",
        "a.name:5",
        "224.0.0.1:5",
    ],
)
async def test_what_others_saw_and_is_of_no_use(monkeypatch: pytest.MonkeyPatch, told: str) -> None:
    said = greeting(monkeypatch)
    said.seen_from(told)
    assert said.addresses() == (f"{OWN}:8080",)


async def test_only_the_latest_are_told_and_only_where_somebody_listens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = greeting(monkeypatch)
    for number in range(1, 10):
        said.seen_from(f"203.0.113.{number}:5")
        said.seen_from("203.0.113.1:6")  # again and again
    kept = [address.partition(":")[0] for address in said.addresses()[1:]]
    assert kept == ["203.0.113.7", "203.0.113.8", "203.0.113.9", "203.0.113.1"]
    near = greeting(monkeypatch, listen="127.0.0.1")
    near.seen_from("203.0.113.7:51000")
    assert near.addresses() == ("127.0.0.1:8080",)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://192.168.1.5:8080", "http://192.168.1.5:8080"),
        ("https://me.example", "https://me.example"),
        ("http://0.0.0.0:8080", f"http://{OWN}:8080"),
        ("https://[::]:8443", f"https://{OWN}:8443"),
        ("", ""),
    ],
)
async def test_the_url_leads_somewhere(monkeypatch: pytest.MonkeyPatch, url: str, told: str) -> None:
    said = greeting(monkeypatch)
    said.url = url
    assert said.entry(()).url == told


@pytest.mark.parametrize(
    ("action", "refused"), [("warn", set()), ("reject_major", {"2.0.0"}), ("reject_any", {"2.0.0", "1.2.4"})]
)
async def test_versions(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], action: str, refused: set[str]
) -> None:
    monkeypatch.setattr(llamesh, "__version__", "1.2.3")
    said = greeting(monkeypatch, cluster={"version_mismatch_action": action})
    for version in ("1.2.3", "1.2.4", "2.0.0"):
        other = Welcome("other", version, 1, "10.0.0.1:1")
        if version in refused:
            with pytest.raises(NotTrusted, match=f"me has version 1.2.3, node other has {version}.*{action}"):
                said.check_version(other)
        else:
            said.check_version(other)
            said.check_version(other)
    warned = capsys.readouterr().err
    assert warned.count("another version") == (action == "warn") + (action == "reject_major")


async def test_mentions_are_few(autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]) -> None:
    mentions = Mentions()
    assert mentions.due("a")
    assert not mentions.due("a")
    # Whoever has many names gets no more lines by it.
    assert sum(mentions.due(f"name {number}") for number in range(10_000)) == MOST_AT_ONCE - 1
    await trio.sleep(REPEAT_SECONDS)
    assert mentions.due("a")
    said = capsys.readouterr().err
    assert str(10_000 - MOST_AT_ONCE + 1) in said
    for minute in range(60):
        for number in range(1000):
            mentions.due(f"{minute} {number}")
        await trio.sleep(REPEAT_SECONDS)
    assert len(mentions._last) <= 1024
