"""AMD devices on trees of files like those that the amdgpu driver shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamesh.core.memory import Claim, account
from llamesh.core.readings import Reading
from llamesh.local.sensors import AmdSensor

GIB = 1 << 30
OURS = {100: (100, 101)}


def put(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def card(root: Path, number: int, pci: str, **files: object) -> Path:
    """A card of the driver; its `device` is a link into the tree of PCI devices, as in the kernel's."""
    device = root / f"sys/devices/pci0000:00/{pci}"
    values = {"mem_info_vram_total": 16 * GIB, "mem_info_vram_used": 2 * GIB, "gpu_busy_percent": 25}
    for name, value in {**values, **files}.items():
        if value is not None:
            put(device / name, value)
    folder = root / f"sys/class/drm/card{number}"
    folder.mkdir(parents=True)
    (folder / "device").symlink_to(device)
    return device


def descriptor(root: Path, pid: int, number: int, **fields: object) -> None:
    """An open /dev/dri file of a process with what fdinfo says about it."""
    folder = root / f"proc/{pid}"
    (folder / "fd").mkdir(parents=True, exist_ok=True)
    (folder / "fd" / str(number)).symlink_to("/dev/dri/renderD128")
    lines = [f"drm-{name.replace('_', '-')}:\t{value}" for name, value in fields.items()]
    put(folder / "fdinfo" / str(number), "\n".join(["pos:\t0", *lines]))


def test_no_such_driver(tmp_path: Path) -> None:
    assert AmdSensor(tmp_path).read({}, 0.0) == ()


def test_cards_in_the_order_of_their_addresses(tmp_path: Path) -> None:
    card(tmp_path, 0, "0000:43:00.0", unique_id="8ce0c51d3a8c0c12", product_name="Instinct")
    card(tmp_path, 1, "0000:03:00.0", mem_info_vram_total=8 * GIB)
    # A connector, and a card of another driver.
    (tmp_path / "sys/class/drm/card0-HDMI-A-1").mkdir()
    (tmp_path / "sys/class/drm/card2/device").mkdir(parents=True)
    first, second = AmdSensor(tmp_path).read({}, 0.0)
    assert (first.index, first.uuid, first.kind) == (0, "amd-0000:03:00.0", "amd")
    assert first.total_bytes == 8 * GIB
    assert first.used_bytes == 2 * GIB
    assert first.utilisation == 0.25
    assert (second.index, second.uuid, second.name) == (1, "GPU-8ce0c51d3a8c0c12", "Instinct")


def test_values_follow_the_files(tmp_path: Path) -> None:
    device = card(tmp_path, 0, "0000:03:00.0")
    sensor = AmdSensor(tmp_path)
    assert sensor.read({}, 0.0)[0].used_bytes == 2 * GIB
    put(device / "mem_info_vram_used", 5 * GIB)
    assert sensor.read({}, 1.0)[0].used_bytes == 5 * GIB
    card(tmp_path, 1, "0000:04:00.0")
    assert len(sensor.read({}, 2.0)) == 1
    assert len(sensor.read({}, 60.0)) == 2


@pytest.mark.parametrize("broken", ["mem_info_vram_used", "gpu_busy_percent"])
def test_a_file_that_is_missing_or_strange_is_unknown(tmp_path: Path, broken: str) -> None:
    card(tmp_path, 0, "0000:03:00.0", **{broken: None})
    card(tmp_path, 1, "0000:04:00.0", **{broken: "N/A"})
    card(tmp_path, 2, "0000:05:00.0")
    *sick, well = AmdSensor(tmp_path).read({}, 0.0)
    for device in sick:
        assert (device.used_bytes is None) == (broken == "mem_info_vram_used")
        assert (device.utilisation is None) == (broken == "gpu_busy_percent")
        assert bool(device.error) == (broken == "mem_info_vram_used")
    assert well.used_bytes == 2 * GIB


def test_what_our_processes_hold(tmp_path: Path) -> None:
    card(tmp_path, 0, "0000:03:00.0", mem_info_vram_used=6 * GIB)
    card(tmp_path, 1, "0000:04:00.0")
    mine = {"driver": "amdgpu", "pdev": "0000:03:00.0", "memory_vram": f"{1 << 20} KiB"}
    descriptor(tmp_path, 100, 5, client_id=7, **mine)
    # The same client by another descriptor, another client of the same process, and one of a newer kernel.
    descriptor(tmp_path, 100, 6, client_id=7, **mine)
    descriptor(tmp_path, 100, 9, client_id=8, **mine)
    descriptor(tmp_path, 101, 5, client_id=9, pdev="0000:03:00.0", total_vram="512 MiB")
    descriptor(tmp_path, 999, 5, client_id=1, **mine)
    # Not a device file, and a client of another driver.
    (tmp_path / "proc/100/fd/1").symlink_to("socket:[1]")
    descriptor(tmp_path, 101, 6, driver="i915")
    first, second = AmdSensor(tmp_path).read(OURS, 0.0)
    assert first.processes == ((100, 2 * GIB), (101, GIB // 2))
    assert second.processes is None
    pool = account(
        Reading(0.0, (first,), trees=OURS), [Claim("x", 100, {first.uuid: GIB}, settled=True)]
    ).devices[first.uuid]
    assert (pool.ours, pool.external) == (5 * GIB // 2, 7 * GIB // 2)


def test_what_rocm_says_counts_where_it_is_more(tmp_path: Path) -> None:
    card(tmp_path, 0, "0000:03:00.0", mem_info_vram_used=9 * GIB)
    nodes = tmp_path / "sys/class/kfd/kfd/topology/nodes"
    put(nodes / "0/gpu_id", 0)
    put(nodes / "0/properties", "cpu_cores_count 16\nlocation_id 0\ndomain 0")
    put(nodes / "1/gpu_id", 50_001)
    put(nodes / "1/properties", f"simd_count 120\nlocation_id {3 << 8}\ndomain 0")
    put(tmp_path / "sys/class/kfd/kfd/proc/100/vram_50001", 8 * GIB)
    descriptor(tmp_path, 100, 5, client_id=7, pdev="0000:03:00.0", memory_vram="1024 KiB")
    descriptor(tmp_path, 101, 5, client_id=8, pdev="0000:03:00.0", memory_vram="2048 KiB")
    (device,) = AmdSensor(tmp_path).read(OURS, 0.0)
    assert device.processes == ((100, 8 * GIB), (101, 2 << 20))
