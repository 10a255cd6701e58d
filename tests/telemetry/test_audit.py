"""The audit file: what its lines say, that nothing forges one, and what happens when the disk says no."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamesh.telemetry import audit as module
from llamesh.telemetry.audit import Audit
from llamesh.telemetry.log_files import RotatingFile
from llamesh.telemetry.recorder import Record

PATIENCE = 20.0

COMMON = ["time", "what", "node", "request_id", "key", "address", "origin", "path"]
REQUEST = [
    *[*COMMON, "model", "served_by", "status", "outcome", "reason"],
    *["prompt_tokens", "cached_tokens", "completion_tokens", "ms"],
]
ACT = [*COMMON, "target", "model", "about", "status", "outcome", "reason"]


class Disk(RotatingFile):
    """A file whose disk the test fills, empties and holds up."""

    def __init__(self, directory: Path) -> None:
        self.full = False
        self.holds = threading.Event()
        self.holds.set()
        super().__init__(directory, "audit.jsonl", keep=None, compress=False, mode=0o600)

    def write(self, data: bytes) -> None:
        self.holds.wait(PATIENCE)
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().write(data)


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


@pytest.fixture
def audit(disk: Disk) -> Iterator[Audit]:
    with Audit(disk, "node-a") as running:
        yield running
        disk.full = False
        disk.holds.set()


def wait(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.005)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def wait_lines(disk: Disk, count: int) -> list[dict[str, Any]]:
    wait(lambda: len(lines(disk.path)) >= count, f"{count} lines")
    return lines(disk.path)


def record(**fields: Any) -> Record:
    return Record(
        **{"id": "r1", "path": b"/v1/chat/completions", "began": 0.0, "status": 200, "ms": 12.345, **fields}
    )


def test_a_line_for_a_request(audit: Audit, disk: Disk) -> None:
    told = record(
        key="alice",
        model="m:default",
        node="node-b",
        prompt_tokens=9,
        cached_tokens=4,
        tokens=7,
        message="secret",
    )
    audit.request(told, "192.0.2.7")
    audit.request(record(status=400, origin="node-c", via=("node-c",)), "::1")
    audit.request(record(status=0, error="cancelled", ms=None), "")
    audit.request(record(status=429, error="rate_limit_exceeded", message="too many"), "")
    audit.request(record(status=503, error="spawn_failures_exhausted", message="its last words"), "")
    first, passed, left, limited, failed = wait_lines(disk, 5)
    assert list(first) == REQUEST
    assert first.pop("time").endswith("Z")
    assert first == {
        "what": "request", "node": "node-a", "request_id": "r1", "key": "alice", "address": "192.0.2.7",
        "origin": "", "path": "/v1/chat/completions", "model": "m:default", "served_by": "node-b",
        "status": 200, "outcome": "ok", "reason": "",
        "prompt_tokens": 9, "cached_tokens": 4, "completion_tokens": 7, "ms": 12.3,
    }  # fmt: skip
    assert (passed["outcome"], passed["origin"]) == ("upstream_status", "node-c")
    assert (left["outcome"], left["ms"]) == ("cancelled", None)
    assert limited["reason"] == "too many"
    assert failed["reason"] == ""


def test_a_line_for_an_act(audit: Audit, disk: Disk) -> None:
    audit.act("boss", "127.0.0.1", "/admin/unload", "node-b", "m", (200, "ok", ""), request_id="r9")
    audit.act("", "192.0.2.7", "/admin/drain", "", "", (403, "forbidden", "it may not"), origin="node-c")
    audit.act("", "", "/admin/cancel", "", "", (500, "internal_error", "what a child said"), about="r1")
    done, refused, broke = wait_lines(disk, 3)
    assert list(done) == ACT
    assert (done["what"], done["target"], done["model"], done["outcome"]) == ("admin", "node-b", "m", "ok")
    assert (refused["reason"], refused["origin"]) == ("it may not", "node-c")
    assert (broke["reason"], broke["about"]) == ("", "r1")


FORGED = 'x\n{"what": "admin", "key": "boss"}\r\n\u2028\u2029\x85\x7f\x00\x1b[31m\ud800"\\'


def test_nothing_that_a_client_sends_makes_a_line(audit: Audit, disk: Disk) -> None:
    path = b'/v1/chat/completions\n{"what": "admin"}\r\xff\x00'
    audit.request(record(id=FORGED, path=path, model=FORGED, origin=FORGED), FORGED)
    audit.refused(FORGED, "", FORGED, "", path, (400, FORGED, FORGED))
    audit.act(FORGED, FORGED, FORGED, FORGED, FORGED, (200, FORGED, FORGED), about=FORGED)
    wait_lines(disk, 3)
    text = disk.path.read_text()
    assert len(text.splitlines()) == 3, "not even for a reader that ends lines at U+2028"
    assert text.replace("\n", "").isprintable()
    assert [json.loads(line)["what"] for line in text.splitlines()] == ["request", "request", "admin"]


@given(st.text(), st.binary())
def test_any_text_is_one_line(text: str, path: bytes) -> None:
    line = module.RequestLine(
        time="t", what="request", node="n", request_id=module.cut(text), key="", address="", origin="",
        path=module.cut(path), model=text, served_by="", status=0, outcome="", reason="",
    )  # fmt: skip
    data = module.encoded(line)
    assert data.endswith(b"\n")
    assert len(data.decode().splitlines()) == 1
    assert json.loads(data)["model"] == text
    assert len(json.loads(data)["request_id"]) <= 300


def test_long_texts_are_cut(audit: Audit, disk: Disk) -> None:
    audit.act("", "", "/" + "x" * 100_000, "y" * 100_000, "z" * 100_000, (400, "e", "w" * 100_000))
    wait_lines(disk, 1)
    assert disk.path.stat().st_size < 2000


def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "audit.jsonl"
    path.parent.mkdir()
    path.write_text("{}\n")
    path.chmod(0o644)
    with Audit(Disk(path.parent), "n") as audit:
        audit.act("", "", "/x", "", "", (200, "ok", ""))
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(lines(path)) == 2


def test_it_is_on_the_disk_when_it_ends(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    with Audit(disk, "n") as audit:
        for number in range(5000):
            audit.refused(str(number), "", "", "", b"/v1/models", (400, "e", ""))
    assert [line["request_id"] for line in lines(disk.path)] == [str(number) for number in range(5000)]


def test_strangers_without_end_get_a_count(audit: Audit, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(module.time, "time", lambda: now)
    for number in range(200):
        audit.refused(str(number), "", "", "", b"/v1/models", (401, "authentication_error", "no key"))
        audit.act("", "", "/admin/drain", "", "", (401, "authentication_error", "no key"))
    audit.refused("known", "bob", "", "", b"/v1/models", (403, "forbidden", "not for bob"))
    wait_lines(disk, 21)
    now = 1001.5
    found = wait_lines(disk, 22)
    assert [line["what"] for line in found].count("unlisted") == 1
    assert found[-1] | {"time": ""} == {"time": "", "what": "unlisted", "node": "node-a", "count": 380}
    assert any(line.get("request_id") == "known" for line in found)


# Troubles.


def test_a_full_disk_holds_nobody_up_and_loses_nothing_at_first(
    audit: Audit, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RETRY_SECONDS", 0.02)
    disk.full = True
    audit.act("", "", "/1", "", "", (200, "ok", ""))
    wait(lambda: "No space left" in audit.trouble(), "trouble")
    assert "no line is lost" in audit.trouble()
    assert str(disk.path.parent) not in audit.trouble()
    audit.act("", "", "/2", "", "", (200, "ok", ""))
    disk.full = False
    assert [line["path"] for line in wait_lines(disk, 2)] == ["/1", "/2"]
    wait(lambda: not audit.trouble(), "no more trouble")


def test_what_has_no_room_is_counted_and_told_in_the_file(
    audit: Audit, disk: Disk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_RETRY_SECONDS", 0.02)
    monkeypatch.setattr(module, "_QUEUE_LINES", 10)
    disk.full = True
    for number in range(25):
        audit.act("", "", f"/{number}", "", "", (200, "ok", ""))
    assert audit.lost == 15
    wait(lambda: "No space left" in audit.trouble(), "trouble")
    assert "15 lines are lost" in audit.trouble()
    disk.full = False
    found = wait_lines(disk, 11)
    assert [line.get("path") for line in found[:10]] == [f"/{number}" for number in range(10)]
    assert (found[10]["what"], found[10]["count"]) == ("lost", 15)
    wait(lambda: "lacks lines: 15" in audit.trouble(), "it is remembered for a while")
    told = capsys.readouterr().err
    assert told.count("lines of the audit file are lost") == 1
    assert told.count("the audit file can't be written") == 1


def test_a_disk_that_hangs_is_noticed(audit: Audit, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SLOW_SECONDS", 0.05)
    disk.holds.clear()
    audit.act("", "", "/x", "", "", (200, "ok", ""))
    wait(lambda: "doesn't answer" in audit.trouble(), "trouble")
    disk.holds.set()
    wait(lambda: not audit.trouble(), "no more trouble")


def test_a_disk_that_is_full_at_the_end_is_given_up(
    disk: Disk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RETRY_SECONDS", 0.02)
    with Audit(disk, "n") as audit:
        disk.full = True
        audit.act("", "", "/x", "", "", (200, "ok", ""))
    assert audit.lost == 1
    assert "couldn't be written to its end" in capsys.readouterr().err


def test_a_file_that_cant_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    class Told:
        directory, filename, max_file_mb, keep_days, compression = tmp_path / "file", "a", 1, 1, True

    with pytest.raises(OSError, match=r"exists|directory"):
        Audit.open(Told(), "n")


# What the rotating file does for it.

DAY = 86_400.0


def test_old_files_go_by_age(tmp_path: Path) -> None:
    now = time.time()

    def stamp(days: float) -> str:
        return time.strftime("%Y%m%dT%H%M%S", time.gmtime(now - days * DAY))

    names = [f"audit.jsonl.{stamp(days)}.000{end}" for days in (9, 7.01, 6.9, 1) for end in ("", ".gz")]
    for name in names:
        (tmp_path / name).write_bytes(b"{}\n")
    stranger = tmp_path / f"proxy.log.{stamp(99)}.000"
    stranger.write_bytes(b"")
    file = RotatingFile(tmp_path, "audit.jsonl", keep=None, compress=False, keep_days=7)
    file.close(timeout=30)
    assert sorted(path.name for path in file.old_files()) == sorted(names[4:])
    assert stranger.exists()


def test_an_idle_file_is_put_away_when_its_day_is_over(tmp_path: Path) -> None:
    now = time.time()
    file = RotatingFile(tmp_path, "a", keep=None, compress=True, keep_days=1, mode=0o600, clock=lambda: now)
    file.write(b"1\n")
    file.turn()
    assert file.old_files() == []
    now += DAY
    file.turn()
    file.close(timeout=30)
    [old] = file.old_files()
    assert old.suffix == ".gz"
    assert old.stat().st_mode & 0o777 == 0o600
    now += 3 * DAY
    file = RotatingFile(tmp_path, "a", keep=None, compress=True, keep_days=1, mode=0o600, clock=lambda: now)
    file.close(timeout=30)
    assert file.old_files() == []


def test_half_a_write_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = RotatingFile(tmp_path, "a", keep=None, compress=False)
    file.write(b"whole\n")
    write = os.write
    tries = iter([3, None])

    def half(fd: int, data: bytes) -> int:
        size = next(tries)
        if size is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, bytes(data[:size]))

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", half)
        with pytest.raises(OSError, match="No space"):
            file.write(b"another\n")
    file.write(b"another\n")
    file.close()
    assert file.path.read_bytes() == b"whole\nanother\n"


def test_a_line_that_was_cut_by_a_power_cut_spoils_no_other(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b'{"whole": 1}\n{"hal')
    file = RotatingFile(tmp_path, "a", keep=None, compress=False)
    file.write(b"{}\n")
    file.close()
    assert file.path.read_bytes() == b'{"whole": 1}\n{"hal\n{}\n'
