"""Who holds the memory: tables, and properties that hold for anything a driver may say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamesh.core.memory import Accounts, Claim, Pool, account
from llamesh.core.readings import Device, Reading

GPU = "GPU-a"


def device(
    used: int | None, *processes: tuple[int, int | None], named: bool = True, total: int = 100
) -> Device:
    return Device(
        0, GPU, "Fake", "nvidia", total_bytes=total, used_bytes=used, processes=processes if named else None
    )


def on_gpu(claims: list[Claim], *devices: Device, calm: dict[str, int] | None = None) -> Accounts:
    return account(Reading(0.0, devices, trees={7: (7, 8), 9: (9,)}), claims, calm=calm)


def test_strangers_have_what_is_not_ours() -> None:
    accounts = on_gpu(
        [Claim("a", 7, {GPU: 30}, settled=True), Claim("b", 9, {GPU: 5}, settled=True)],
        device(70, (7, 20), (8, 5), (9, 10), (55, 30)),
    )
    assert accounts.devices[GPU] == Pool(total=100, ours=35, external=35, pending=0, free=30)
    assert accounts.device_wide == accounts.devices[GPU]
    assert dict(accounts.instances["a"].device_bytes) == {GPU: 25}
    assert accounts.instances["b"].all_devices == 10


def test_what_the_driver_keeps_is_nobodys() -> None:
    gpu = Device(0, GPU, "Fake", "nvidia", total_bytes=100, used_bytes=10, reserved_bytes=8, processes=())
    assert on_gpu([], gpu).devices[GPU] == Pool(92, 0, 10, 0, 82)


def test_a_load_counts_at_what_it_will_take() -> None:
    claim = Claim("a", 7, {GPU: 40})
    assert on_gpu([claim], device(10, (55, 10))).devices[GPU] == Pool(100, 0, 10, 40, 50)
    assert on_gpu([claim], device(35, (55, 10), (7, 25))).devices[GPU] == Pool(100, 25, 10, 15, 50)
    assert on_gpu([claim], device(60, (55, 10), (7, 50))).devices[GPU] == Pool(100, 50, 10, 0, 40)


def test_what_is_not_started_is_reserved() -> None:
    pool = on_gpu([Claim("a", None, {GPU: 40})], device(10, (55, 10))).devices[GPU]
    assert pool == Pool(100, 0, 10, 40, 50)


@pytest.mark.parametrize(
    "gpu",
    [device(70, named=False), device(70), device(70, (7, None)), device(70, (4711, 70))],
    ids=["no list", "empty list", "no sizes", "ids of another namespace"],
)
def test_where_a_loaded_one_is_not_named_its_own_figure_counts(gpu: Device) -> None:
    accounts = on_gpu([Claim("a", 7, {GPU: 30}, settled=True)], gpu)
    assert accounts.devices[GPU] == Pool(100, 30, 40, 0, 30)
    assert not accounts.instances["a"].measured
    assert accounts.instances["a"].all_devices == 30


def test_strangers_are_never_below_zero() -> None:
    loaded = Claim("a", 7, {GPU: 80}, settled=True)
    assert on_gpu([loaded], device(70, named=False)).devices[GPU] == Pool(100, 70, 0, 0, 30)
    assert on_gpu([loaded], device(70, (7, 75))).devices[GPU] == Pool(100, 70, 0, 0, 30)


def test_an_unseen_load_does_not_look_like_a_stranger() -> None:
    loading = Claim("a", 7, {GPU: 40})
    before = on_gpu([], device(10, named=False))
    assert dict(before.calm) == {GPU: 10}
    calm = dict(before.calm)
    for used, ours, pending in [(10, 0, 40), (30, 20, 20), (50, 40, 0)]:
        accounts = on_gpu([loading], device(used, named=False), calm=calm)
        assert accounts.devices[GPU] == Pool(100, ours, 10, pending, 50)
        assert dict(accounts.calm) == {GPU: 10}
    # More than the load explains: somebody else has come.
    assert on_gpu([loading], device(75, named=False), calm=calm).devices[GPU] == Pool(100, 40, 35, 0, 25)
    # And less than there was: somebody has left.
    assert on_gpu([loading], device(4, named=False), calm=calm).devices[GPU] == Pool(100, 0, 4, 40, 56)
    settled = on_gpu([Claim("a", 7, {GPU: 40}, settled=True)], device(65, named=False), calm=calm)
    assert dict(settled.calm) == {GPU: 25}


def test_an_unseen_load_from_the_first_look_on() -> None:
    # Nobody knows what was there before: better too little free than too much.
    pool = on_gpu([Claim("a", 7, {GPU: 40})], device(30, named=False)).devices[GPU]
    assert pool == Pool(100, 0, 30, 40, 30)


def test_unknown_is_not_zero() -> None:
    sick = Device(0, GPU, "Fake", "nvidia", error="lost")
    well = Device(1, "GPU-b", "Fake", "nvidia", total_bytes=50, used_bytes=5, processes=())
    accounts = on_gpu([Claim("a", 7, {GPU: 30}, settled=True)], sick, well, calm={GPU: 3})
    assert accounts.devices[GPU] == Pool(None, 30, None, 0, None)
    assert accounts.unknown == (GPU,)
    assert accounts.device_wide == Pool(50, 30, 5, 0, 45)
    assert dict(accounts.calm) == {GPU: 3, "GPU-b": 5}
    alone = on_gpu([], sick)
    assert alone.device_wide == Pool(None, 0, None, 0, None)
    assert on_gpu([]).device_wide == Pool(None, 0, None, 0, None)
    # Gone from the list for a while: what was calm is kept.
    assert dict(on_gpu([], calm={GPU: 3}).calm) == {GPU: 3}


def test_a_cut_gpu_is_the_sum_of_its_parts() -> None:
    cut = Device(0, GPU, "Fake", "mig-parent", total_bytes=100, used_bytes=30, processes=())
    parts = [
        Device(0, f"MIG-{n}", "Part", "mig", total_bytes=40, used_bytes=15, processes=(), parent=GPU)
        for n in (1, 2)
    ]
    accounts = on_gpu([], cut, *parts)
    assert set(accounts.devices) == {"MIG-1", "MIG-2"}
    assert accounts.device_wide == Pool(80, 0, 30, 0, 50)


def on_machine(claims: list[Claim], used_by: dict[int, int], mapped_by: dict[int, int] | None = None) -> Pool:
    reading = Reading(
        0.0, sysmem_total=100, sysmem_available=60, sysmem_used_by=used_by, sysmem_mapped_by=mapped_by or {}
    )
    return account(reading, claims).sysmem


def test_system_memory() -> None:
    assert on_machine([], {}) == Pool(100, 0, 40, 0, 60)
    loaded = Claim("a", 7, sysmem_bytes=50, settled=True)
    assert on_machine([loaded], {7: 15}) == Pool(100, 15, 25, 0, 60)
    # Not to be measured, but there.
    assert on_machine([loaded], {}) == Pool(100, 40, 0, 0, 60)
    assert on_machine([Claim("a", 7, sysmem_bytes=50)], {7: 15}) == Pool(100, 15, 25, 35, 25)
    assert on_machine([Claim("a", None, sysmem_bytes=50)], {}) == Pool(100, 0, 40, 50, 10)


def test_weights_on_a_device_leave_their_file_out() -> None:
    on_device = Claim("a", 7, sysmem_bytes=20, settled=True)
    assert on_machine([on_device], {7: 15}, {7: 30}) == Pool(100, 15, 25, 0, 60)
    in_memory = Claim("a", 7, sysmem_bytes=20, settled=True, mapped_counts=True)
    # The kernel calls those pages available, and the model needs them.
    assert on_machine([in_memory], {7: 15}, {7: 30}) == Pool(100, 45, 25, 0, 30)


def test_unknown_system_memory() -> None:
    accounts = account(Reading(0.0, sysmem_used_by={7: 5}), [Claim("a", 7, settled=True)])
    assert accounts.sysmem == Pool(None, 5, None, 0, None)
    assert accounts.instances["a"].sysmem_bytes == 5


sizes = st.integers(0, 200)
pids = st.sampled_from([7, 8, 9, 55])
claims = st.builds(
    Claim,
    id=st.uuids().map(str),
    pid=st.sampled_from([None, 7, 9]),
    device_bytes=st.dictionaries(st.sampled_from([GPU, "GPU-b"]), sizes),
    sysmem_bytes=sizes,
    settled=st.booleans(),
    mapped_counts=st.booleans(),
)
devices = st.builds(
    Device,
    index=st.just(0),
    uuid=st.sampled_from([GPU, "GPU-b"]),
    name=st.just("Fake"),
    kind=st.sampled_from(["nvidia", "mig", "mig-parent", "amd", "unified"]),
    total_bytes=st.none() | sizes,
    used_bytes=st.none() | sizes,
    processes=st.none() | st.lists(st.tuples(pids, st.none() | sizes), max_size=4).map(tuple),
)


@given(
    readings=st.lists(
        st.builds(
            Reading,
            taken=st.just(0.0),
            devices=st.lists(devices, max_size=2, unique_by=lambda d: d.uuid).map(tuple),
            sysmem_total=st.none() | sizes,
            sysmem_available=st.none() | sizes,
            sysmem_used_by=st.dictionaries(pids, sizes),
            sysmem_mapped_by=st.dictionaries(pids, sizes),
            trees=st.just({7: (7, 8), 9: (9,)}),
        ),
        max_size=3,
    ),
    claims=st.lists(claims, max_size=3, unique_by=lambda claim: claim.pid),
)
def test_the_sums_are_right_whatever_is_read(readings: list[Reading], claims: list[Claim]) -> None:
    calm: dict[str, int] = {}
    for reading in readings:
        accounts = account(reading, claims, calm=calm)
        calm = dict(accounts.calm)
        for pool in (*accounts.devices.values(), accounts.device_wide, accounts.sysmem):
            assert min(pool.ours, pool.pending) >= 0
            assert all(value is None or value >= 0 for value in (pool.total, pool.external, pool.free))
        for gpu in reading.devices:
            if gpu.holds_models:
                pool = accounts.devices[gpu.uuid]
                assert (pool.external is None) == (gpu.used_bytes is None)
                assert pool.external is None or pool.ours + pool.external == gpu.used_bytes
        assert set(accounts.instances) == {claim.id for claim in claims}
        assert account(reading, claims, calm=calm).calm == accounts.calm
