"""What a model reads is short, bounded, and says what was left out."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from llamesh.web.mcp import shapes
from llamesh.web.state_schema import (
    SECTIONS,
    Cell,
    Concern,
    Device,
    Document,
    Event,
    History,
    Instance,
    Link,
    Memory,
    Model,
    Node,
    Request,
    Room,
    Series,
)

HISTORY = History(10, 0.0, Series([], [], [], [], []))


def document(**sections: Any) -> Document:
    """A state with these sections."""
    empty: dict[str, Any] = {name: [] for name in SECTIONS} | {"history": HISTORY}
    return Document(schema=1, node_id="a", time=1.5, version="0", **{**empty, **sections})


def instance(id: str, node: str = "a", **more: Any) -> Instance:  # noqa: A002
    return Instance(
        node=node,
        id=id,
        model=id.partition("#")[0],
        slots=2,
        busy=1,
        started=1.0,
        age=2.0,
        **{"state": "ready", **more},
    )


def request(id: str, **more: Any) -> Request:  # noqa: A002
    told = {"node": "a", "seen_by": "a", "path": "/v1/chat/completions", "phase": "decode", "started": 1.0}
    return Request(id=id, **{**told, **more})


def model(key: str, **cells: Cell) -> Model:
    return Model(key, key.removesuffix(":default"), "text", "of great use", None, cells)


def test_a_quiet_mesh() -> None:
    told = shapes.summary(document(nodes=[Node(id="a", self=True, ready=True)]))
    assert (told.well, told.nodes, told.instances, told.left_out) == (True, {"a": "ready"}, [], {})


def test_a_busy_mesh_at_a_glance() -> None:
    room = Room(total=8000, free=500)
    told = shapes.summary(
        document(
            nodes=[
                Node(id="a", ready=True, queue=3, running=2, memory=Memory(vram=room)),
                Node(id="b", reason="is draining", status="suspect"),
            ],
            models=[
                model("m:default", a=Cell("fits"), b=Cell("loaded")),
                model("n:default", a=Cell("failed")),
                model("o:default", a=Cell("never"), b=Cell("fits")),
            ],
            instances=[instance("m:default#1", tps=12.5), instance("n:x#2", state="draining", reason="idle")],
            requests=[request("1"), request("2"), request("3", phase="queued")],
            attention=[
                Concern("warning", "peer_silent", "b", "silent", 1.0, "look"),
                Concern("error", "crashed", "a", "crashed", 1.0, "mend"),
            ],
        )
    )
    assert not told.well
    assert told.nodes == {
        "a": "ready; 2 running, 3 waiting; 500 of 8000 MiB VRAM free for models",
        "b": "not ready: is draining; suspect",
    }
    assert told.instances == [
        "m:default#1 on a: ready, 1 of 2 slots busy, 12.5 tokens/s",
        "n:x#2 on a: draining (idle), 1 of 2 slots busy",
    ]
    assert told.models == {"loaded": 1, "failed": 1, "fits": 1}
    assert told.requests == {"decode": 2, "queued": 1}
    assert [one.level for one in told.attention] == ["error", "warning"]


def huge() -> Document:
    """As large as a state can be."""
    long = "x" * 2048
    return document(
        nodes=[
            Node(
                id=f"n{i}", reason=long, problems=[long] * 64, devices=[Device(long)] * 64, engine=long,
                link=Link(problem=long),
            )
            for i in range(300)
        ],
        models=[
            Model(f"m{i}:default", long, "text", long, 1, {f"n{j}": Cell("failed", long) for j in range(100)})
            for i in range(512)
        ],
        instances=[instance(f"m{i}:default#1", reason=long) for i in range(500)],
        requests=[request(long, message=long, waiting_for=long, tries=[long] * 64) for i in range(200)],
        attention=[Concern("error", long, long, long, 1.0, long)] * 100,
        events=[Event(i, 1.0, "info", "a", long, long) for i in range(100)],
        history=History(10, 0.0, Series(*[[0.123456789] * 360] * 5)),
    )  # fmt: skip


def test_no_answer_is_longer_than_a_model_can_read() -> None:
    told = huge()
    answers = [
        shapes.summary(told),
        shapes.nodes(told, 200),
        shapes.models(told, 200),
        shapes.requests(told.requests, 200),
        shapes.state(told, SECTIONS, 200),
        shapes.state(told, ("history",), 200),
        shapes.log_lines("a", [("m:default#1", "x" * 100_000)] * 1000, 500),
    ]
    for answer in answers:
        assert len(msgspec.json.encode(answer)) <= shapes.BUDGET + 8192, type(answer)
    left = shapes.state(told, SECTIONS, 200).left_out
    assert left["models"] > 0
    assert shapes.nodes(told, 200).left_out == 300 - len(shapes.nodes(told, 200).nodes)
    summary = shapes.summary(told)
    assert len(summary.attention) + summary.left_out["attention"] == 100
    assert len(summary.instances) + summary.left_out["instances"] == 500
    assert len(summary.nodes) + summary.left_out["nodes"] == 300


@pytest.mark.parametrize(("limit", "shown", "left"), [(1, 1, 4), (5, 5, 0), (9, 5, 0)])
def test_what_is_left_out_is_said(limit: int, shown: int, left: int) -> None:
    told = shapes.nodes(document(nodes=[Node(id=str(i)) for i in range(5)]), limit)
    assert (len(told.nodes), told.left_out) == (shown, left)


def test_models_are_found_and_the_useful_come_first() -> None:
    told = document(
        models=[
            model("c:default", a=Cell("never", "too large")),
            model("b:default", a=Cell("fits"), b=Cell("loading")),
            model("a:tiny", b=Cell("loaded", tps=9.0)),
        ]
    )
    rows = shapes.models(told, 10).models
    assert [one.name for one in rows] == ["a:tiny", "b", "c"]
    assert (rows[0].tokens_per_second, rows[2].why) == (9.0, {"a": "too large"})
    assert [one.name for one in shapes.models(told, 10, query="TINY").models] == ["a:tiny"]
    assert [one.name for one in shapes.models(told, 10, query="great").models] == ["a:tiny", "b", "c"]
    assert [one.nodes for one in shapes.models(told, 10, node="a").models] == [{"a": "fits"}, {"a": "never"}]
    assert [one.name for one in shapes.models(told, 10, loaded=True).models] == ["a:tiny"]


def test_sections_are_narrowed_and_keep_their_members() -> None:
    told = document(
        nodes=[Node(id="a"), Node(id="b")],
        models=[model("m:default", a=Cell("fits")), model("n:default", b=Cell("fits"))],
        instances=[instance("m:default#1", "a"), instance("n:default#1", "b")],
        requests=[request("1", model="m:default", served_by="b"), request("2", model="n:default")],
        events=[Event(i, 1.0, "info", "a", "x", "y") for i in range(4)],
    )
    narrowed = shapes.state(told, SECTIONS, 2, node="b", model="n")
    assert [one["id"] for one in narrowed.nodes] == ["b"]
    assert [one["key"] for one in narrowed.models] == ["n:default"]
    assert [one["id"] for one in narrowed.instances] == ["n:default#1"]
    assert narrowed.requests == []
    assert [one["id"] for one in shapes.state(told, ["requests"], 9, node="b").requests] == ["1"]
    events = shapes.state(told, ["events"], 2)
    assert [one["id"] for one in events.events] == [2, 3]
    assert events.left_out == {"events": 2}
    assert events.history is None
    assert msgspec.convert(narrowed.instances[0], Instance) == told.instances[1]


def test_the_newest_lines_that_say_it() -> None:
    lines = [("m#1", f"line {i}") for i in range(9)] + [("m#2", "CUDA error")]
    told = shapes.log_lines("a", lines, 2, "LINE")
    assert (told.lines, told.left_out) == (["[m#1] line 7", "[m#1] line 8"], 7)
    assert shapes.log_lines("a", lines, 5, "cuda").lines == ["[m#2] CUDA error"]
    assert shapes.log_lines("a", [], 5).lines == []
