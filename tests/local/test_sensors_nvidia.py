"""NVIDIA devices: the real pynvml on a fake library, and on the real one where the machine has a GPU."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llamesh.core.memory import Claim, account
from llamesh.core.readings import Device, Reading
from tests.support.fake_nvml import (
    DRIVER_NOT_LOADED,
    GPU_IS_LOST,
    MIB,
    NO_PERMISSION,
    NOT_SUPPORTED,
    UNKNOWN,
    FakeDevice,
    FakeNvml,
    build_library,
)
from tests.support.sensor_probe import Probe

PATIENCE = 20.0
# Longer than any pause between attempts, and than the time between two enumerations.
LATER = 100.0


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_library(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def nvml(library: Path, tmp_path: Path) -> FakeNvml:
    return FakeNvml(library, tmp_path / "state")


@pytest.fixture
def probe(nvml: FakeNvml) -> Iterator[Probe]:
    with Probe(nvml.environment()) as running:
        yield running


def by_uuid(reading: Reading) -> dict[str, Device]:
    devices = {device.uuid: device for device in reading.devices}
    assert len(devices) == len(reading.devices)
    return devices


def check(reading: Reading) -> None:
    """What holds on any machine with a working driver, the real one included."""
    assert reading.devices
    assert reading.gpu_telemetry
    assert reading.sysmem_total is not None
    by_uuid(reading)
    for device in reading.devices:
        assert device.name
        assert device.error is None
        assert device.total_bytes is not None
        assert device.used_bytes is not None
        assert 0 <= device.used_bytes <= device.total_bytes
        assert device.utilisation is None or 0 <= device.utilisation <= 1
    accounts = account(reading, [])
    wide = accounts.device_wide
    assert wide.ours == wide.pending == 0
    assert wide.external == sum(d.used_bytes or 0 for d in reading.devices if d.holds_models)
    assert wide.total is not None
    assert wide.free == wide.total - (wide.external or 0)


def test_two_devices_and_their_processes(nvml: FakeNvml, probe: Probe) -> None:
    nvml.write(
        FakeDevice("GPU-a", used=9_000, reserved=400, utilisation=37, compute={100: 5_000, 200: 4_000}),
        FakeDevice("GPU-b", total=16_000, name="Another Fake", graphics={300: 70}, used=70),
    )
    reading = probe.sample()
    check(reading)
    assert reading.problems == ()
    first, second = reading.devices
    assert (first.index, first.uuid, first.kind, first.name) == (0, "GPU-a", "nvidia", "NVIDIA Fake")
    assert (first.total_bytes, first.used_bytes) == (24_000 * MIB, 9_000 * MIB)
    assert first.reserved_bytes == 400 * MIB
    assert first.usable_bytes == 23_600 * MIB
    assert first.utilisation == 0.37
    assert first.processes == ((100, 5_000 * MIB), (200, 4_000 * MIB))
    assert (second.index, second.name, second.total_bytes) == (1, "Another Fake", 16_000 * MIB)
    assert second.processes == ((300, 70 * MIB),)


def test_strangers_are_seen_and_follow_the_file(nvml: FakeNvml, probe: Probe) -> None:
    ours = probe.pid
    claim = Claim("m:default#1", ours, {"GPU-a": 5_000 * MIB}, settled=True)
    for game in (0, 3_000, 12_000):
        nvml.write(FakeDevice("GPU-a", used=5_200 + game, compute={ours: 5_000}, graphics={99: game}))
        accounts = account(probe.sample(0.0, ours), [claim])
        pool = accounts.devices["GPU-a"]
        assert pool.ours == 5_000 * MIB
        assert pool.external == (200 + game) * MIB
        assert accounts.instances["m:default#1"].measured


def test_a_process_that_computes_and_draws_counts_once(nvml: FakeNvml, probe: Probe) -> None:
    nvml.write(FakeDevice("GPU-a", compute={7: 300}, graphics={7: 300}))
    assert probe.sample().devices[0].processes == ((7, 300 * MIB),)


def test_memory_of_processes_may_be_unknown(nvml: FakeNvml, probe: Probe) -> None:
    nvml.write(FakeDevice("GPU-a", used=800, compute={7: None}))
    reading = probe.sample()
    assert reading.devices[0].processes == ((7, None),)
    pool = account(reading, [Claim("x", 7, {"GPU-a": 500 * MIB}, settled=True)]).devices["GPU-a"]
    assert (pool.ours, pool.external) == (500 * MIB, 300 * MIB)


@pytest.mark.parametrize("code", [NOT_SUPPORTED, NO_PERMISSION])
@pytest.mark.parametrize("call", ["utilisation", "compute", "graphics", "mig", "name", "uuid"])
def test_a_call_that_fails_costs_its_value_alone(nvml: FakeNvml, probe: Probe, call: str, code: int) -> None:
    nvml.write(
        FakeDevice("GPU-a", used=10, utilisation=5, compute={7: 3}, graphics={8: 1}, errors={call: code}),
        FakeDevice("GPU-b", used=20, utilisation=6),
    )
    first, second = probe.sample().devices
    assert second.used_bytes == 20 * MIB
    assert second.utilisation == 0.06
    assert first.used_bytes == 10 * MIB
    assert first.error is None
    assert first.utilisation == (None if call == "utilisation" else 0.05)
    assert first.uuid == ("nvidia-0" if call == "uuid" else "GPU-a")
    assert first.name == ("" if call == "name" else "NVIDIA Fake")
    named = dict(first.processes or ())
    assert set(named) == {7, 8} - {"compute": {7}, "graphics": {8}}.get(call, set())


def test_no_list_of_processes_is_not_an_empty_one(nvml: FakeNvml, probe: Probe) -> None:
    nvml.write(FakeDevice("GPU-a", errors={"compute": NOT_SUPPORTED, "graphics": NOT_SUPPORTED}))
    assert probe.sample().devices[0].processes is None
    nvml.write(FakeDevice("GPU-a"))
    assert probe.sample().devices[0].processes == ()


def test_memory_that_is_not_supported_is_unknown(nvml: FakeNvml, probe: Probe) -> None:
    nvml.write(FakeDevice("GPU-a", used=10, utilisation=7, errors={"memory": NOT_SUPPORTED}))
    reading = probe.sample()
    device = reading.devices[0]
    assert (device.total_bytes, device.used_bytes, device.error) == (None, None, None)
    assert device.utilisation == 0.07
    assert not reading.gpu_telemetry


@pytest.mark.parametrize("call", ["memory", "handle"])
@pytest.mark.parametrize("code", [GPU_IS_LOST, UNKNOWN])
def test_a_failing_device_does_not_hide_the_others(
    nvml: FakeNvml, probe: Probe, call: str, code: int
) -> None:
    healthy = FakeDevice("GPU-a", used=10), FakeDevice("GPU-b", used=20)
    nvml.write(*healthy)
    check(probe.sample(0.0))
    nvml.write(FakeDevice("GPU-a", used=10, errors={call: code}), healthy[1])
    for now in (LATER, LATER + 0.1):
        reading = probe.sample(now)
        sick, well = reading.devices
        assert sick.uuid == "GPU-a"
        assert (sick.total_bytes, sick.used_bytes) == (None, None)
        assert sick.error
        assert well.used_bytes == 20 * MIB
        accounts = account(reading, [])
        assert accounts.unknown == ("GPU-a",)
        assert accounts.device_wide.external == 20 * MIB
    nvml.write(*healthy)
    check(probe.sample(2 * LATER))


def test_driver_gone_and_back(nvml: FakeNvml, probe: Probe) -> None:
    device = FakeDevice("GPU-a", used=10, compute={7: 10})
    nvml.write(device)
    check(probe.sample(0.0))
    nvml.write(gone=DRIVER_NOT_LOADED)
    for now in (1.0, 1.5):
        reading = probe.sample(now)
        assert not reading.gpu_telemetry
        assert reading.sysmem_available is not None
        gone = reading.devices[0]
        assert (gone.uuid, gone.name) == ("GPU-a", "NVIDIA Fake")
        assert (gone.total_bytes, gone.used_bytes, gone.processes) == (None, None, None)
        assert gone.error == reading.problems[0]
        assert "Driver Not Loaded" in gone.error
        pool = account(reading, []).devices["GPU-a"]
        assert (pool.total, pool.external, pool.free) == (None, None, None)
    nvml.write(device)
    # It pauses between attempts, however often it is asked, and the handles of the first session are void.
    assert not probe.sample(1.9).gpu_telemetry
    check(probe.sample(2.1))


def test_pauses_grow_while_the_driver_is_away(nvml: FakeNvml, probe: Probe) -> None:
    nvml.write(init=DRIVER_NOT_LOADED)
    # Attempts at 0, 1, 3 and 7 fail; the next is due at 15.
    for now in (0.0, 1.0, 3.0, 7.0):
        assert probe.sample(now).devices == ()
    nvml.write(FakeDevice("GPU-a"))
    assert probe.sample(14.9).devices == ()
    check(probe.sample(15.0))


def test_every_device_lost_is_a_reason_to_begin_anew(nvml: FakeNvml, probe: Probe) -> None:
    nvml.write(FakeDevice("GPU-a", errors={"memory": UNKNOWN}))
    reading = probe.sample(0.0)
    assert "no device answers" in reading.problems[0]
    nvml.write(FakeDevice("GPU-a"))
    check(probe.sample(LATER))


def test_counting_fails(nvml: FakeNvml, probe: Probe) -> None:
    nvml.write(FakeDevice("GPU-a"), count_error=UNKNOWN)
    reading = probe.sample(0.0)
    assert reading.devices == ()
    assert "can't count devices" in reading.problems[0]


def test_a_machine_whose_last_device_was_taken_away(nvml: FakeNvml, probe: Probe) -> None:
    nvml.write(FakeDevice("GPU-a"))
    check(probe.sample(0.0))
    nvml.write()
    assert probe.sample(LATER).devices == ()


def test_mig_devices_are_devices_of_their_own(nvml: FakeNvml, probe: Probe) -> None:
    unsupported = {"utilisation": NOT_SUPPORTED}
    nvml.write(
        FakeDevice("GPU-whole", used=100),
        FakeDevice(
            "GPU-cut",
            total=80_000,
            used=7_000,
            errors=unsupported,
            parts=[
                FakeDevice("MIG-1", total=40_000, used=6_000, compute={7: 6_000}, errors=unsupported),
                FakeDevice("MIG-2", total=20_000, used=1_000, errors=unsupported),
            ],
        ),
    )
    reading = probe.sample()
    check(reading)
    assert [(d.uuid, d.kind, d.index, d.parent) for d in reading.devices] == [
        ("GPU-whole", "nvidia", 0, None),
        ("GPU-cut", "mig-parent", 1, None),
        ("MIG-1", "mig", 1, "GPU-cut"),
        ("MIG-2", "mig", 1, "GPU-cut"),
    ]
    assert reading.devices[2].processes == ((7, 6_000 * MIB),)
    assert reading.devices[2].utilisation is None
    wide = account(reading, [Claim("x", 7, settled=True)]).device_wide
    assert wide.total == (24_000 + 60_000) * MIB
    assert (wide.ours, wide.external) == (6_000 * MIB, 1_100 * MIB)


def test_mig_devices_that_may_not_be_seen(nvml: FakeNvml, probe: Probe) -> None:
    nvml.write(FakeDevice("GPU-cut", parts=[FakeDevice("MIG-1")], errors={"parts": NO_PERMISSION}))
    reading = probe.sample()
    assert [device.kind for device in reading.devices] == ["mig-parent"]
    assert "Insufficient Permissions" in (reading.devices[0].error or "")
    assert not reading.gpu_telemetry


def test_an_old_driver(tmp_path: Path) -> None:
    nvml = FakeNvml(build_library(tmp_path, old_driver=True), tmp_path / "state")
    nvml.write(FakeDevice("GPU-a", used=1_000, reserved=300, compute={7: 1_000}))
    with Probe(nvml.environment()) as probe:
        for _ in range(2):
            reading = probe.sample()
            check(reading)
            device = reading.devices[0]
            assert (device.used_bytes, device.reserved_bytes) == (1_300 * MIB, None)
            assert device.processes == ((7, 1_000 * MIB),)


def test_no_driver_at_all(tmp_path: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_text("not a library")
    with Probe({"LD_LIBRARY_PATH": str(tmp_path)}) as probe:
        reading = probe.sample()
    assert reading.devices == ()
    assert not reading.gpu_telemetry
    assert "there is no NVIDIA driver" in reading.problems[0]
    assert reading.sysmem_available
    wide = account(reading, []).device_wide
    assert (wide.total, wide.external, wide.free) == (None, None, None)


def test_a_driver_that_hangs_is_left_alone(nvml: FakeNvml, probe: Probe) -> None:
    device = FakeDevice("GPU-a", used=10)
    nvml.write(device)
    check(probe.sample(0.0))
    # The next call reads from a pipe into which nobody writes.
    nvml.state.unlink()
    os.mkfifo(nvml.state)
    probe.sample_in_background(0.1)
    pipe = writer_of(nvml.state)
    for _ in range(3):
        reading = probe.sample(0.2)
        assert reading.devices[0].used_bytes is None
        assert "not answered" in (reading.devices[0].error or "")
        assert reading.sysmem_available
    nvml.write(device)
    os.write(pipe, nvml.text(device).encode())
    os.close(pipe)
    until_deadline = time.monotonic() + PATIENCE
    while not (reading := probe.sample(0.3)).gpu_telemetry:
        assert time.monotonic() < until_deadline
    check(reading)


def writer_of(pipe: Path) -> int:
    """Open a named pipe for writing as soon as somebody reads it."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            assert time.monotonic() < deadline, "nobody reads"
            time.sleep(0.002)
        else:
            os.set_blocking(descriptor, True)
            return descriptor


# The real thing.


def real_devices() -> list[tuple[str, int]]:
    """UUID and MiB of each device, as nvidia-smi says; empty where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=uuid,memory.total", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    if answer.returncode:
        return []
    rows = [line.split(", ") for line in answer.stdout.splitlines() if line.strip()]
    return [(uuid, int(size)) for uuid, size in rows if size.isdecimal()]


if REAL := real_devices():

    def test_the_real_driver() -> None:
        with Probe() as probe:
            reading = probe.sample(0.0)
            check(reading)
            whole = [device for device in reading.devices if device.kind != "mig"]
            assert [(d.uuid, (d.total_bytes or 0) // MIB) for d in whole] == REAL
            assert reading.problems == ()
            check(probe.sample(LATER))
