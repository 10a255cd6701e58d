"""Behaviour files for the fake llama-server, and running one without a node."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FAKE_LLAMA_SERVER = Path(__file__).with_name("fake_llama_server.py")
"""Usable as `llama_cpp.binary_path`."""


def fake_profile_file(tmp_path: Path, name: str, **behaviour: Any) -> Path:
    """Write the "model" file that makes a fake llama-server behave so; see its docstring for the keys."""
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(behaviour, default=str))
    return path


def launches(profile: Path) -> list[int]:
    """The process ids of the fakes that were started on this file so far, in order."""
    count, pids = 0, []
    while (mark := profile.with_name(f"{profile.name}.launch.{count}")).exists():
        # The file is there a moment before its text.
        pids.append(int(mark.read_text() or 0))
        count += 1
    return pids
