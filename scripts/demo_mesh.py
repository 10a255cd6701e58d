"""The mesh of `scripts/demo --mesh`: three nodes on this machine, one model, one crash, no lost answer.

Each node has its own folder, cookbook and port, as on three machines. They share a key store, so the
cluster token needn't be carried about; between machines, `llamesh invite` and `llamesh join` do that.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from demo import FOLDER, ROOT, DemoError, last_words, stop, wait_for_address

MODEL = "smollm2"
QUESTION = "Write a short story about a lighthouse keeper and the sea."
JOIN_SECONDS = 30

CONFIG = """\
# Written by scripts/demo --mesh at each start.
node_id: {node}
listen_addr: 127.0.0.1:0
metrics_path: ./node-metrics.json
cluster:
  enabled: true
  peers: {peers}
  discovery:
    mdns: false  # the nodes of this demo stay on this machine; elsewhere it finds peers by itself
  noise:
    config_dir: {keys}
"""
COOKBOOK = """\
# Written by scripts/demo --mesh. It may be edited while the node runs.
models: {models}
"""


@dataclass
class Node:
    """One of the three."""

    name: str
    folder: Path
    process: subprocess.Popen[bytes]
    address: str = ""

    @property
    def log(self) -> Path:
        return self.folder / "node.log"


def main(model: Path, *, once: bool) -> int:
    """Runs the whole story; with `once` the nodes end after it."""
    with ExitStack() as stack:
        say("starting three nodes: node-a and node-b without a model, node-c with one")
        node_a = stack.enter_context(running("node-a", [], []))
        node_b = stack.enter_context(running("node-b", [], [node_a]))
        node_c = stack.enter_context(running("node-c", [entry(model)], [node_a]))
        wait_for(lambda: sees(node_a, {"node-a", "node-b", "node-c"}), "node-a to see the others")
        wait_for(lambda: lists(node_a), "node-a to list the model of node-c")
        for node in (node_a, node_b, node_c):
            say(f"  {node.name}  {node.address}  has {', '.join(own_models(node)) or 'no model'}")

        say(f"\n1. asking node-a for {MODEL}, which only node-c has")
        answer = ask(node_a, "Say hello in one short sentence.", tokens=30)
        say(f"   {answer.text!r}\n   answered by {answer.node} in {answer.seconds:.2f} s, its start included")

        say("\n2. node-b's cookbook gets the same model; nobody is restarted")
        (node_b.folder / "cookbook.yaml").write_text(COOKBOOK.format(models=json.dumps([entry(model)])))
        wait_for(lambda: lists(node_a, {"node-b", "node-c"}), "node-a to hear that node-b has the model, too")
        say("   node-a knows of both; node-c has it loaded, so the next question goes there")

        say(
            f"\n3. asking node-a again, and killing node-c (kill -9) in the middle of its work\n   {QUESTION}"
        )
        answer = ask(node_a, QUESTION, tokens=80, meanwhile=lambda: kill_at_work(node_c, node_a))
        say(f"   {answer.text[:300]!r}")
        say(f"   the whole answer came from {answer.node}, {answer.seconds:.2f} s after the question")
        if answer.node != "node-b":
            raise DemoError(f"node-b should have answered, not {answer.node}.\n{last_words(node_a.log)}")
        wait_for(lambda: sees(node_a, {"node-a", "node-b"}), "node-a to notice that node-c is gone")
        say("   node-c is out of the mesh, and nobody's client was told")
        if once:
            return 0
        return stay(node_a, node_b)


def say(text: str) -> None:
    print(text, flush=True)


def entry(model: Path) -> dict[str, Any]:
    """The model for a cookbook. A short context keeps two of them small."""
    profile = {"id": "default", "model_path": str(model), "llama_server_args": "-c 2048 -np 1"}
    return {"name": MODEL, "profiles": [profile]}


@contextmanager
def running(name: str, models: list[dict[str, Any]], peers: list[Node]) -> Iterator[Node]:
    """A node of the mesh; stopped when the block is left."""
    folder = FOLDER / "mesh" / name
    folder.mkdir(parents=True, exist_ok=True)
    addresses = [peer.address.removeprefix("http://") for peer in peers]
    keys = json.dumps(str(FOLDER / "mesh" / "keys"))
    (folder / "config.yaml").write_text(CONFIG.format(node=name, peers=json.dumps(addresses), keys=keys))
    (folder / "cookbook.yaml").write_text(COOKBOOK.format(models=json.dumps(models)))
    command = [sys.executable, "-m", "llamesh", "--config", "config.yaml", "--cookbook", "cookbook.yaml"]
    with (folder / "node.log").open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    node = Node(name, folder, process)
    try:
        node.address = wait_for_address(process, node.log)
        yield node
    finally:
        if process.poll() is None:
            stop(process)


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Until it holds; DemoError after JOIN_SECONDS."""
    deadline = time.monotonic() + JOIN_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise DemoError(
                f"waited {JOIN_SECONDS} s for {what}; the logs are below {FOLDER.relative_to(ROOT)}"
            )
        time.sleep(0.05)


def get(node: Node, path: str) -> Any:
    try:
        return httpx.get(node.address + path, trust_env=False, timeout=10).json()
    except (httpx.HTTPError, ValueError) as error:
        raise DemoError(f"{node.name} doesn't answer {path}: {error}\n{last_words(node.log)}") from None


def sees(node: Node, names: set[str]) -> bool:
    nodes = get(node, "/cluster/nodes")["nodes"]
    return {name for name, its in nodes.items() if its["ready"]} == names


def lists(node: Node, at: set[str] | None = None) -> bool:
    """Whether `node` lists the model, and knows that all of `at` have it."""
    for model in get(node, "/v1/models")["data"]:
        if model["id"] == MODEL:
            return at is None or at <= set(model["metadata"].get("nodes", ()))
    return False


def own_models(node: Node) -> list[str]:
    return [m["id"] for m in get(node, "/v1/models")["data"] if m["owned_by"] == node.name]


@dataclass
class Answer:
    text: str
    node: str
    seconds: float


def ask(node: Node, question: str, *, tokens: int, meanwhile: Callable[[], None] | None = None) -> Answer:
    """A whole chat completion through `node`; `meanwhile` runs beside it."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": tokens,
        "temperature": 0,
    }
    beside = threading.Thread(target=meanwhile) if meanwhile is not None else None
    started = time.monotonic()
    if beside is not None:
        beside.start()
    try:
        reply = httpx.post(f"{node.address}/v1/chat/completions", json=body, trust_env=False, timeout=120)
    except httpx.HTTPError as error:
        raise DemoError(f"no answer from {node.name}: {error}\n{last_words(node.log)}") from None
    finally:
        if beside is not None:
            beside.join()
    if reply.status_code != 200:
        raise DemoError(f"{node.name} answered {reply.status_code}: {reply.text}\n{last_words(node.log)}")
    text = reply.json()["choices"][0]["message"]["content"].strip()
    return Answer(text, reply.headers["x-llamesh-node"], time.monotonic() - started)


def kill_at_work(victim: Node, asked: Node) -> None:
    """Kill `victim` once the request is there. Its llama-server dies with it."""
    deadline = time.monotonic() + JOIN_SECONDS
    while time.monotonic() < deadline:
        if get(victim, "/metrics/json")["current_requests"]:
            break
        time.sleep(0.01)
    time.sleep(0.2)  # it has read the prompt and writes
    victim.process.kill()
    victim.process.wait()
    say(f"   (node-c is dead; {asked.name} still waits for the answer)")


def stay(node_a: Node, node_b: Node) -> int:
    """Leave the mesh to the user until Ctrl-C."""
    say(f"\nnode-a and node-b serve until Ctrl-C: {node_a.address}/ui/ and {node_b.address}/ui/")
    try:
        node_a.process.wait()
    except KeyboardInterrupt:
        return 0
    raise DemoError(f"node-a ended by itself.\n{last_words(node_a.log)}")
