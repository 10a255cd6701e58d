"""What is done over `/mcp` stands in the audit file; what is only read doesn't."""

from __future__ import annotations

from pathlib import Path

from tests.end_to_end.test_audit import audit_of, wait_line, writing
from tests.end_to_end.test_state import fakes
from tests.support.fake import FAKE_LLAMA_SERVER
from tests.support.mcp import call_of, post
from tests.support.node import running_node


async def test_acts_and_refusals_are_written_down(tmp_path: Path) -> None:
    keys = {"auth": {"enabled": True, "allowed_keys": ["user-key"], "admin_keys": ["admin-key"]}}
    config = {**keys, **writing(tmp_path / "audit")}
    async with running_node(tmp_path, fakes(tmp_path, m={}), config, binary_path=FAKE_LLAMA_SERVER) as node:
        for id, key, tool, arguments in (  # noqa: A001
            ("read", "admin-key", "mesh_summary", {}),
            ("loaded", "admin-key", "load_model", {"model": "m"}),
            ("unknown", "admin-key", "unload_model", {"model": "nope"}),
            ("refused", "user-key", "drain_node", {}),
        ):
            headers = {"x-api-key": key, "x-request-id": id}
            await post(node, call_of(tool, **arguments), headers)
        line = await wait_line(tmp_path / "audit", request_id="refused")
        assert (line["what"], line["path"], line["status"]) == ("admin", "/mcp", 403)
        line = await wait_line(tmp_path / "audit", request_id="loaded")
        assert (line["path"], line["model"], line["outcome"]) == ("/mcp/load_model", "m", "ok")
        assert (line["address"], line["status"]) == ("127.0.0.1", 200)
        line = await wait_line(tmp_path / "audit", request_id="unknown")
        assert (line["path"], line["outcome"]) == ("/mcp/unload_model", "model_not_found")
        assert "read" not in {one["request_id"] for one in audit_of(tmp_path / "audit")}
