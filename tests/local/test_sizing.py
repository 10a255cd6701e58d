"""What a model will need: who is believed, which context fits, and files that can't be read."""

from __future__ import annotations

import dataclasses
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from llamesh.config.cookbook import FromArguments, HubFile, ModelPath, Profile
from llamesh.core.capacity import Need
from llamesh.core.model_header import GgufHeader
from llamesh.core.readings import Device
from llamesh.local import sizing as module
from llamesh.local.header_cache import HeaderCache
from llamesh.local.launch import Engine
from llamesh.local.sizing import Limits, Size, Sizing
from llamesh.telemetry.learned import LearnedValues
from tests.support.tiny_model import write_tiny_model

SERVER = Engine(("llama-server",), "path", "b1", frozenset({"--device", "--ctx-size"}))
EMBEDDED = Engine(("python",), "embedded", "0.1")
GPU = Device(0, "GPU-a", "Fake", "nvidia", total_bytes=24 << 30, used_bytes=0)
NO_LIMITS = Limits(None, None)


class House:
    """A sizing with its surroundings."""

    def __init__(
        self,
        tmp_path: Path,
        engine: Engine = SERVER,
        *,
        devices: Sequence[Device] = (),
        limits: Limits = NO_LIMITS,
        environ: Mapping[str, str] | None = None,
        headers: HeaderCache | None = None,
    ) -> None:
        self.learned = LearnedValues(tmp_path / "metrics.json")
        self.sizing = Sizing(engine, self.learned, environ or {}, headers or HeaderCache())
        self.devices, self.limits = devices, limits

    def of(self, profile: Profile) -> Size | None:
        return self.sizing.of(profile, self.devices, self.limits)

    async def look(self, profile: Profile) -> Size:
        await self.sizing.look(profile, self.devices, self.limits)
        size = self.of(profile)
        assert size is not None
        return size

    def learn(self, profile: Profile, vram: int, sysmem: int, context: int | None = None) -> None:
        self.learned.note_peak(self.sizing.argument_key(profile, context, self.devices), vram, sysmem)


def recipe(path: Path, *arguments: str, **more: Any) -> Profile:
    return Profile("m", "default", "", "", ModelPath(str(path)), arguments, **more)


@pytest.fixture
def long_model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "long.gguf", context=131_072)


async def test_unknown_until_looked_at_then_estimated(tmp_path: Path, tiny_model: Path) -> None:
    house, profile = House(tmp_path), recipe(tiny_model, "-c", "1024")
    assert house.of(profile) is None
    size = await house.look(profile)
    assert (size.source, size.context, size.too_large, size.cpu_only) == ("estimate", None, "", None)
    assert size.need.vram == 0
    assert 10 < size.need.sysmem < 40


async def test_on_a_gpu_and_without_it(tmp_path: Path, tiny_model: Path) -> None:
    profile = recipe(tiny_model, "-c", "1024")
    size = await House(tmp_path, devices=[GPU]).look(profile)
    assert size.need.vram > 200
    assert size.cpu_only is not None
    assert size.cpu_only.vram == 0
    # An engine that can't be told to keep off has no such choice; the embedded one has no GPU at all.
    blunt = dataclasses.replace(SERVER, flags=frozenset())
    size = await House(tmp_path, blunt, devices=[GPU]).look(profile)
    assert (size.need.vram > 200, size.cpu_only) == (True, None)
    assert (await House(tmp_path, EMBEDDED, devices=[GPU]).look(profile)).need.vram == 0


@pytest.mark.parametrize(
    ("arguments", "environ"),
    [(("-ngl", "0"), {}), (("--device", "none"), {}), ((), {"CUDA_VISIBLE_DEVICES": ""})],
)
async def test_a_gpu_that_it_may_not_use_isnt_counted(
    tmp_path: Path, tiny_model: Path, arguments: tuple[str, ...], environ: dict[str, str]
) -> None:
    house = House(tmp_path, devices=[GPU], environ=environ)
    assert (await house.look(recipe(tiny_model, *arguments))).need.vram == 0


async def test_the_cookbook_is_believed_before_measurement_before_estimate(
    tmp_path: Path, tiny_model: Path
) -> None:
    house, profile = House(tmp_path, devices=[GPU]), recipe(tiny_model, "-c", "1024", "-np", "2")
    await house.look(profile)
    house.learn(profile, 900, 300)
    house.learn(profile, 800, 400)
    size = house.of(profile)
    assert size is not None
    assert (size.need, size.source) == (Need(900, 400), "measured")
    told = dataclasses.replace(profile, estimated_vram_mb=5)
    size = await house.look(told)
    assert (size.need, size.source) == (Need(5, 400), "cookbook")
    told = dataclasses.replace(told, estimated_sysmem_mb=6)
    assert (await house.look(told)).need == Need(5, 6)


async def test_peaks_belong_to_the_exact_arguments_and_engine(tmp_path: Path, tiny_model: Path) -> None:
    house, profile = House(tmp_path), recipe(tiny_model, "-c", "1024", "-np", "2")
    house.learn(profile, 1, 222)
    for other in (
        recipe(tiny_model, "-np", "2", "-c", "1024"),
        recipe(tiny_model, "-c", "1024"),
        recipe(tiny_model.with_name("other.gguf"), "-c", "1024", "-np", "2"),
    ):
        assert (await house.look(other)).source != "measured"
    others = ((dataclasses.replace(SERVER, version="b2"), ()), (SERVER, (GPU,)))
    # Of one commit, with other arguments of cmake.
    for engine, devices in (*others, (dataclasses.replace(SERVER, build="b1-cuda"), ())):
        elsewhere = House(tmp_path, engine, devices=devices)
        elsewhere.learned.peaks = house.learned.peaks
        assert (await elsewhere.look(profile)).source == "estimate"
    # A new name for the same thing is the same thing.
    assert (await house.look(dataclasses.replace(profile, model="n"))).source == "measured"


async def test_with_another_engine_it_is_looked_anew(tmp_path: Path, tiny_model: Path) -> None:
    house, profile = House(tmp_path), recipe(tiny_model, "-c", "1024", "-np", "2")
    house.learn(profile, 1, 222)
    assert (await house.look(profile)).source == "measured"
    new = dataclasses.replace(SERVER, version="b2")
    house.sizing.use_engine(new)
    assert (await house.look(profile)).source == "estimate"
    # What still runs on the old one is learned under its name.
    old, now = (house.sizing.argument_key(profile, None, (), engine) for engine in (SERVER, new))
    assert old != now == house.sizing.argument_key(profile, None, ())


def test_no_secret_in_the_name_of_a_peak(tmp_path: Path) -> None:
    house = House(tmp_path)
    key = house.sizing.argument_key(recipe(tmp_path, "--api-key", "geheim", "--hf-token=auch"), None, ())
    assert "geheim" not in key
    assert "auch" not in key


async def test_the_largest_context_that_fits(tmp_path: Path, long_model: Path) -> None:
    profile = recipe(long_model, "-np", "1")
    whole = await House(tmp_path).look(profile)
    assert whole.context is None
    small = House(tmp_path, limits=Limits(None, whole.need.sysmem - 40))
    size = await small.look(profile)
    assert size.context is not None
    assert 8192 <= size.context < 131_072
    assert size.context % 256 == 0
    assert size.need.sysmem <= whole.need.sysmem - 40
    # What such an instance took doesn't say what the whole context takes.
    small.learn(profile, 0, 77, size.context)
    measured = small.of(profile)
    assert measured is not None
    assert (measured.need.sysmem, measured.context) == (77, size.context)
    larger = House(tmp_path)
    larger.learned.peaks = small.learned.peaks
    assert (await larger.look(profile)).source == "estimate"


async def test_a_context_that_the_profile_names_is_left_alone(tmp_path: Path, long_model: Path) -> None:
    house = House(tmp_path, limits=Limits(None, 20))
    for arguments in (("-c", "131072"), ("-c", "0")):
        size = await house.look(recipe(long_model, *arguments))
        assert (size.context, size.too_large) == (None, "")
        assert size.need.sysmem > 20


async def test_the_environment_s_context_is_not_what_it_gets(tmp_path: Path, long_model: Path) -> None:
    # Without -c, `-c 0` is passed, which wins.
    house = House(tmp_path, environ={"LLAMA_ARG_CTX_SIZE": "1024"})
    assert await house.look(recipe(long_model)) == await House(tmp_path).look(recipe(long_model))


async def test_too_little_for_a_context_that_is_worth_it(tmp_path: Path, long_model: Path) -> None:
    least = await House(tmp_path).look(recipe(long_model, "-np", "1", "-c", "8192"))
    house = House(tmp_path, limits=Limits(None, least.need.sysmem - 3))
    size = await house.look(recipe(long_model, "-np", "1"))
    assert size.too_large.startswith("not even 8192 tokens of context fit")
    would = int(size.too_large.partition("-c ")[2].rstrip(")"))
    assert 256 <= would < 8192
    fitting = await house.look(recipe(long_model, "-np", "1", "-c", str(would)))
    assert fitting.need.sysmem <= least.need.sysmem - 3
    size = await House(tmp_path, limits=Limits(None, 1)).look(recipe(long_model))
    assert size.too_large.endswith("no context fits")
    # Who says what it takes isn't doubted.
    told = recipe(long_model, "-np", "1", estimated_sysmem_mb=3)
    size = await House(tmp_path, limits=Limits(None, 1)).look(told)
    assert (size.too_large, size.context, size.need.sysmem) == ("", None, 3)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no model" * 99, b"GGUF\x03\0\0\0" + b"\xff" * 64, None])
async def test_a_file_that_says_nothing(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "bad.gguf"
    if content is not None:
        path.write_bytes(content)
    size = await House(tmp_path).look(recipe(path))
    assert (size.need, size.source, size.context) == (Need(), "unknown", None)
    told = await House(tmp_path).look(recipe(path, estimated_sysmem_mb=50))
    assert (told.need, told.source) == (Need(0, 50), "cookbook")


async def test_a_part_that_is_missing(tmp_path: Path, tiny_model: Path) -> None:
    missing = str(tmp_path / "missing.gguf")
    for flag in ("-md", "--mmproj", "--lora"):
        assert (await House(tmp_path).look(recipe(tiny_model, flag, missing))).source == "unknown"


@pytest.mark.parametrize(
    ("source", "known"),
    [
        (HubFile("a/b", None), False),
        (FromArguments("--model-url", "x"), False),
        (FromArguments("-m", "MODEL"), True),
    ],
)
async def test_other_sources(tmp_path: Path, tiny_model: Path, source: Any, *, known: bool) -> None:
    arguments: tuple[str, ...] = ()
    if isinstance(source, FromArguments):
        source = dataclasses.replace(source, value=str(tiny_model))
        arguments = (source.flag, source.value)
    profile = dataclasses.replace(recipe(tiny_model, *arguments), source=source)
    assert (await House(tmp_path).look(profile)).source == ("estimate" if known else "unknown")


async def test_what_nobody_foresaw_costs_the_estimate_only(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("of no head")

    monkeypatch.setattr(module, "estimate", broken)
    assert (await House(tmp_path).look(recipe(tiny_model, "-c", "512"))).source == "unknown"


async def test_a_file_that_was_replaced_is_read_anew(tmp_path: Path, tiny_model: Path) -> None:
    path = tmp_path / "m.gguf"
    shutil.copy(tiny_model, path)
    house, profile = House(tmp_path), recipe(path)
    before = await house.look(profile)
    await house.sizing.forget_replaced()
    assert house.of(profile) == before
    other = write_tiny_model(tmp_path / "other.gguf", context=131_072)
    os.replace(other, path)
    await house.sizing.forget_replaced()
    assert house.of(profile) is None
    assert (await house.look(profile)).need.sysmem > before.need.sysmem
    path.unlink()
    await house.sizing.forget_replaced()
    assert (await house.look(profile)).source == "unknown"
    os.link(tiny_model, path)
    await house.sizing.forget_replaced()
    assert (await house.look(profile)).need == before.need


async def test_forgotten_on_request_and_with_other_limits(tmp_path: Path, tiny_model: Path) -> None:
    house, profile = House(tmp_path), recipe(tiny_model)
    await house.look(profile)
    house.limits = Limits(None, 4000)
    assert house.of(profile) is None
    await house.look(profile)
    house.devices = (GPU,)
    assert house.of(profile) is None
    await house.look(profile)
    house.sizing.forget(profile)
    assert house.of(profile) is None
    house.sizing.forget(profile)


class Hanging(HeaderCache):
    """A mount that answers for some files only when it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.free = threading.Event()
        self.asked: list[str] = []

    def read(self, path: str | os.PathLike[str]) -> GgufHeader:
        self.asked.append(os.fspath(path))
        if "hanging" in os.fspath(path):
            self.free.wait(60)
        return super().read(path)


async def test_a_file_that_hangs_is_given_up(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.05)
    path = tmp_path / "hanging.gguf"
    shutil.copy(tiny_model, path)
    mount = Hanging()
    house, profile = House(tmp_path, headers=mount), recipe(path)
    try:
        assert (await house.look(profile)).source == "unknown"
        # One thread hangs, not one for each look; other files are read all the while.
        for _ in range(20):
            house.sizing.forget(profile)
            assert (await house.look(profile)).source == "unknown"
        assert mount.asked == [str(path)]
        monkeypatch.setattr(module, "_LOOK_SECONDS", 10.0)
        assert (await house.look(dataclasses.replace(recipe(tiny_model), model="other"))).source == "estimate"
        await house.sizing.forget_replaced()
    finally:
        mount.free.set()
    with trio.fail_after(20):
        while house.sizing._hangs(str(path)):
            await trio.sleep(0.005)
    house.sizing.forget(profile)
    assert (await house.look(profile)).source == "estimate"


async def test_two_profiles_of_one_file_at_the_same_time(tmp_path: Path, tiny_model: Path) -> None:
    house = House(tmp_path)
    profiles = [dataclasses.replace(recipe(tiny_model), id=str(number)) for number in range(12)]
    async with trio.open_nursery() as nursery:
        for profile in profiles:
            nursery.start_soon(house.look, profile)
    assert {size.source for profile in profiles if (size := house.of(profile))} == {"estimate"}


async def test_a_file_that_hangs_is_unreachable_until_it_answers(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.05)
    path = tmp_path / "hanging.gguf"
    shutil.copy(tiny_model, path)
    mount = Hanging()
    house, profile = House(tmp_path, headers=mount), recipe(path)
    try:
        assert f"{path} doesn't answer" in (await house.look(profile)).unreachable
        assert (await house.look(recipe(tiny_model))).unreachable == ""
    finally:
        mount.free.set()
    with trio.fail_after(20):
        while house.sizing._hangs(str(path)):
            await trio.sleep(0.005)
    assert house.of(profile) is None, "it isn't looked at again"
    monkeypatch.setattr(module, "_LOOK_SECONDS", 10.0)
    size = await house.look(profile)
    assert (size.source, size.unreachable) == ("estimate", "")


async def test_a_mount_that_goes_away_makes_what_was_known_unreachable(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.gguf"
    shutil.copy(tiny_model, path)
    house, profile = House(tmp_path), recipe(path)
    assert (await house.look(profile)).source == "estimate"
    away, real = threading.Event(), module._stamp

    def stamp(name: str) -> module.Stamp | None:
        away.wait(60)
        return real(name)

    monkeypatch.setattr(module, "_stamp", stamp)
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.05)
    try:
        await house.sizing.forget_replaced()
        size = house.of(profile)
        assert size is not None
        assert size.unreachable
        assert size.source == "estimate"
    finally:
        away.set()
    with trio.fail_after(20):
        while house.sizing._hangs(str(path)):
            await trio.sleep(0.005)
    size = house.of(profile)
    assert size is not None
    assert size.unreachable == ""
