"""System memory within cgroups, process trees and their memory, unified memory, and the sum of it all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from llamesh.core.readings import Device
from llamesh.local.sensors import Sensors, SystemMemory, UnifiedSensor
from llamesh.local.sensors.processes import ProcessTable
from llamesh.local.sensors.unified import gpu_share

GIB = 1 << 30
MIB = 1 << 20
MACHINE = (64 * GIB, 40 * GIB)

# Holds memory of three kinds: private, shared between processes, and of a file.
EATER = """
import mmap, sys
private = bytearray(b"x" * (48 << 20))
shared = mmap.mmap(-1, 24 << 20)
shared.write(b"y" * (24 << 20))
with open(sys.argv[1], "rb") as file:
    weights = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
touched = sum(weights[at] for at in range(0, len(weights), 4096))
print("ready", flush=True)
sys.stdin.read()
"""
# Waits for what it is told to run, as a wrapper script does.
WRAPPER = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"


def put(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def group(folder: Path, **values: object) -> None:
    for name, value in values.items():
        put(folder / name.replace("__", "."), value)


def memory(root: Path) -> SystemMemory:
    return SystemMemory(root, machine=lambda: MACHINE)


# System memory.


def test_the_machine_where_nothing_limits_it(tmp_path: Path) -> None:
    assert memory(tmp_path).read() == MACHINE
    put(tmp_path / "proc/self/cgroup", "0::/user.slice")
    group(tmp_path / "sys/fs/cgroup/user.slice", memory__max="max", memory__high="max", memory__current=GIB)
    assert memory(tmp_path).read() == MACHINE


def test_version_2_limits_of_every_level(tmp_path: Path) -> None:
    put(tmp_path / "proc/self/cgroup", "0::/a.slice/b.service")
    mount = tmp_path / "sys/fs/cgroup"
    cache = "anon 1\ninactive_file 1073741824\nactive_file 1073741824\nslab_reclaimable 5"
    group(mount / "a.slice/b.service", memory__max=20 * GIB, memory__high="max", memory__current=6 * GIB)
    put(mount / "a.slice/b.service/memory.stat", cache)
    # File cache can be had back: 4 of 20 are in use.
    assert memory(tmp_path).read() == (20 * GIB, 16 * GIB)
    # A level above with less room, though its limit is larger: neighbours use it as well.
    group(mount / "a.slice", memory__max=24 * GIB, memory__current=23 * GIB)
    assert memory(tmp_path).read() == (20 * GIB, GIB)
    # Slowed down above `high`, so that is the limit.
    put(mount / "a.slice/b.service/memory.high", 8 * GIB)
    put(mount / "a.slice/memory.current", GIB)
    assert memory(tmp_path).read() == (8 * GIB, 4 * GIB)


def test_above_a_limit_nothing_is_available(tmp_path: Path) -> None:
    put(tmp_path / "proc/self/cgroup", "0::/x")
    group(tmp_path / "sys/fs/cgroup/x", memory__max=GIB, memory__current=2 * GIB)
    assert memory(tmp_path).read() == (GIB, 0)


def test_a_limit_beyond_the_machine_changes_nothing(tmp_path: Path) -> None:
    put(tmp_path / "proc/self/cgroup", "0::/x")
    group(tmp_path / "sys/fs/cgroup/x", memory__max=900 * GIB, memory__current=2 * GIB)
    assert memory(tmp_path).read() == MACHINE


def test_version_1(tmp_path: Path) -> None:
    put(tmp_path / "proc/self/cgroup", "5:cpu,cpuacct:/other\n4:memory:/box/inner\n0::/")
    mount = tmp_path / "sys/fs/cgroup/memory"
    group(mount, memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=50 * GIB)
    group(mount / "box", memory__limit_in_bytes=10 * GIB, memory__usage_in_bytes=7 * GIB)
    put(mount / "box/memory.stat", f"inactive_file 1\ntotal_inactive_file {GIB}\ntotal_active_file {2 * GIB}")
    assert memory(tmp_path).read() == (10 * GIB, 6 * GIB)


def test_a_container_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    put(tmp_path / "proc/self/cgroup", "4:memory:/docker/0123")
    group(tmp_path / "sys/fs/cgroup/memory", memory__limit_in_bytes=10 * GIB, memory__usage_in_bytes=7 * GIB)
    assert memory(tmp_path).read() == (10 * GIB, 3 * GIB)
    put(tmp_path / "proc/self/cgroup", "0::/../../outside")
    group(tmp_path / "sys/fs/cgroup", memory__max=12 * GIB, memory__current=GIB)
    assert memory(tmp_path).read() == (12 * GIB, 11 * GIB)


def test_unreadable_machine_is_unknown(tmp_path: Path) -> None:
    def broken() -> tuple[int, int]:
        raise OSError("no /proc/meminfo")

    assert SystemMemory(tmp_path, machine=broken).read() == (None, None)


def test_this_machine() -> None:
    total, available = SystemMemory().read()
    assert total is not None
    assert available is not None
    assert 0 < available <= total <= psutil.virtual_memory().total


# Unified memory.


@pytest.mark.parametrize(
    ("total", "wired", "share"),
    [
        (24 * GIB, None, 16 * GIB),
        (24 * GIB, 0, 16 * GIB),
        (64 * GIB, 0, 48 * GIB),
        (64 * GIB, 57_344, 56 * GIB),
    ],
)
def test_the_share_of_the_gpu(total: int, wired: int | None, share: int) -> None:
    assert gpu_share(total, wired) == share


@pytest.mark.parametrize(("available", "used"), [(60 * GIB, 0), (48 * GIB, 0), (10 * GIB, 38 * GIB)])
def test_unified_memory_is_one_pool(tmp_path: Path, available: int, used: int) -> None:
    system = SystemMemory(tmp_path, machine=lambda: (64 * GIB, available))
    asked: list[str] = []
    sensor = UnifiedSensor(system, sysctl=lambda name: asked.append(name))
    (device,) = sensor.read({}, 0.0)
    assert asked == ["iogpu.wired_limit_mb"]
    assert (device.kind, device.total_bytes, device.used_bytes) == ("unified", 48 * GIB, used)
    assert device.processes is None
    sensor.close()


def test_unified_memory_that_is_unknown(tmp_path: Path) -> None:
    def broken() -> tuple[int, int]:
        raise OSError

    (device,) = UnifiedSensor(SystemMemory(tmp_path, machine=broken), sysctl=lambda _: None).read({}, 0.0)
    assert (device.total_bytes, device.used_bytes) == (None, None)
    assert device.error


# Processes.


@pytest.fixture(params=["native", "psutil"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> ProcessTable:
    """Both ways to look: the kernel's files where they are, and what is left without them."""
    return ProcessTable() if request.param == "native" else ProcessTable(tmp_path / "nothing")


@pytest.fixture
def eaters(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """A parent that does nothing and its child that holds memory: their process ids."""
    weights = tmp_path / "weights"
    weights.write_bytes(b"w" * (40 * MIB))
    parent = subprocess.Popen(
        [sys.executable, "-c", WRAPPER, EATER, str(weights)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        process_group=0,
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"ready\n"
    (child,) = psutil.Process(parent.pid).children()
    yield parent.pid, child.pid
    # The child reads to the end of the input that it inherited.
    parent.communicate(timeout=30)


def test_a_tree_is_measured_without_its_files(table: ProcessTable, eaters: tuple[int, int]) -> None:
    parent, child = eaters
    trees = table.trees([parent], 0.0)
    assert trees == {parent: (parent, child)}
    alone, together = table.memory([parent]), table.memory(trees[parent])
    assert alone is not None
    assert together is not None
    eaten = (together.private - alone.private) / MIB
    assert eaten > 71
    if table.native:
        # The psutil way can't tell a file that nobody else maps from private memory.
        assert eaten < 72 + 38
        assert together.mapped - alone.mapped > 38 * MIB


def test_processes_that_are_gone(table: ProcessTable) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert table.trees([process.pid], 0.0) == {process.pid: (process.pid,)}
    assert table.memory([process.pid]) is None
    assert table.memory([]) is None
    assert table.memory([process.pid, os.getpid()]) is not None


class Kernel:
    """A /proc of our own making, which counts how often it is gone through."""

    def __init__(self, root: Path) -> None:
        self.root = root
        put(root / "self/status", "Name: x")

    def process(self, pid: int, parent: int, group: int, name: str = "llama-server") -> None:
        put(self.root / f"{pid}/stat", f"{pid} ({name}) S {parent} {group} {group} 0 -1")
        status = f"Name:\t{name}\nRssAnon:\t{pid} kB\nRssFile:\t2 kB\nRssShmem:\t1 kB\nThreads:\t1"
        put(self.root / f"{pid}/status", status)


def test_who_belongs_to_a_tree(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path)
    kernel.process(1, 0, 1)
    kernel.process(50, 1, 50)
    kernel.process(10, 50, 10, name="wrap) S 1 1 (er")
    kernel.process(11, 10, 10)
    kernel.process(12, 11, 12)  # its own group, but a descendant
    kernel.process(13, 1, 10)  # its parent is gone, the group is what is left
    kernel.process(20, 50, 20)
    kernel.process(21, 20, 20)
    kernel.process(30, 21, 30)  # a root below a root has a tree of its own
    table = ProcessTable(tmp_path)
    trees = {root: set(members) for root, members in table.trees([10, 20, 30], 0.0).items()}
    assert trees == {10: {10, 11, 12, 13}, 20: {20, 21}, 30: {30}}
    held = table.memory([10, 11, 999])
    assert held is not None
    assert (held.private, held.mapped) == (23 << 10, 4 << 10)


def test_trees_are_looked_at_often_only_while_young(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path)
    kernel.process(10, 1, 10)
    table = ProcessTable(tmp_path)
    assert table.trees([10], 0.0) == {10: (10,)}
    kernel.process(11, 10, 10)
    assert table.trees([10], 1.0) == {10: (10, 11)}
    kernel.process(12, 11, 10)
    assert table.trees([10], 9.0) == {10: (10, 11, 12)}
    kernel.process(13, 11, 10)
    assert table.trees([10], 13.0) == {10: (10, 11, 12)}
    assert table.trees([10], 14.0) == {10: (10, 11, 12, 13)}
    # A new root is looked for at once, and one that isn't asked for is forgotten.
    kernel.process(20, 1, 20)
    kernel.process(21, 20, 20)
    assert table.trees([20], 14.5) == {20: (20, 21)}
    assert table.trees([], 15.0) == {}


def test_a_zombie_holds_nothing(tmp_path: Path) -> None:
    put(tmp_path / "self/status", "Name: x")
    put(tmp_path / "10/status", "Name:\tx\nState:\tZ (zombie)")
    held = ProcessTable(tmp_path).memory([10])
    assert held is not None
    assert (held.private, held.mapped) == (0, 0)


# All of it.


class StubGpu:
    def __init__(self, uuid: str, *, fails: bool = False, problem: str | None = None) -> None:
        self.problem = problem
        self.closed = False
        self._uuid = uuid
        self._fails = fails

    def read(self, trees: Mapping[int, tuple[int, ...]], now: float) -> tuple[Device, ...]:
        if self._fails:
            raise ValueError("what the driver said is no text")
        return (
            Device(
                0,
                self._uuid,
                "Stub",
                "amd",
                total_bytes=int(now),
                processes=tuple((p, 1) for p in trees),
            ),
        )

    def close(self) -> None:
        self.closed = True


def test_a_reading_has_everything(eaters: tuple[int, int]) -> None:
    gpus = [StubGpu("a"), StubGpu("b", fails=True), StubGpu("c", problem="c is ill")]
    sensors = Sensors(gpus=gpus)
    parent, child = eaters
    reading = sensors.sample([parent, os.getpid()], now=7.0)
    assert reading.taken == 7.0
    assert [device.uuid for device in reading.devices] == ["a", "c"]
    assert reading.problems == ("StubGpu: ValueError: what the driver said is no text", "c is ill")
    assert reading.trees[parent] == (parent, child)
    assert set(reading.sysmem_used_by) == {parent, os.getpid()}
    assert reading.sysmem_used_by[parent] > 70 * MIB
    assert reading.sysmem_mapped_by[parent] > 40 * MIB
    assert reading.sysmem_total == SystemMemory().read()[0]
    sensors.close()
    assert all(gpu.closed for gpu in gpus)


def test_nobody_to_look_at() -> None:
    reading = Sensors(gpus=[]).sample([], now=0.0)
    assert reading.devices == ()
    assert not reading.gpu_telemetry
    assert reading.sysmem_used_by == {}
