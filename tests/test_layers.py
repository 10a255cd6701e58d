"""The shape of the program: which part may import which, what stays pure, how long a file may be.

Imports go one way. `core` decides and knows neither clock nor chance nor I/O; `local` and
`mesh` don't know each other; nobody but the composition root imports `node` or `web`.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "llamesh"
MAX_LINES = 400

_LOWER = {"core", "config", "errors", "telemetry", "net"}
_MIDDLE = _LOWER | {"local", "mesh"}
_TOP = _MIDDLE | {"dispatch", "web"}
# A part is a folder or a file directly in the package; it may import itself and these.
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": set(),
    "errors": set(),
    "config": {"errors"},
    "core": {"config", "errors"},
    "net": {"errors"},
    "telemetry": {"config", "errors"},
    "service": {"config", "errors", "telemetry"},
    "local": _LOWER,
    "mesh": _LOWER,
    "dispatch": _MIDDLE,
    "web": _MIDDLE | {"dispatch"},
    "peer_source": _MIDDLE,
    "peer_weights": _MIDDLE | {"peer_source"},
    "cluster": _TOP | {"peer_weights"},
    "node": _TOP | {"cluster", "service"},
    "command": {"config"},
    "commands": _MIDDLE | {"command"},
    "model_commands": _LOWER | {"local", "command"},
    "__main__": _TOP | {"node", "command", "commands", "model_commands"},
}

# Clocks, chance, files, sockets, processes, threads, logs: what makes one question get another answer.
IMPURE = {
    "asyncio", "concurrent", "datetime", "fcntl", "glob", "httptools", "httpx", "hypercorn", "io",
    "logging", "multiprocessing", "os", "pathlib", "psutil", "quart", "quart_trio", "queue",
    "random", "secrets", "select", "selectors", "shutil", "signal", "socket", "ssl", "structlog",
    "subprocess", "tempfile", "threading", "time", "trio", "uuid", "watchfiles", "zeroconf",
}  # fmt: skip

# Each costs megabytes and is needed by some nodes at some time: imported where it is used.
HEAVY = ("gguf", "numpy", "huggingface_hub", "mcp", "rich")


def modules(package: Path) -> Iterator[tuple[Path, str]]:
    """The Python files of a package, each with the part that it belongs to."""
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        yield path, relative.parts[0].removesuffix(".py")


def imported(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of whatever a file imports, inside functions and type checks too."""
    here = [package.name, *path.relative_to(package).with_suffix("").parts]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = here[: -node.level] if node.level else []
            for alias in node.names:
                yield (
                    node.lineno,
                    ".".join([*base, *(node.module or "").split("."), alias.name]).replace("..", "."),
                )


def violations(package: Path) -> list[str]:
    """What breaks the rules above, a line each."""
    found = []
    for path, part in modules(package):
        where = path.relative_to(package.parent)
        if part not in MAY_IMPORT:
            found.append(f"{where}: {part} has no place in the layers; give it one in MAY_IMPORT")
            continue
        for line, name in imported(path, package):
            top, *rest = name.split(".")
            if top == package.name and rest and not rest[0].startswith("__version"):
                if rest[0] != part and rest[0] not in MAY_IMPORT[part]:
                    found.append(f"{where}:{line}: {part} may not import {name}")
            elif part == "core" and top in IMPURE:
                found.append(f"{where}:{line}: core is pure and may not import {top}")
    return found


def test_imports_go_one_way_and_core_is_pure() -> None:
    assert violations(PACKAGE) == []


def test_the_rules_themselves_have_no_cycle() -> None:
    """Each part only imports parts that can be imported before it."""
    ready: set[str] = set()
    waiting = dict(MAY_IMPORT)
    while waiting:
        now = {part for part, needs in waiting.items() if needs <= ready}
        assert now, f"these import each other: {sorted(waiting)}"
        ready |= now
        for part in now:
            del waiting[part]


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("core/a.py", "import trio", "core is pure and may not import trio"),
        ("core/a.py", "def f():\n    from os import path", ":2: core is pure and may not import os"),
        ("core/a.py", "from llamesh.telemetry import logs", "core may not import llamesh.telemetry"),
        ("local/a.py", "from llamesh import mesh", "local may not import llamesh.mesh"),
        ("local/deep/a.py", "from ...mesh import peers", "local may not import llamesh.mesh.peers"),
        ("local/a.py", "from .. import web", "local may not import llamesh.web"),
        ("mesh/a.py", "import llamesh.local.pool", "mesh may not import llamesh.local.pool"),
        ("dispatch.py", "from llamesh.web.relay import Relay", "dispatch may not import llamesh.web"),
        ("web/a.py", "import llamesh.node", "web may not import llamesh.node"),
        ("net/a.py", "from llamesh.config import settings", "net may not import llamesh.config"),
        ("config/a.py", "from llamesh.core import capacity", "config may not import llamesh.core"),
        ("novelty/a.py", "", "novelty has no place in the layers"),
    ],
)  # fmt: skip
def test_a_breach_is_noticed(tmp_path: Path, file: str, source: str, complaint: str) -> None:
    path = tmp_path / "llamesh" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    [found] = violations(tmp_path / "llamesh")
    assert complaint in found


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("core/a.py", "import math\nfrom llamesh.config.cookbook import Profile"),
        ("core/a.py", "from . import capacity\nfrom ..errors import NoCapacity"),
        ("local/a.py", "import os\nfrom llamesh.telemetry import logs\nfrom llamesh import __version__"),
        ("node.py", "from llamesh.web import listener\nfrom llamesh.mesh import peers"),
        ("__main__.py", "from llamesh.node import Node"),
    ],
)  # fmt: skip
def test_what_is_allowed_passes(tmp_path: Path, file: str, source: str) -> None:
    path = tmp_path / "llamesh" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert violations(tmp_path / "llamesh") == []


def test_no_file_is_longer_than_one_idea() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path, _ in modules(PACKAGE)
    }
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


@pytest.mark.parametrize("module", ["llamesh.node", "llamesh.__main__"])
def test_an_idle_node_has_not_imported_what_is_heavy(module: str) -> None:
    program = f"import sys, {module}; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
