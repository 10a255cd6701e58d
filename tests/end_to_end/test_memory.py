"""A running node has not loaded what is heavy, nor what only tests need."""

from __future__ import annotations

import os
from pathlib import Path

from tests.end_to_end.cookbooks import ask_well, cookbook, profile
from tests.support.node import CHECKOUT, running_node
from tests.test_layers import HEAVY

# Python runs a module of this name at its start; the node itself isn't touched.
TELL_AT_EXIT = """
import atexit, os, pathlib, sys
def tell():
    pathlib.Path({directory!r}, f"{{os.getpid()}}.modules").write_text("\\n".join(sys.modules))
atexit.register(tell)
"""


async def test_what_a_node_that_served_has_imported(tmp_path: Path, tiny_model: Path) -> None:
    start = tmp_path / "start"
    start.mkdir()
    (start / "sitecustomize.py").write_text(TELL_AT_EXIT.format(directory=str(tmp_path)))
    environment = {"PYTHONPATH": os.pathsep.join([str(start), str(CHECKOUT)])}
    async with running_node(tmp_path / "node", cookbook(tiny=profile(tiny_model)), env=environment) as node:
        await ask_well(node)
        for page in ("/metrics", "/metrics/json", "/v1/models", "/cluster/nodes"):
            assert (await node.client.get(page)).status_code == 200
        assert await node.stop() == 0
    loaded = set((tmp_path / f"{node.pid}.modules").read_text().split())
    assert "llamesh.node" in loaded
    assert {"pytest", "openai", "xllamacpp", *HEAVY} & loaded == set()
