"""The zeroconf package behind `Mdns`: strangers' records, and its own refusals, all on loopback."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import zeroconf
from zeroconf import ServiceInfo, Zeroconf

from llamesh.mesh.mdns import Mdns, MdnsFailed
from llamesh.mesh.sighting import read_record

HERE = ["127.0.0.1"]
PATIENCE_SECONDS = 30.0


@pytest.fixture
def service() -> str:
    return f"_t{secrets.token_hex(5)}._tcp.local"


class Names:
    """What `notice` was told."""

    def __init__(self) -> None:
        self.heard: dict[str, bool] = {}
        self._condition = threading.Condition()

    def __call__(self, name: str, gone: bool) -> None:
        with self._condition:
            self.heard[name] = gone
            self._condition.notify_all()

    def wait_for(self, name: str, gone: bool = False) -> None:
        with self._condition:
            told = self._condition.wait_for(lambda: self.heard.get(name) == gone, PATIENCE_SECONDS)
            assert told, f"no {name}, only {self.heard}"


@pytest.fixture
def stranger() -> Iterator[Zeroconf]:
    zc = Zeroconf(interfaces=HERE)
    yield zc
    zc.close()


def test_strangers_are_read_as_they_are(service: str, stranger: Zeroconf) -> None:
    kind, names = service + ".", Names()
    mdns = Mdns(service, "box", 4000, {"id": "box"})
    mdns.open(HERE, names)
    try:
        for label, properties in {
            "good": {"id": "good", "wire": "1"},
            "Ünïcode. with dots": {"id": "odd"},
            "no id": {"x": "y"},
            "bytes": {"id": b"\xff\xfe"},
        }.items():
            info = ServiceInfo(
                kind,
                f"{label}.{kind}",
                port=4001,
                properties=properties,
                server=f"{secrets.token_hex(4)}.local.",
                parsed_addresses=["127.0.0.1", "fe80::1"],
            )
            stranger.register_service(info)
            names.wait_for(info.name)
            record = mdns.look(info.name, ask=False)
            assert record is not None
            assert (record.port, set(record.addresses)) == (4001, {"127.0.0.1", "fe80::1"})
            node_id = properties.get("id")
            if isinstance(node_id, str):
                assert read_record(record, loopback=True).node_id == node_id
            else:
                with pytest.raises(ValueError, match=r"."):
                    read_record(record, loopback=True)
    finally:
        mdns.close()


@pytest.mark.parametrize(
    "name", ["", ".", "x", "\x00.{}", "{}", "a" * 64 + ".{}", "x" * 5000 + ".{}", "é\ud800.{}"]
)
def test_a_name_that_cannot_be_is_nobody(service: str, name: str) -> None:
    mdns = Mdns(service, "box", 4000, {"id": "box"})
    mdns.open(HERE, Names())
    try:
        assert mdns.look(name.format(service + "."), ask=False) is None
    finally:
        mdns.close()


def test_nobody_answers(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamesh.mesh.mdns._ASK_MS", 10)
    mdns = Mdns(service, "box", 4000, {"id": "box"})
    mdns.open(HERE, Names())
    try:
        assert mdns.look(f"nobody.{service}.", ask=True) is None
    finally:
        mdns.close()


def test_a_name_fits_whatever_the_node_is_called(service: str, stranger: Zeroconf) -> None:
    node_id = "_." * 31 + "-x"
    assert len(node_id) == 64
    mdns, names = Mdns(service, node_id, 4000, {"id": node_id}), Names()
    mdns.open(HERE, names)
    try:
        mdns.announce(["127.0.0.1", "fd00::1", "fe80::1%lo"])
        assert len(mdns.name.removesuffix(f".{service}.")) <= 60
        info = stranger.get_service_info(service + ".", mdns.name)
        assert info is not None
        assert set(info.parsed_addresses()) == {"127.0.0.1", "fd00::1", "fe80::1"}
        assert info.decoded_properties["id"] == node_id
        assert mdns.look(mdns.name, ask=True) is None  # itself
    finally:
        mdns.close()


def test_the_name_is_the_same_after_a_restart_and_another_for_another(service: str) -> None:
    def name(node_id: str, port: int, **txt: str) -> str:
        return Mdns(service, node_id, port, txt).name

    assert name("box", 1, key="a") == name("box", 1, key="a")
    assert (
        len({name("box", 1, key="a"), name("box", 2, key="a"), name("box", 1, key="b"), name("bax", 1)}) == 4
    )


def test_closed_it_works_no_more(service: str) -> None:
    mdns = Mdns(service, "box", 4000, {"id": "box"})
    mdns.close()
    with pytest.raises(MdnsFailed):
        mdns.announce(HERE)
    before = threading.active_count()
    mdns.open(HERE, Names())  # in a thread that was slow: it leaves nothing behind
    assert threading.active_count() == before
    mdns.close()


def test_ipv6_that_refuses_leaves_ipv4(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[list[str | int]] = []

    def picky(*, interfaces: list[str | int]) -> Zeroconf:
        tried.append(interfaces)
        if 7 in interfaces:
            raise OSError(99, "Cannot assign requested address")
        return Zeroconf(interfaces=interfaces)

    monkeypatch.setattr(zeroconf, "Zeroconf", picky)
    mdns = Mdns(service, "box", 4000, {"id": "box"})
    mdns.open(["127.0.0.1", 7], Names())
    mdns.close()
    assert tried == [["127.0.0.1", 7], ["127.0.0.1"]]
    with pytest.raises(OSError, match="assign"):
        Mdns(service, "box", 4000, {"id": "box"}).open([7], Names())


def test_no_interface_takes_multicast(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def deaf(**options: Any) -> Zeroconf:
        found = Zeroconf(**options)
        found.engine.senders.clear()
        return found

    monkeypatch.setattr(zeroconf, "Zeroconf", deaf)
    mdns = Mdns(service, "box", 4000, {"id": "box"})
    with pytest.raises(MdnsFailed, match="multicast"):
        mdns.open(HERE, Names())
    mdns.close()
