"""The control client against a server that answers what the test says: words, codes, and no key anywhere."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from llamesh.cli import command_line
from llamesh.commands.shared.client import Client, Place, events_in, path_of
from llamesh.commands.shared.failed import Refused, TimedOut, Unreached

KEY = "marker-of-a-key"


class Server(ThreadingHTTPServer):
    """Answers everything with `status` and `document`; `asked` is what came."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.document, self.headers = 200, {}, dict[str, str]()
        self.by_path: dict[str, Any] = {}
        self.asked: list[tuple[str, str, dict[str, str], Any]] = []
        self.silent = threading.Event()
        self.silent.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def client(self, key: str | None = None, seconds: float = 10) -> Client:
        return Client(Place("127.0.0.1", self.server_port), key, seconds)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def answer(self) -> None:
        size = int(self.headers.get("content-length") or 0)
        body = json.loads(self.rfile.read(size)) if size else None
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.asked.append((self.command, self.path, headers, body))
        self.server.silent.wait(10)
        document = self.server.by_path.get(self.path, self.server.document)
        data = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.send_response(200 if self.path in self.server.by_path else self.server.status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        with suppress(BrokenPipeError):
            self.wfile.write(data)

    do_GET = do_POST = answer  # noqa: N815

    def log_message(self, *words: object) -> None:
        """Says nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    with running() as server:
        yield server


@contextmanager
def running() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.silent.set()
            server.shutdown()
            thread.join()


def call(server: Server, *words: str, stdin: str = "", **environment: str | None) -> Result:
    """A command with this server as its node."""
    env = {"LLAMESH_URL": server.url, "LLAMESH_API_KEY": None, **environment}
    return CliRunner().invoke(command_line(lambda *given: 99), words, env=env, input=stdin)


@pytest.mark.parametrize(
    ("status", "key", "after", "hint"),
    [
        (401, None, "", "set LLAMESH_API_KEY, or use --key-file"),
        (401, KEY, "", "this key isn't known there: look at LLAMESH_API_KEY or --key-file"),
        (403, KEY, "", "a key that may administer comes by LLAMESH_API_KEY or --key-file"),
        (404, KEY, "", ""),
        (429, KEY, "17", "; try again in 17 s"),
        (503, KEY, "30", "; try again in 30 s"),
        (503, KEY, "soon", "; try again later"),
    ],
)
def test_what_a_refusal_means(server: Server, status: int, key: str | None, after: str, hint: str) -> None:
    server.status, server.headers = status, {"retry-after": after}
    server.document = {"error": {"message": "not\x1b[31m so", "type": "some_type"}}
    with pytest.raises(Refused) as caught:
        server.client(key).post("/admin/drain", {})
    error = caught.value
    assert (error.status, error.kind, error.exit_code) == (status, "some_type", 1)
    assert f"({status}): not\N{REPLACEMENT CHARACTER}[31m so" in error.message
    assert error.message.endswith(hint)
    assert KEY not in error.message


def test_a_key_is_sent_and_never_shown(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(f"{KEY}\n")
    ways = [
        call(server, "undrain", LLAMESH_API_KEY=KEY),
        call(server, "undrain", "--key-file", str(path)),
        call(server, "undrain", "--key-file", str(path), LLAMESH_API_KEY="another"),
        CliRunner().invoke(
            command_line(lambda *given: 99),
            ["undrain", "--key-file", "-", "--url", server.url],
            input=f"{KEY}\n",
        ),
    ]
    assert [way.exit_code for way in ways] == [0, 0, 0, 0]
    assert [headers["authorization"] for _, _, headers, _ in server.asked] == [f"Bearer {KEY}"] * 4
    assert all(KEY not in way.output for way in ways)


def test_a_key_that_cant_be_sent(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(f"{KEY}\nsecond line\n")
    for done, words in (
        (call(server, "undrain", "--key-file", str(path)), "holds what can't be sent as a key"),
        (call(server, "undrain", LLAMESH_API_KEY=f"{KEY}\u00e4"), "LLAMESH_API_KEY holds what can't be sent"),
        (call(server, "undrain", "--key-file", str(tmp_path / "none")), "can't be read: No such file"),
        (call(server, "undrain", "--key-file", "/dev/null"), "is empty"),
    ):
        assert done.exit_code == 1
        assert words in done.output
        assert KEY not in done.output
    assert server.asked == []


def test_the_key_of_the_configuration_isnt_shown_to_another_node(server: Server, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        f"listen_addr: 127.0.0.1:{server.server_port}\nauth: {{enabled: true, allowed_keys: [{KEY}]}}\n"
    )
    assert call(server, "undrain", "--config", str(config), LLAMESH_URL=None).exit_code == 0
    assert call(server, "undrain", "--config", str(config)).exit_code == 0
    first, second = (headers for _, _, headers, _ in server.asked)
    assert first["authorization"] == f"Bearer {KEY}"
    assert "authorization" not in second


@pytest.mark.parametrize(
    ("words", "path", "body"),
    [
        (["unload", "m"], "/admin/unload", {"model": "m"}),
        (["unload", "--all"], "/admin/unload", {}),
        (["unload", "--all", "--node", "b"], "/admin/unload", {"node": "b"}),
        (["unload", "m", "--node", "b"], "/admin/unload", {"model": "m", "node": "b"}),
        (["drain", "--node", "b"], "/admin/drain", {"node": "b"}),
        (["undrain"], "/admin/undrain", {}),
        (["pause", "1h30m", "--node", "b"], "/admin/pause", {"seconds": 5400, "node": "b"}),
        (["pause"], "/admin/pause", {}),
        (["pause", "off"], "/admin/pause", {"seconds": 0}),
        (["prewarm", "m", "--no-wait"], "/admin/prewarm", {"model": "m", "wait": False}),
        (["prewarm", "m", "--node", "b"], "/admin/prewarm", {"model": "m", "node": "b"}),
        (["cancel", "a/b#1"], "/admin/cancel", {"request_id": "a/b#1"}),
    ],
)
def test_what_an_act_sends(server: Server, words: list[str], path: str, body: dict[str, Any]) -> None:
    assert call(server, *words).exit_code == 0
    [(method, asked, _, sent)] = server.asked
    assert (method, asked, sent) == ("POST", path, body)


def test_unloading_says_where_it_is(server: Server) -> None:
    server.document = {"unloading": [], "node": "a"}
    assert call(server, "unload", "m").output == "a: nothing was loaded\n"
    server.document = {"unloading": [], "loaded_on": ["b", "c"]}
    assert call(server, "unload", "m", "--node", "a").output.endswith("loaded; it is on b, c: see --node\n")
    server.document = {"unloading": ["m:default#1", "m:default#2"], "node": "a"}
    assert call(server, "unload", "m").output == "a: unloading m:default#1, m:default#2\n"


def test_an_unknown_model_is_told_with_the_near_ones(server: Server) -> None:
    server.status = 404
    server.document = {"error": {"message": "no model 'quen3'", "type": "model_not_found"}}
    server.by_path["/v1/models"] = {"data": [{"id": "qwen3"}, {"id": "gemma"}]}
    done = call(server, "prewarm", "quen3")
    assert (done.exit_code, "did you mean qwen3?" in done.output) == (1, True)
    done = call(server, "prewarm", "xyz")
    assert (done.exit_code, "`llamesh status` shows which there are" in done.output) == (1, True)


def test_nobody_there() -> None:
    with running() as server:
        client = server.client()
    with pytest.raises(Unreached, match=r"no node answers at 127\.0\.0\.1:\d+: Connection refused; is it"):
        client.get("/")
    with pytest.raises(Unreached, match=r"no node answers at a\.\.b:1: "):
        Client(Place("a..b", 1), None).get("/")


def test_somebody_else_is_there(server: Server) -> None:
    server.document = b"<html>"
    with pytest.raises(Unreached, match="isn't a llamesh node"):
        server.client().get("/")
    server.status = 500
    with pytest.raises(Refused, match=r"refused \(500\): it isn't a llamesh node"):
        server.client().get("/")


def test_an_answer_that_doesnt_come(server: Server) -> None:
    server.silent.clear()
    with pytest.raises(TimedOut, match="doesn't answer within 1 seconds"):
        server.client(seconds=1).get("/")


def test_an_address_with_a_path(server: Server) -> None:
    call(server, "undrain", "--url", f"{server.url}/behind/a/proxy/")
    call(server, "undrain", "--url", server.url.removeprefix("http://"))
    assert [path for _, path, _, _ in server.asked] == ["/behind/a/proxy/admin/undrain", "/admin/undrain"]


def test_names_in_paths() -> None:
    assert path_of("/v1/models", "o/n:Q4 #1?") == "/v1/models/o/n%3AQ4%20%231%3F"


def test_events() -> None:
    lines = ["event: a", "id: 7", "data: 1", "data: 2", "", ": waits", "", "data:3", "", "data: not ended"]
    assert list(events_in(iter(lines))) == [("a", "1\n2", "7"), (":", "waits", "7"), ("", "3", "7")]
