"""The table of tools: what assistants are told of it is true, and fits what the tools take and answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import jsonschema
import msgspec
import pytest

from llamesh.errors import InvalidRequest
from llamesh.web.mcp.server import _schema
from llamesh.web.mcp.tools import Tool, Toolbox, UnknownTool, _places
from llamesh.web.state_schema import Cell
from tests.web.mcp.test_shapes import document, model

# No act is done here: that they exist is enough.
ACTS = SimpleNamespace(prewarm=None, unload=None, drain=None, undrain=None)
BOX = Toolbox(cast(Any, None), cast(Any, None), cast(Any, ACTS))
TOOLS = list(BOX.tools.values())


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_schemas_say_what_is_taken_and_answered(tool: Tool) -> None:
    for kind in (tool.takes, tool.answers):
        schema = _schema(kind)
        jsonschema.Draft202012Validator.check_schema(schema)
        assert schema["type"] == "object"
        assert set(schema["properties"]) == set(kind.__struct_fields__)
    for name, member in _schema(tool.takes)["properties"].items():
        assert "description" in member or name == "only_loaded" or name == "only_failed", name


def test_what_changes_nothing_is_marked_so() -> None:
    assert {tool.name for tool in TOOLS if not tool.reads} == {
        "load_model",
        "prewarm_model",
        "unload_model",
        "drain_node",
        "undrain_node",
    }
    assert not any(tool.destroys for tool in TOOLS if tool.reads)


async def test_an_answer_keeps_to_its_schema() -> None:
    state = document(models=[model("m:default", a=Cell("loaded", tps=1.0))])

    async def look() -> Any:
        return state

    box = Toolbox(cast(Any, SimpleNamespace(document=look)), cast(Any, None), cast(Any, ACTS))
    for name, arguments in {
        "mesh_summary": {},
        "mesh_state": {"sections": ["models", "history"]},
        "list_nodes": {},
        "list_models": {"limit": 1},
    }.items():
        answer = await box.call(name, arguments, cast(Any, None))
        jsonschema.validate(msgspec.to_builtins(answer), _schema(box.tools[name].answers))


async def test_what_isn_t_taken() -> None:
    with pytest.raises(UnknownTool):
        await BOX.call("rm", {}, cast(Any, None))
    for name, arguments, words in [
        ("load_model", {"model": ""}, "length >= 1"),
        ("load_model", {"model": None}, "got `null`"),
        ("load_model", {"model": "m", "wait_seconds": 601}, "<= 600"),
        ("load_model", {"model": "m", "force": True}, "unknown field `force`"),
        ("mesh_state", {"sections": []}, "length >= 1"),
        ("mesh_state", {"sections": ["keys"]}, "'keys'"),
        ("read_logs", {"lines": 0}, ">= 1"),
        ("list_nodes", {"limit": "many"}, "limit"),
        ("mesh_summary", {"x": "\ud800"}, "surrogates"),
    ]:
        with pytest.raises(InvalidRequest) as refused:
            await BOX.call(name, arguments, cast(Any, None))
        assert words in refused.value.message, refused.value.message
        assert refused.value.message.startswith(f"{name} doesn't take that: ")


def test_where_a_model_is_looked_for_first() -> None:
    state = document(
        models=[
            model("m:default", a=Cell("fits"), b=Cell("failed"), c=Cell("loaded", instances=1)),
            model("n:x", b=Cell("fits"), a=Cell("fits")),
        ]
    )
    assert [node for node, _ in _places(state, "M")] == ["c", "b", "a"]
    assert [node for node, _ in _places(state, "n:x")] == ["a", "b"]
    assert _places(state, "o") == []
