"""Running build tools: what they say, how they fail, and that nothing of them is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import trio

from llamesh.local.builds.failure import BuildFailed
from llamesh.local.builds.tools import need, run_tool
from tests.end_to_end.cookbooks import wait_alone
from tests.support.node import PATIENCE_SECONDS, clean_environment, wait_until

STAGE = "testing"


async def sh(script: str, **more: object) -> list[str]:
    return await run_tool(["sh", "-c", script], stage=STAGE, environ=os.environ, **more)  # type: ignore[arg-type]


async def test_what_it_says() -> None:
    lines: list[str] = []
    assert await sh("echo one; echo two >&2", on_line=lines.append) == ["one", "two"]
    assert lines == ["one", "two"]


async def test_it_is_nice() -> None:
    [niceness] = await sh("nice")
    assert int(niceness) == min(19, os.nice(0) + 10)


async def test_secrets_of_the_node_are_not_passed_on() -> None:
    environ = {
        **os.environ,
        "CLUSTER_TOKEN": "hush",
        "LLAMESH_AUTH__ALLOWED_KEYS": "hush",
        "LLAMA_API_KEY": "hush",
    }
    said = await run_tool(["env"], stage=STAGE, environ=environ, more={"MORE": "yes"})
    assert "MORE=yes" in said
    assert "hush" not in "\n".join(said)


async def test_a_failure_has_it_all() -> None:
    with pytest.raises(BuildFailed) as caught:
        await sh("seq 100; echo https://me:hush@example.org; exit 7")
    error = caught.value
    assert (error.stage, error.exit_code, len(error.last_lines)) == (STAGE, 7, 20)
    assert error.last_lines[-1] == "https://***@example.org"
    assert error.command.startswith("sh -c seq 100")
    assert "hush" not in error.report()
    assert "ended with exit code 7" in str(error)


async def test_its_own_words_explained() -> None:
    with pytest.raises(BuildFailed, match="testing: said: x"):
        await sh("echo x; exit 1", explain=lambda lines: f"said: {lines[-1]}")


async def test_ended_by_a_signal() -> None:
    with pytest.raises(BuildFailed, match="exit code 137"):
        await sh("kill -9 $$")


async def test_a_program_that_is_not_there() -> None:
    with pytest.raises(BuildFailed) as caught:
        await run_tool(["no-such-tool-anywhere"], stage=STAGE, environ=os.environ)
    assert caught.value.exit_code == 127
    with pytest.raises(BuildFailed, match="cmake is missing on this machine: apt install cmake"):
        need("cmake", {"PATH": "/nowhere"}, STAGE)


@pytest.mark.parametrize(("limits", "words"), [({"silence": 0.5}, "silent"), ({"limit": 0.5}, "not done")])
async def test_one_that_does_not_end(tmp_path: Path, limits: dict[str, float], words: str) -> None:
    with pytest.raises(BuildFailed, match=words):
        await sh(f"echo begun; exec sleep 1000 # {tmp_path}", **limits)
    await wait_alone(tmp_path)


def family(tmp_path: Path) -> str:
    """A tool with children in groups of their own, as Ninja has its compilers."""
    path = tmp_path / "build.ninja"
    path.write_text("rule wait\n  command = sleep 1000; : $out\nbuild a: wait\nbuild b: wait\n")
    return f"exec ninja -C {tmp_path} -j 2"


def sleepers(tmp_path: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.cmdline()[:2] == ["sleep", "1000"] and process.cwd() == str(tmp_path):
                found.append(process)
        except psutil.Error:
            continue
    return found


async def test_cancelled_nothing_is_left(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sh, family(tmp_path))
        await wait_until(lambda: len(sleepers(tmp_path)) == 2, "it doesn't begin")
        nursery.cancel_scope.cancel()
    assert sleepers(tmp_path) == []
    await wait_alone(tmp_path)


async def test_killed_ourselves_nothing_is_left(tmp_path: Path) -> None:
    program = (
        "import os, sys, trio; from llamesh.local.builds.tools import run_tool\n"
        "trio.run(lambda: run_tool(['sh', '-c', sys.argv[1]], stage='x', environ=os.environ))"
    )
    ours = subprocess.Popen([sys.executable, "-c", program, family(tmp_path)], env=clean_environment({}))
    await wait_until(lambda: len(sleepers(tmp_path)) == 2, "it doesn't begin")
    ours.send_signal(signal.SIGKILL)
    ours.wait(PATIENCE_SECONDS)
    await wait_until(lambda: sleepers(tmp_path) == [], "compilers are left")
    await wait_alone(tmp_path)
