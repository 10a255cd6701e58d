"""What is seen of a machine, from files that the test made."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from llamesh.local.builds import machine


def touch(path: Path, text: str = "", *, program: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    if program:
        path.chmod(0o755)


def test_an_empty_machine(tmp_path: Path) -> None:
    found = machine.look({"PATH": str(tmp_path)}, root=tmp_path)
    assert found.system == platform.system()
    assert found.gpus <= {"apple"}
    assert found.tools == frozenset()


@pytest.mark.parametrize(
    ("file", "text", "gpu"),
    [
        ("sys/class/drm/card0/device/vendor", "0x10de\n", "nvidia"),
        ("sys/class/drm/card1/device/vendor", "0x1002\n", "amd"),
        ("sys/class/drm/card0/device/vendor", "0x8086\n", "intel"),
        ("proc/driver/nvidia/version", "NVRM\n", "nvidia"),
        ("dev/nvidiactl", "", "nvidia"),
        ("dev/kfd", "", "amd"),
    ],
)
def test_gpus(tmp_path: Path, file: str, text: str, gpu: str) -> None:
    touch(tmp_path / file, text)
    assert gpu in machine.look({"PATH": ""}, root=tmp_path).gpus


def test_a_card_of_somebody_else(tmp_path: Path) -> None:
    touch(tmp_path / "sys/class/drm/card0/device/vendor", "0x1234\n")
    assert machine.look({"PATH": ""}, root=tmp_path).gpus <= {"apple"}


def test_tools_on_the_path_and_where_they_hide(tmp_path: Path) -> None:
    touch(tmp_path / "bin" / "glslc", program=True)
    touch(tmp_path / "usr/local/cuda/bin/nvcc", program=True)
    touch(tmp_path / "opt/rocm/bin/hipcc", program=True)
    touch(tmp_path / "usr/include/vulkan/vulkan.h")
    found = machine.look({"PATH": str(tmp_path / "bin")}, root=tmp_path)
    assert found.tools == {"glslc", "nvcc", "hipcc", "vulkan headers"}
    path = machine.search_path({"PATH": "/first"}, root=tmp_path).split(":")
    assert path[0] == "/first"
    assert str(tmp_path / "usr/local/cuda/bin") in path


def test_headers_of_an_sdk(tmp_path: Path) -> None:
    touch(tmp_path / "sdk/include/vulkan/vulkan.h")
    environ = {"PATH": "", "VULKAN_SDK": str(tmp_path / "sdk")}
    assert machine.look(environ, root=tmp_path).tools == {"vulkan headers"}
