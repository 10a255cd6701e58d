"""What instances may take and what they are counted with, as sensors come, go and hang."""

from __future__ import annotations

import dataclasses
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import trio

from llamesh.config.cookbook import Cookbook, ModelPath, Profile
from llamesh.config.current import Current
from llamesh.config.settings import Settings
from llamesh.core.capacity import Budget, Need
from llamesh.core.lifecycle import State
from llamesh.core.readings import Device, Reading
from llamesh.local import memory as module
from llamesh.local.instance import Instance
from llamesh.local.launch import Engine, Launch, build_launch
from llamesh.local.memory import Memory
from llamesh.local.sensors import Sensors
from llamesh.telemetry.learned import LearnedValues

MIB = 1 << 20
ENGINE = Engine(("llama-server",), "path", "b1", frozenset({"--device"}))


NOTHING = Need()


class Scripted(Sensors):
    """Sensors that say what they are told, or hang until `free` is set."""

    def __init__(self) -> None:
        self.reading = Reading(0.0)
        self.free: threading.Event | None = None
        self.closed = 0

    def sample(self, pids: Any, *, now: float) -> Reading:
        if self.free is not None:
            self.free.wait(60)
        return self.reading

    def close(self) -> None:
        self.closed += 1


@dataclass
class Stub:
    """The part of an instance that counts here."""

    profile: Profile
    need: Need = NOTHING
    pid: int | None = 7
    id: str = "m:default#1"
    on_cpu: bool = False
    state: State = State.READY
    was_ready: bool = True
    created: float = -1000.0
    ready_after: float = 1.0
    context: int | None = None
    engine: Engine = ENGINE
    launch: Launch = field(init=False)

    def __post_init__(self) -> None:
        self.launch = build_launch(self.profile, ENGINE, host="127.0.0.1", port=1, context=self.context)

    @property
    def child(self) -> Stub | None:
        return None if self.pid is None else self


def instance(*arguments: str, **more: Any) -> Instance:
    return cast(Instance, Stub(Profile("m", "default", "", "", ModelPath("/m.gguf"), arguments), **more))


def gpu(
    used: int | None = 0,
    *processes: tuple[int, int | None],
    number: int = 0,
    named: bool = True,
    total: int | None = 10_000,
) -> Device:
    """Sizes in MiB."""
    pairs = tuple((pid, None if size is None else size * MIB) for pid, size in processes)
    return Device(
        number,
        f"GPU-{number}",
        "Fake",
        "nvidia",
        total_bytes=None if total is None else total * MIB,
        used_bytes=None if used is None else used * MIB,
        processes=pairs if named else None,
    )


class House:
    """A memory with its surroundings."""

    def __init__(self, tmp_path: Path, **settings: Any) -> None:
        self.sensors = Scripted()
        self.learned = LearnedValues(tmp_path / "metrics.json")
        current = Current(Settings(node_id="a", **settings), Cookbook((), {}))
        self.memory = Memory(current, ENGINE, self.learned, self.sensors)

    async def see(self, *devices: Device, instances: tuple[Instance, ...] = (), **system: Any) -> None:
        used = {pid: size * MIB for pid, size in system.pop("used_by", {}).items()}
        total, available = system.pop("total", None), system.pop("available", None)
        self.sensors.reading = Reading(
            0.0,
            devices,
            sysmem_total=None if total is None else total * MIB,
            sysmem_available=None if available is None else available * MIB,
            sysmem_used_by=used,
            trees={pid: (pid,) for pid in used},
            **system,
        )
        await self.memory.sample(list(instances))

    @property
    def vram(self) -> tuple[int | None, int | None]:
        budget = self.memory.budget()
        return budget.vram, budget.vram_now

    @property
    def sysmem(self) -> tuple[int | None, int | None]:
        budget = self.memory.budget()
        return budget.sysmem, budget.sysmem_now


@pytest.fixture(autouse=True)
def no_visible_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


# The budget.


async def test_nothing_is_known_before_the_first_look_nor_without_sensors(tmp_path: Path) -> None:
    house = House(tmp_path, max_instances_per_node=3)
    assert house.memory.budget() == Budget(3)
    await house.see()
    assert house.memory.budget() == Budget(3)


async def test_a_tenth_stays_free(tmp_path: Path) -> None:
    house = House(tmp_path)
    await house.see(gpu(), total=1000, available=1000)
    assert (house.vram, house.sysmem) == ((9000, 9000), (900, 900))
    # Also beside strangers: what is full can't get fuller, and they may need more.
    await house.see(gpu(4000, (55, 4000)), total=1000, available=700)
    assert (house.vram, house.sysmem) == ((9000, 5000), (900, 600))
    await house.see(gpu(9900, (55, 9900)), total=1000, available=1)
    assert house.vram[1] is not None
    assert house.vram[1] <= 0


@pytest.mark.parametrize(
    ("limit", "strangers", "expected"),
    [
        (3000, 1000, (3000, 3000)),
        (3000, 7000, (3000, 2000)),
        (10_000, 1000, (10_000, 9000)),
        (9500, 1000, (9500, 8500)),
        (99_000, 0, (10_000, 10_000)),
        (0, 0, (0, 0)),
    ],
)
async def test_a_configured_limit(
    tmp_path: Path, limit: int, strangers: int, expected: tuple[int, int]
) -> None:
    house = House(tmp_path, max_vram_mb=limit)
    await house.see(gpu(strangers, (55, strangers)))
    assert house.vram == expected


async def test_a_configured_limit_holds_without_sensors(tmp_path: Path) -> None:
    house = House(tmp_path, max_vram_mb=3000, max_sysmem_mb=500)
    await house.see()
    assert (house.vram, house.sysmem) == ((3000, 3000), (500, 500))


async def test_only_devices_that_children_may_use_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = House(tmp_path)
    both = gpu(), gpu(5000, (55, 5000), number=1)
    await house.see(*both)
    assert house.vram == (18_000, 13_000)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert house.vram == (9000, 9000)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert house.memory.budget() == Budget(100)


async def test_a_device_that_fails_is_unknown_not_full(tmp_path: Path) -> None:
    house = House(tmp_path)
    first, second = gpu(1000, (55, 1000)), gpu(2000, (55, 2000), number=1)
    await house.see(first, second)
    assert house.vram == (18_000, 15_000)
    await house.see(first, gpu(None, named=False, total=None, number=1))
    assert house.vram == (18_000, 17_000)
    # The driver is gone: the device is still as large as it was.
    silent = gpu(None, named=False, total=None), gpu(None, named=False, total=None, number=1)
    await house.see(*silent, problems=("NVML: gone",))
    assert house.vram == (18_000, 18_000)
    await house.see(first, second)
    assert house.vram == (18_000, 15_000)


async def test_a_driver_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SAMPLE_LIMIT", 0.05)
    house, one = House(tmp_path), instance(need=Need(4000, 10))
    await house.see(gpu(3000, (7, 3000)), instances=(one,), used_by={7: 5}, total=100, available=90)
    assert house.memory.held(one) == Need(3000, 5)
    house.sensors.free = threading.Event()
    try:
        await house.memory.sample([one])
        assert house.memory.accounts is None
        assert house.memory.reading is None
        assert (house.vram, house.sysmem) == ((9000, 9000), (90, 90))
        # Not measured: what was reserved for it.
        assert house.memory.held(one) is None
        assert house.memory.charge(one) == Need(4000, 10)
    finally:
        house.sensors.free.set()
    await house.see(gpu(3000, (7, 3000)), instances=(one,), used_by={7: 5}, total=100, available=90)
    assert house.memory.charge(one) == Need(3000, 5)


# What instances count with.


async def test_a_reservation_counts_until_it_has_settled(tmp_path: Path) -> None:
    house, now = House(tmp_path), trio.current_time()
    loading = instance(need=Need(4000, 100), was_ready=False, state=State.STARTING, created=now)
    fresh = instance(need=Need(4000, 100), created=now - 5, ready_after=4.5)
    settled = instance(need=Need(4000, 100))
    for one, expected in ((loading, Need(4000, 100)), (fresh, Need(4000, 100)), (settled, Need(1000, 30))):
        await house.see(gpu(1000, (7, 1000)), instances=(one,), used_by={7: 30})
        assert house.memory.held(one) == Need(1000, 30)
        assert house.memory.charge(one) == expected
    # More than was reserved counts at once.
    await house.see(gpu(5000, (7, 5000)), instances=(loading,), used_by={7: 130})
    assert house.memory.charge(loading) == Need(5000, 130)


async def test_one_that_has_no_process_yet_counts(tmp_path: Path) -> None:
    house, one = House(tmp_path), instance(need=Need(4000, 100), pid=None, was_ready=False)
    await house.see(gpu(), instances=(one,))
    assert house.memory.charge(one) == Need(4000, 100)


@pytest.mark.parametrize(
    "device",
    [gpu(5000, named=False), gpu(5000, (7, None)), gpu(5000, (4711, 5000)), gpu(None, named=False)],
    ids=["no list", "no sizes", "ids of another namespace", "nothing at all"],
)
async def test_where_the_driver_names_nobody_the_reservation_counts(tmp_path: Path, device: Device) -> None:
    house, one = House(tmp_path), instance(need=Need(4000, 100))
    await house.see(device, instances=(one,), used_by={7: 30})
    assert house.memory.held(one) is None
    assert house.memory.charge(one) == Need(4000, 100)
    assert house.learned.peaks == {}
    assert house.vram[1] == (8000 if device.used_bytes else 9000)


async def test_a_need_that_nobody_knows_isnt_learned_as_none(tmp_path: Path) -> None:
    house, one = House(tmp_path), instance()
    await house.see(gpu(5000, named=False), instances=(one,), used_by={7: 30})
    assert house.learned.peaks == {}


async def test_peaks_are_learned_from_those_that_have_settled(tmp_path: Path) -> None:
    house = House(tmp_path)
    now = trio.current_time()
    fresh = instance("-c", "512", created=now, ready_after=0.1)
    on_cpu = instance("-c", "256", on_cpu=True)
    for one in (fresh, on_cpu):
        await house.see(gpu(1000, (7, 1000)), instances=(one,), used_by={7: 30})
        assert house.learned.peaks == {}
    settled = instance("-c", "512")
    for vram, sysmem in ((1000, 30), (1500, 20), (900, 10)):
        await house.see(gpu(vram, (7, vram)), instances=(settled,), used_by={7: sysmem})
    [peak] = house.learned.peaks.values()
    assert (peak.vram_mb, peak.sysmem_mb) == (1500, 30)


async def test_a_peak_belongs_to_the_engine_that_it_was_seen_on(tmp_path: Path) -> None:
    """While the node moves to another one, instances of both run."""
    house = House(tmp_path)
    new = dataclasses.replace(ENGINE, version="b2")
    house.memory.use_engine(new)
    for engine, vram in ((ENGINE, 1500), (new, 900)):
        one = instance("-c", "512", engine=engine)
        await house.see(gpu(vram, (7, vram)), instances=(one,), used_by={7: 30})
    seen = {key.split("\x1f")[0]: peak.vram_mb for key, peak in house.learned.peaks.items()}
    assert seen == {"b1": 1500, "b2": 900}


async def test_a_reduced_context_has_a_peak_of_its_own(tmp_path: Path) -> None:
    house = House(tmp_path)
    for context in (None, 9216, 16_384):
        one = instance(context=context)
        await house.see(gpu(1000, (7, 1000)), instances=(one,), used_by={7: 30})
    assert len(house.learned.peaks) == 3


# Looking.


async def test_looking_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLE_SECONDS", 0.01)
    house, looked = House(tmp_path), 0
    enough = trio.Event()

    def note() -> None:
        nonlocal looked
        looked += 1
        if looked == 5:
            enough.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(house.memory.run, list, note)
        with trio.fail_after(20):
            await enough.wait()
        nursery.cancel_scope.cancel()
    assert house.sensors.closed == 1


async def test_a_program_that_is_named_is_found(tmp_path: Path) -> None:
    own = psutil.Process().name()
    house = House(tmp_path, yield_to=["no-such-program-runs-here", own])
    await house.see()
    assert house.memory.intruder == own
    house = House(tmp_path, yield_to=["no-such-program-runs-here"])
    await house.see()
    assert house.memory.intruder == ""
