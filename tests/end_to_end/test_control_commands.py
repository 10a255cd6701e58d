"""Commands that talk to a running node, as scripts call them: what they print, and their exit codes."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
import msgspec
import trio

from llamesh.web.state_schema import Document, Request
from tests.end_to_end.cookbooks import CHAT, chat, cookbook, profile, wait_document, wait_running
from tests.end_to_end.mesh.parts import fakes
from tests.end_to_end.test_https import tls_config
from tests.support.commands import call, run, say
from tests.support.fake import FAKE_LLAMA_SERVER, fake_profile_file
from tests.support.mesh import running_mesh
from tests.support.node import Node, clean_environment, running_node, wait_until


@asynccontextmanager
async def one_node(tmp_path: Path, config: object = None) -> AsyncIterator[Node]:
    """A node with models `m` and `broken`, and `slow`, which ends when the file `gate` is there."""
    slow = {"gate": str(tmp_path / "gate"), "gate_after": 1, "tokens": 3}
    recipes = fakes(
        tmp_path,
        m={"slots": 2},
        slow=slow,
        broken={"exit_at_start": {"code": 1, "lines": ["error: no such \x1b[31mflag"]}},
    )
    given = config if isinstance(config, dict) else None
    async with running_node(tmp_path / "node", recipes, given, binary_path=FAKE_LLAMA_SERVER) as node:
        yield node


@asynccontextmanager
async def streaming(node: Node, id: str) -> AsyncIterator[None]:  # noqa: A002
    """A request to `slow` that is being answered; what it got is of no interest."""

    async def ask() -> None:
        with suppress(httpx.HTTPError):
            await node.client.post(CHAT, json=chat("slow", stream=True), headers={"x-request-id": id})

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await wait_running(node)
        await wait_document(node, f"/api/v1/requests/{id}", lambda d: d.get("phase") == "decode")
        yield
        nursery.cancel_scope.cancel()


async def test_load_talk_explain_unload(tmp_path: Path) -> None:
    async with one_node(tmp_path) as node:
        assert await say(node, "prewarm", "m") == "node-a: m is loaded\n"
        table = await say(node, "status")
        assert table.startswith("llamesh ")
        assert re.search(r"^  node-a  ready .* self ", table, re.MULTILINE), table
        assert re.search(r"^  m +loaded: node-a ", table, re.MULTILINE), table
        assert re.search(r"^  m:default#1  node-a  ready +0/2 ", table, re.MULTILINE), table
        assert "\x1b" not in table
        document = json.loads(await say(node, "status", "--json"))
        msgspec.convert(document, Document)

        done = await call(node, "chat", "m", "hi", "--max-tokens", "4")
        assert (done.returncode, done.stdout) == (0, "t0 t1 t2 t3 \n")
        assert re.search(r"^4 tokens, [\d.]+ tokens/s, the first after [\d.]+ s, node-a$", done.stderr)
        quiet = await call(node, "chat", "m", "-q", stdin="a question on stdin\n")
        assert (quiet.stdout, quiet.stderr) == ("t0 t1 t2 t3 t4 \n", "")

        told = await call(node, "why")
        assert told.stderr == "No request failed; this is the last one.\n"
        assert "outcome  answered (200)" in told.stdout
        assert "way      node-a, instance m:default#1" in told.stdout
        record = json.loads(await say(node, "why", "--last", "--json"))
        records = record.pop("records")
        assert msgspec.convert(record, Request).id == records[0]["id"]
        assert record["id"] in await say(node, "why", record["id"])

        lines = (await say(node, "logs", "m", "-n", "3")).splitlines()
        assert (len(lines), "request POST /v1/chat/completions" in lines) == (3, True)
        everything = (await say(node, "logs")).splitlines()
        assert everything[0] == "==> m:default#1 <=="
        assert len(everything) > 4

        assert await say(node, "unload", "m") == "node-a: unloading m:default#1\n"
        await wait_document(node, "/running", lambda d: d["running"] == [])
        assert await say(node, "unload", "--all") == "node-a: nothing was loaded\n"


async def test_what_goes_wrong_is_told(tmp_path: Path) -> None:
    async with one_node(tmp_path) as node:
        for words, reason in (
            (["prewarm", "slo"], "knows no model 'slo'; did you mean slow?"),
            (["chat", "nobody", "hi"], "`llamesh status` shows which there are"),
            (["prewarm", "broken"], "its last words: error: no such"),
            (["prewarm", "m", "--node", "nobody"], "there is no node 'nobody'"),
            (["cancel", "nothing"], "no request 'nothing' is under way"),
            (["why", "nothing"], "no node knows a request 'nothing'"),
            (["logs", "nobody"], "knows no model 'nobody'"),
            (["logs", "--node", "nobody"], "node 'nobody' isn't in the mesh"),
        ):
            done = await call(node, *words)
            assert (done.returncode, done.stdout) == (1, ""), done
            assert reason in done.stderr
            assert "\x1b" not in done.stderr
        failed = await call(node, "chat", "broken", "hi")
        assert failed.returncode == 1
        [hint] = re.findall(r"`(llamesh why \S+)` may tell more", failed.stderr)
        explained = await say(node, *hint.split()[1:])
        assert "outcome  failed: spawn_failures_exhausted (503)" in explained
        assert explained == await say(node, "why")
        assert "error: no such" in await say(node, "logs", "broken")
        assert "broken:default failed to start" in await say(node, "status")


async def test_draining_waits_and_has_a_limit(tmp_path: Path) -> None:
    async with one_node(tmp_path) as node:
        async with streaming(node, "r1"):
            done = await call(node, "drain", "--wait", "--timeout", "0.1")
            assert (done.returncode, done.stdout) == (4, "")
            assert "1 request is still left on node-a after 0.1 s; it goes on draining" in done.stderr
            done = await call(node, "drain", "--wait", "--timeout", "0", "--node", "node-a")
            assert done.returncode == 4
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_let_go, node, tmp_path / "gate")
                assert await say(node, "drain", "--wait", "--timeout", "60") == "node-a: drained\n"
        assert (await node.client.get("/readyz")).status_code == 503
        assert "node-a: ready" in await say(node, "undrain")
        assert (await node.client.get("/readyz")).status_code == 200


async def _let_go(node: Node, gate: Path) -> None:
    """Have the request end once the command waits for it."""
    await wait_until(
        lambda: len([1 for entry in node.find_events("drained on request")]) == 3, "nobody drains it"
    )
    gate.touch()


async def test_cancelling(tmp_path: Path) -> None:
    async with one_node(tmp_path) as node, streaming(node, "to-go/1"):
        assert await say(node, "cancel", "to-go/1") == "node-a: cancelled to-go/1\n"
        await wait_running(node, 0)
        assert "failed: cancelled_by_operator" in await say(node, "why", "to-go/1")


async def test_nobody_there(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    environment = clean_environment({"LLAMESH_LISTEN_ADDR": f"127.0.0.1:{port}"})
    for words in (
        ["status"],
        ["chat", "m", "hi"],
        ["drain", "--wait"],
        ["why"],
        ["logs", "m", "-f"],
    ):
        done = await run(tmp_path, environment, *words)
        assert (done.returncode, done.stdout) == (3, ""), words
        assert f"no node answers at 127.0.0.1:{port}: Connection refused; is it running?" in done.stderr
    done = await run(tmp_path, clean_environment({"LLAMESH_LISTEN_ADDR": "127.0.0.1:0"}), "status")
    assert (done.returncode, "set LLAMESH_LISTEN_ADDR" in done.stderr) == (1, True)
    done = await run(tmp_path, clean_environment({"LLAMESH_MAX_HOPS": "many"}), "status")
    assert (done.returncode, "max_hops" in done.stderr.lower()) == (1, True)


async def test_keys_and_certificates(tmp_path: Path) -> None:
    auth = {"enabled": True, "allowed_keys": ["user-key"], "admin_keys": ["root-key"]}
    async with one_node(tmp_path, {"auth": auth, **tls_config(tmp_path)}) as node:
        # Both the key and the certificate are in the configuration.
        assert "node-a  ready" in await say(node, "status", LLAMESH_API_KEY="user-key")
        assert await say(node, "undrain") == "node-a: ready\n"
        refused = await call(node, "undrain", LLAMESH_API_KEY="user-key")
        assert (refused.returncode, "(403)" in refused.stderr) == (1, True)
        wrong = await call(node, "status", LLAMESH_API_KEY="wrong-key")
        assert (wrong.returncode, "this key isn't known there" in wrong.stderr) == (1, True)
        # Of another address nothing in it counts.
        url = f"https://127.0.0.1:{node.port}"
        stranger = await call(node, "status", "--url", url)
        assert (stranger.returncode, "a certificate that isn't trusted" in stranger.stderr) == (3, True)
        plain = await call(node, "status", "--url", url.replace("https", "http"))
        assert plain.returncode in (1, 3)
        for done in (refused, wrong, stranger, plain):
            assert not re.search("(user|root|wrong)-key", done.stdout + done.stderr)


async def test_a_mesh(tmp_path: Path) -> None:
    cookbooks = {
        "node-a": fakes(tmp_path / "a", here={}),
        "node-b": fakes(tmp_path / "b", there={"lines": ["words of b"]}),
    }
    async with running_mesh(tmp_path, cookbooks, binary_path=FAKE_LLAMA_SERVER) as mesh:
        await mesh.wait_joined()
        node = mesh["node-a"].node
        await wait_document(node, "/api/v1/state", lambda d: all(n["fresh"] or n["self"] for n in d["nodes"]))
        assert await say(node, "prewarm", "there") == "node-b: there is loaded\n"
        table = await say(node, "status")
        assert re.search(r"^  node-b  ready ", table, re.MULTILINE), table
        assert re.search(r"^  there +loaded: node-b ", table, re.MULTILINE), table
        assert await say(node, "chat", "there", "hi", "-q") == "t0 t1 t2 t3 t4 \n"
        told = await say(node, "why", "--last")
        assert "way      node-a > node-b, instance there:default#1" in told
        assert re.search(r"^  node-b +\d", told[told.index("Choice") :], re.MULTILINE), told
        assert "words of b" in await say(node, "logs", "there", "--node", "node-b")
        found = await call(node, "logs", "there")
        assert "words of b" in found.stdout
        assert found.stderr == "llamesh: it runs at node node-b\n"
        again = await say(node, "prewarm", "there", "--node", "node-b", "--no-wait")
        assert again == "node-b: there is loaded\n"
        assert (await call(node, "drain", "--wait", "--timeout", "5", "--node", "node-a")).returncode == 0
        # Names for the shell come from the whole mesh.
        words = {"_LLAMESH_COMPLETE": "bash_complete", "COMP_CWORD": "2"}
        models = await say(node, COMP_WORDS="llamesh chat ", **words)
        assert {line.partition(",")[2] for line in models.splitlines()} == {"here", "there"}
        nodes = await say(node, COMP_WORDS="llamesh drain --node ", **{**words, "COMP_CWORD": "3"})
        assert {line.partition(",")[2] for line in nodes.splitlines()} == {"node-a", "node-b"}


async def test_names_for_the_shell_without_a_node(tmp_path: Path) -> None:
    """They come from the cookbook; and where there is none, nothing is said."""
    words = {"_LLAMESH_COMPLETE": "bash_complete", "COMP_WORDS": "llamesh chat t", "COMP_CWORD": "2"}
    environment = clean_environment({"LLAMESH_LISTEN_ADDR": "127.0.0.1:1", **words})
    done = await run(tmp_path, environment)
    assert (done.stdout.strip(), done.stderr) == ("", "")
    recipes = cookbook(tiny=profile(fake_profile_file(tmp_path, "x")), big=profile(tmp_path / "y"))
    (tmp_path / "cookbook.yaml").write_text(json.dumps(recipes))
    done = await run(tmp_path, environment)
    assert (done.stdout, done.stderr) == ("plain,tiny\n", "")


async def test_a_node_takes_no_notice_of_what_is_for_commands(tmp_path: Path) -> None:
    recipes = cookbook(m=profile(fake_profile_file(tmp_path, "m")))
    env = {"LLAMESH_URL": "http://192.0.2.7:8080", "LLAMESH_API_KEY": "x"}
    async with running_node(tmp_path / "node", recipes, binary_path=FAKE_LLAMA_SERVER, env=env) as node:
        assert (await node.client.get("/readyz")).status_code == 200
