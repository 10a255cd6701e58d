"""`llamesh models` beside a node of a mesh: who has which weights."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import trio

from tests.end_to_end.mesh.parts import fakes
from tests.support.fake import FAKE_LLAMA_SERVER
from tests.support.mesh import running_mesh
from tests.support.node import clean_environment


async def test_it_says_which_nodes_have_what(tmp_path: Path) -> None:
    cookbooks = {"node-a": fakes(tmp_path, m={}), "node-b": fakes(tmp_path, m={}, n={})}
    async with running_mesh(tmp_path, cookbooks, binary_path=FAKE_LLAMA_SERVER) as mesh:
        await mesh.wait_joined()
        await mesh.wait_listed("n", at="node-a", by="node-b")
        directory = mesh["node-a"].node.directory
        command = [sys.executable, "-m", "llamesh", "models", "--json", "--config", "config.yaml"]
        empty = {name: "" for name in os.environ if name.startswith("HF_")}
        environment = clean_environment({**empty, "HF_HOME": str(tmp_path / "hf")})
        environment["LLAMESH_LISTEN_ADDR"] = mesh["node-a"].node.url.removeprefix("http://")
        found: dict[str, list[str]] = {}
        with trio.fail_after(20):
            while found.get("m") != ["node-a", "node-b"] or found.get("n") != ["node-b"]:
                done = await trio.run_process(
                    [*command, "--cookbook", "cookbook.yaml"],
                    cwd=directory,
                    env=environment,
                    capture_stdout=True,
                )
                found = {item["profiles"][0]: item["nodes"] for item in json.loads(done.stdout)}
