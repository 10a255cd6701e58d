"""`llamesh doctor` beside nodes that run, and on the machine of one that doesn't."""

from __future__ import annotations

from pathlib import Path

from llamesh.commands.doctor.examination import examine_all
from llamesh.commands.doctor.finding import Finding
from llamesh.commands.shared.options import Files
from tests.end_to_end.mesh.parts import NO_MODELS
from tests.support.fake import FAKE_LLAMA_SERVER
from tests.support.mesh import Member, running_mesh


async def findings(member: Member, tmp_path: Path) -> dict[str, list[Finding]]:
    folder = member.directory
    environ = {"PATH": "/nowhere", "HF_HOME": str(tmp_path / "hub")}
    return await examine_all(Files.named(folder / "config.yaml", None, folder / "cookbook.yaml"), environ)


def lines(found: list[Finding]) -> list[str]:
    return [f"{one.level} {one.text}" for one in found]


async def test_what_the_doctor_says_of_a_mesh(tmp_path: Path) -> None:
    cookbooks = dict.fromkeys(("node-a", "node-b", "node-c"), NO_MODELS)
    async with running_mesh(tmp_path, cookbooks, binary_path=FAKE_LLAMA_SERVER) as mesh:
        await mesh.wait_joined()
        await mesh["node-c"].stop()

        found = await findings(mesh["node-a"], tmp_path)
        assert "a llamesh node runs there, version" in lines(found["ports"])[0]
        peers = lines(found["peers"])
        assert any(line.startswith("ok node-b is alive") for line in peers)
        assert any("its port is open" in line for line in peers)
        assert any(line.startswith("bad") and "connection refused" in line for line in peers)  # node-c

        before = {path: path.read_bytes() for path in mesh["node-c"].keys.iterdir()}
        alone = await findings(mesh["node-c"], tmp_path)
        assert "is free: no node runs there" in lines(alone["ports"])[0]
        reached = [line.split(": ", 1)[1].split(",")[0] for line in lines(alone["peers"])]
        assert sorted(reached) == ["reached node-a", "reached node-b"]
        assert {path: path.read_bytes() for path in mesh["node-c"].keys.iterdir()} == before

        assert mesh.token is not None
        assert mesh.token not in repr([found, alone])
