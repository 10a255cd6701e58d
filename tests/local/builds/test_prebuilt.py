"""Releases without a compiler, from a local server that behaves and misbehaves."""

from __future__ import annotations

import hashlib
import io
import os
import platform
import re
import shutil
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from llamesh.core.backends import Machine
from llamesh.local.builds import prebuilt
from llamesh.local.builds.failure import BuildFailed
from llamesh.local.builds.maker import Made, Progress
from llamesh.local.builds.prebuilt import PINS, Archive, Pin, choose_pin, install
from llamesh.local.builds.record import build_behind
from llamesh.local.builds.store import Store
from tests.support.fake_project import FakeProject

TAG = "b1"


class Releases(BaseHTTPRequestHandler):
    """Serves `files`; a path in `redirects` leads elsewhere."""

    files: ClassVar[dict[str, bytes]] = {}
    redirects: ClassVar[dict[str, str]] = {}
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        """One file."""
        self.asked.append(self.path)
        if leads := self.redirects.get(self.path):
            self.send_response(302)
            self.send_header("location", leads)
            self.send_header("content-length", "0")
            self.end_headers()
            return
        body = self.files.get(self.path)
        self.send_response(404 if body is None else 200)
        self.send_header("content-length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *arguments: object) -> None:
        """Not a word."""


@pytest.fixture
def releases() -> Iterator[str]:
    Releases.files.clear()
    Releases.redirects.clear()
    Releases.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Releases) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def publish(name: str, **members: tuple[bytes, int]) -> Archive:
    """Put an archive on the server: members by path (`__` is a slash), with their modes."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for path, (content, mode) in members.items():
            info = tarfile.TarInfo(path.replace("__", "/").replace("_dot_", "."))
            info.size, info.mode = len(content), mode
            archive.addfile(info, io.BytesIO(content))
    data = packed.getvalue()
    Releases.files[f"/{TAG}/{name}"] = data
    return Archive(name, hashlib.sha256(data).hexdigest(), len(data))


def program(tmp_path: Path, **behaviour: str) -> dict[str, tuple[bytes, int]]:
    project = FakeProject(tmp_path / "made")
    project.write(**({"version": "released"} | behaviour))
    return {
        "llama-b1__llama-server": ((project.path / "server.sh").read_bytes(), 0o755),
        "llama-b1__behaviour_dot_json": ((project.path / "behaviour.json").read_bytes(), 0o644),
    }


def pin_of(*archives: Archive) -> Pin:
    return Pin(platform.system(), platform.machine(), "cpu", TAG, archives)


async def run(tmp_path: Path, releases: str, *archives: Archive) -> Made:
    store = Store(tmp_path / "builds", tmp_path / "bin" / "llama-server")
    return await install(
        store, os.environ, Progress(), backend="cpu", pins=[pin_of(*archives)], releases=releases
    )


async def refused(tmp_path: Path, releases: str, *archives: Archive) -> str:
    with pytest.raises(BuildFailed) as caught:
        await run(tmp_path, releases, *archives)
    assert build_behind(tmp_path / "bin" / "llama-server") is None
    assert [path.name for path in (tmp_path / "builds").iterdir()] == [".lock"]
    return str(caught.value)


async def test_it_is_fetched_checked_tested_and_live(tmp_path: Path, releases: str) -> None:
    main = publish("main.tar.gz", **program(tmp_path))
    more = publish("more.tar.gz", cudart__libx_dot_so=(b"a library", 0o755))
    # As the real place does: the file is elsewhere.
    Releases.files["/elsewhere"] = Releases.files.pop(f"/{TAG}/main.tar.gz")
    Releases.redirects[f"/{TAG}/main.tar.gz"] = "/elsewhere"
    made = await run(tmp_path, releases, main, more)
    assert made.changed
    assert (made.build.version, made.build.source) == ("released", "release b1 for cpu")
    assert made.build.key.startswith("b1-cpu-")
    binary = tmp_path / "bin" / "llama-server"
    assert build_behind(binary) == (made.build, binary.resolve())
    # Libraries of a second archive lie beside the program.
    assert (binary.resolve().parent / "libx.so").read_text() == "a library"
    asked = len(Releases.asked)
    again = await run(tmp_path, releases, main, more)
    assert (again.changed, len(Releases.asked)) == (False, asked)


async def test_another_content_is_refused(tmp_path: Path, releases: str) -> None:
    good = publish("main.tar.gz", **program(tmp_path))
    path = f"/{TAG}/main.tar.gz"
    data = Releases.files[path]
    Releases.files[path] = data[:-1] + bytes([data[-1] ^ 1])
    assert "its sha256 is" in await refused(tmp_path, releases, good)
    Releases.files[path] = data + b"x"
    assert "more than" in await refused(tmp_path, releases, good)
    Releases.files[path] = data[:-100]
    assert f"{len(data) - 100} of {len(data)} bytes" in await refused(tmp_path, releases, good)
    del Releases.files[path]
    assert "answers 404" in await refused(tmp_path, releases, good)


@pytest.mark.parametrize(
    "target", ["http://example.org/main.tar.gz", "file:///etc/passwd", "ftp://example.org/x"]
)
async def test_a_redirect_off_https_is_not_followed(tmp_path: Path, releases: str, target: str) -> None:
    good = publish("main.tar.gz", **program(tmp_path))
    Releases.redirects[f"/{TAG}/main.tar.gz"] = target
    message = await refused(tmp_path, releases, good)
    assert "isn't https" in message or "can't be read" in message


async def test_a_redirect_in_a_circle(tmp_path: Path, releases: str) -> None:
    good = publish("main.tar.gz", **program(tmp_path))
    Releases.redirects[f"/{TAG}/main.tar.gz"] = f"/{TAG}/main.tar.gz"
    assert "leads on and on" in await refused(tmp_path, releases, good)


async def test_nobody_there(tmp_path: Path) -> None:
    archive = Archive("main.tar.gz", "0" * 64, 10)
    assert "can't be read" in await refused(tmp_path, "http://127.0.0.1:1", archive)


async def test_a_release_that_does_not_work_here(tmp_path: Path, releases: str) -> None:
    broken = publish("main.tar.gz", **program(tmp_path, smoke="exit"))
    assert "before it could serve a tiny model" in await refused(tmp_path, releases, broken)


async def test_an_archive_without_the_program(tmp_path: Path, releases: str) -> None:
    other = publish("main.tar.gz", README=(b"hello", 0o644))
    assert "holds no llama-server" in await refused(tmp_path, releases, other)


async def test_no_room(tmp_path: Path, releases: str, monkeypatch: pytest.MonkeyPatch) -> None:
    good = publish("main.tar.gz", **program(tmp_path))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(prebuilt.shutil, "disk_usage", lambda path: usage._replace(free=100))
    assert "are needed" in await refused(tmp_path, releases, good)
    assert Releases.asked == []


def machine(*gpus: str, system: str = "Linux") -> Machine:
    return Machine(system, frozenset(gpus))


@pytest.mark.parametrize(
    ("backend", "there", "processor", "chosen"),
    [
        ("auto", machine(), "x86_64", "cpu"),
        ("auto", machine("nvidia"), "x86_64", "cuda"),
        ("auto", machine("amd"), "x86_64", "hip"),
        ("auto", machine("amd"), "aarch64", "vulkan"),
        ("auto", machine("intel"), "x86_64", "vulkan"),
        ("auto", machine("apple", system="Darwin"), "arm64", "metal"),
        ("auto", machine("apple", system="Darwin"), "x86_64", "cpu"),
        ("vulkan", machine(), "x86_64", "vulkan"),
    ],
)
def test_which_release_for_which_machine(backend: str, there: Machine, processor: str, chosen: str) -> None:
    assert choose_pin(backend, there, processor).backend == chosen


def test_where_there_is_none() -> None:
    with pytest.raises(BuildFailed, match=r"no release for metal on Linux x86_64 .*cpu, cuda, hip, vulkan"):
        choose_pin("metal", machine(), "x86_64")
    with pytest.raises(BuildFailed, match="none at all"):
        choose_pin("auto", machine(), "riscv64")


def test_the_pins_are_sound() -> None:
    assert len({(pin.system, pin.processor, pin.backend) for pin in PINS}) == len(PINS)
    for pin in PINS:
        for archive in pin.archives:
            assert re.fullmatch("[0-9a-f]{64}", archive.sha256)
            assert pin.tag in archive.name
            assert archive.size > 1 << 20
