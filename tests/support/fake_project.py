"""A tiny cmake project in a git repository, whose product is a fake llama-server: builds take a second.

    project = FakeProject(tmp_path / "upstream")
    first = project.commit(version="1")
    second = project.commit(version="2", smoke="exit")     # see `fake_built_server` for what it may say

A commit may also say how it is built: `configure` "fail", `compile` "fail", or `gate` PATH: the compilation
waits for that file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from llamesh.config.sections import LlamaCpp

SERVER = Path(__file__).with_name("fake_built_server.py")

STEPS = 8

CMAKE = f"""\
cmake_minimum_required(VERSION 3.14)
project(fake_llama NONE)
include(${{CMAKE_SOURCE_DIR}}/how.cmake)
if(CONFIGURE STREQUAL "fail")
  message(FATAL_ERROR "this project can't be configured, as told")
endif()
set(steps)
foreach(step RANGE 1 {STEPS})
  add_custom_command(OUTPUT step${{step}} COMMAND ${{CMAKE_COMMAND}} -E touch step${{step}})
  list(APPEND steps step${{step}})
endforeach()
add_custom_command(OUTPUT bin/llama-server
  COMMAND sh ${{CMAKE_SOURCE_DIR}}/compile.sh
  COMMAND ${{CMAKE_COMMAND}} -E make_directory bin
  COMMAND ${{CMAKE_COMMAND}} -E copy ${{CMAKE_SOURCE_DIR}}/server.sh bin/llama-server
  COMMAND ${{CMAKE_COMMAND}} -E copy ${{CMAKE_SOURCE_DIR}}/behaviour.json bin/behaviour.json
  DEPENDS ${{steps}} compile.sh server.sh behaviour.json)
add_custom_target(llama-server DEPENDS ${{CMAKE_BINARY_DIR}}/bin/llama-server)
"""

WRAPPER = f"""\
#!/bin/sh
here=$(dirname "$(readlink -f "$0")")
exec {sys.executable} {SERVER} "$here/behaviour.json" "$@"
"""


class FakeProject:
    """The repository at `path`; its branch is `main`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True)
        self.git("init", "--quiet", "--initial-branch=main")
        (path / "CMakeLists.txt").write_text(CMAKE)
        (path / "server.sh").write_text(WRAPPER)
        (path / "server.sh").chmod(0o755)

    def git(self, *words: str) -> str:
        """Run git in it; what it says."""
        person = {
            f"GIT_{who}_{what}": "someone" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
        }
        environment = {**os.environ, **person, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
        done = subprocess.run(
            ["git", "-C", str(self.path), *words], env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    def write(self, **behaviour: Any) -> None:
        """The files of a version."""
        configure, compiles = behaviour.pop("configure", ""), behaviour.pop("compile", "")
        gate = behaviour.pop("gate", "")
        (self.path / "how.cmake").write_text(f'set(CONFIGURE "{configure}")\n')
        script = f'while [ ! -e "{gate}" ]; do sleep 0.02; done\n' if gate else ""
        script += (
            "echo \"error: expected ';' before the end of the world\"\nexit 1\n" if compiles == "fail" else ""
        )
        (self.path / "compile.sh").write_text(script or ":\n")
        (self.path / "behaviour.json").write_text(json.dumps(behaviour))

    def commit(self, **behaviour: Any) -> str:
        """Another commit on the present branch, its name."""
        self.write(**behaviour)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", f"version {behaviour.get('version')}")
        return self.git("rev-parse", "HEAD")


def settings_for(project: FakeProject | Path | str, folder: Path, **more: Any) -> dict[str, Any]:
    """The section `llama_cpp` of a configuration that builds `project` below `folder`."""
    source = project.path if isinstance(project, FakeProject) else project
    return {
        "enabled": True,
        "repo_url": str(source),
        "branch": "main",
        "repo_path": str(folder / "clone"),
        "build_path": str(folder / "builds"),
        "binary_path": str(folder / "bin" / "llama-server"),
        **more,
    }


def plan_for(project: FakeProject | Path | str, folder: Path, **more: Any) -> LlamaCpp:
    """The same, checked."""
    return LlamaCpp.model_validate(settings_for(project, folder, **more))
