"""Nodes that the tests of both lanes share; each test uses models or counters of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import pytest

from tests.web.served import LANES, Served, served

BODY_LIMIT = 200_000


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One with defaults, except for a small body limit and fast keep-alive comments."""
    directory = tmp_path_factory.mktemp("node")
    models: dict[str, dict[str, Any]] = {
        # Those that load when a file appears, one for each test and lane.
        **{
            f"late-{what}-{lane}": {"slots": 1, "ready_when": str(directory / f"ready-{what}-{lane}")}
            for what in ("left", "comments", "ping", "error")
            for lane in LANES
        },
        **{f"fragile-{lane}": {"launches": [{"die_after_requests": 0}, {}]} for lane in LANES},
        "brief": {"slots": 1, "profile": {"max_wait_in_queue_ms": 700}},
        "large": {"slots": 4},
        "m": {"slots": 4},
        "one": {"slots": 1},
        "spare": {"slots": 1},
        "embed": {"args": "--embedding"},
        "ranks": {"args": "--reranking"},
        "short": {"slots": 2, "close_after": 3},
        "closes": {"slots": 2, "close_after": 1, "idle_seconds": 0.05},
    }
    config = {"http": {"stream_keepalive_seconds": 0.2, "request_body_limit_bytes": BODY_LIMIT}}
    with served(directory, models, config) as running:
        yield running


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One with keys and an allowed origin."""
    config = {
        "auth": {
            "enabled": True,
            "required_header": "x-node-key",
            "allowed_keys": ["plain-key", "sha256:" + hashlib.sha256(b"hashed-key").hexdigest()],
            "admin_keys": ["admin-key"],
        },
        "http": {"cors_allowed_origins": ["https://chat.example.org"]},
    }
    with served(tmp_path_factory.mktemp("guarded"), {"m": {"slots": 2}}, config) as running:
        yield running


@pytest.fixture(scope="session")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One whose every patience is short."""
    config = {
        "http": {
            "protocol_detect_timeout_ms": 300,
            "body_read_timeout_ms": 300,
            "idle_timeout_seconds": 1,
        },
        "upstream_read_timeout_ms": 400,
    }
    with served(tmp_path_factory.mktemp("impatient"), {"m": {"slots": 4}}, config) as running:
        yield running


@pytest.fixture(params=LANES)
def lane(request: pytest.FixtureRequest) -> str:
    """Each way to the same answers."""
    return str(request.param)
