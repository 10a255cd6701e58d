"""Memory on a real node: of a GPU that only a library pretends, and the machine's own."""

from __future__ import annotations

import contextlib
import json
import shutil
import stat
import subprocess
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio

from tests.end_to_end.cookbooks import (
    ask,
    ask_well,
    cookbook,
    entry_of,
    error_of,
    pid_of,
    processes_in,
    profile,
    wait_document,
)
from tests.support.fake import FAKE_LLAMA_SERVER, fake_profile_file, launches
from tests.support.fake_nvml import DRIVER_NOT_LOADED, FakeDevice, FakeNvml, build_library
from tests.support.node import Node, running_node, wait_until

TOTAL = 24_000
STRANGER = 999_999  # no process: the driver may say what it likes


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_library(tmp_path_factory.mktemp("nvml"))


class Gpu:
    """One device, and who holds how much of it (MiB)."""

    def __init__(self, library: Path, directory: Path) -> None:
        self.nvml = FakeNvml(library, directory / "nvml")
        self.held: dict[int, int] = {}
        self.show()

    def show(self, held: Mapping[int, int] | None = None) -> None:
        """These processes hold so much from now on; without, what they held before."""
        self.held = dict(self.held if held is None else held)
        used = sum(self.held.values())
        self.nvml.write(FakeDevice("GPU-a", total=TOTAL, used=used, compute=dict(self.held)))

    def lose(self) -> None:
        """The driver goes away; `show` brings it back."""
        self.nvml.write(gone=DRIVER_NOT_LOADED)


@pytest.fixture
def gpu(library: Path, tmp_path: Path) -> Gpu:
    return Gpu(library, tmp_path)


@contextlib.asynccontextmanager
async def node_with(
    tmp_path: Path,
    gpu: Gpu | None,
    config: Mapping[str, Any] | None = None,
    *,
    binary: Path = FAKE_LLAMA_SERVER,
    **models: Any,
) -> AsyncIterator[Node]:
    settings = {"model_defaults": {"min_eviction_tenure_secs": 0}, **(config or {})}
    environment = gpu.nvml.environment() if gpu is not None else {}
    recipes = cookbook(**models)
    async with running_node(
        tmp_path / "node", recipes, settings, binary_path=binary, env=environment
    ) as node:
        yield node


def fake(tmp_path: Path, name: str, vram: int | None = None, **behaviour: Any) -> dict[str, Any]:
    more: dict[str, Any] = {} if vram is None else {"estimated_vram_mb": vram}
    return profile(fake_profile_file(tmp_path, name, **behaviour), **more)


async def state_of(node: Node, condition: Callable[[Any], bool] = lambda state: True) -> Any:
    """The node's own entry in the list of nodes, as soon as `condition` holds."""
    found = await wait_document(node, "/cluster/nodes", lambda d: condition(d["nodes"]["node-a"]))
    return found["nodes"]["node-a"]


def newest(node: Node, model: str) -> str:
    """The id of the instance of a model that was started last."""
    started = [str(event["instance"]) for event in node.find_events("starting")]
    return [instance for instance in started if instance.startswith(f"{model}:default#")][-1]


async def gone(node: Node, model: str) -> str:
    """Wait until the newest instance of a model has left; why it did."""
    await wait_until(
        lambda: any(str(e["instance"]).startswith(f"{model}:") for e in node.find_events("starting")),
        f"{model} wasn't started",
    )
    return str((await node.wait_event("gone", instance=newest(node, model)))["reason"])


async def test_what_does_not_fit_beside_another_takes_its_place(tmp_path: Path, gpu: Gpu) -> None:
    models: Any = {name: fake(tmp_path, name, 15_000) for name in "ab"}
    async with node_with(tmp_path, gpu, **models, small=fake(tmp_path, "small", 3_000)) as node:
        state = await state_of(node)
        assert state["gpu_telemetry_available"] is True
        assert (state["device_vram_total_mb"], state["max_vram_mb"]) == (TOTAL, 21_600)
        await ask_well(node, "a")
        assert (await state_of(node))["reserved_vram_mb"] == 15_000
        await ask_well(node, "small")
        await ask_well(node, "b")
        assert await gone(node, "a") == "room for b:default"
        state = await state_of(node)
        assert state["loaded_models"] == ["b:default", "small:default"]
        assert state["reserved_vram_mb"] == 18_000
        assert state["available_vram"] == 3_600
        assert state["evictions"] == {"room": 1}
        await ask_well(node, "a")
        assert await node.stop() == 0


async def test_what_never_fits_is_refused_and_evicts_nobody(tmp_path: Path, gpu: Gpu) -> None:
    models: Any = {"a": fake(tmp_path, "a", 15_000), "vast": fake(tmp_path, "vast", 30_000)}
    async with node_with(tmp_path, gpu, **models) as node:
        await ask_well(node, "a")
        reply = await ask(node, "vast")
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "30")
        assert error_of(reply)["type"] == "no_capacity"
        for part in ("vast:default", "30000 MiB", "21600 MiB", "max_vram_mb"):
            assert part in error_of(reply)["message"]
        state = await state_of(node)
        assert state["loaded_models"] == ["a:default"]
        assert state["evictions"] == {}
        assert launches(tmp_path / "vast.json") == []


async def test_max_vram_mb_is_all_that_instances_get(tmp_path: Path, gpu: Gpu) -> None:
    models: Any = {name: fake(tmp_path, name, 5_000) for name in "ab"}
    models["c"] = fake(tmp_path, "c", 9_000)
    async with node_with(tmp_path, gpu, {"max_vram_mb": 8_000}, **models) as node:
        for name in "abab":
            await ask_well(node, name)
            assert (await state_of(node))["reserved_vram_mb"] == 5_000
        assert "8000 MiB may be used here (max_vram_mb)" in error_of(await ask(node, "c"))["message"]


async def test_a_stranger_gets_the_memory_that_it_takes(tmp_path: Path, gpu: Gpu) -> None:
    models: Any = {name: fake(tmp_path, name, 6_000) for name in "ab"}
    gate = tmp_path / "gate"
    async with node_with(tmp_path, gpu, **models) as node, trio.open_nursery() as nursery:
        await ask_well(node, "a")
        await ask_well(node, "b")
        ours = {pid_of(node, f"{name}:default"): 6_000 for name in "ab"}
        gpu.show(ours)
        await state_of(node, lambda state: state["device_vram_used_mb"] == 12_000)
        said: list[str] = []

        async def talk() -> None:
            said.append(await ask_well(node, "a", fake={"gate": str(gate)}))

        nursery.start_soon(talk)
        await wait_document(node, "/metrics/json", lambda d: d["current_requests"] == 1)
        gpu.show({**ours, STRANGER: 11_000})
        assert await gone(node, "b") == "other programs need the memory"
        gpu.show({pid_of(node, "a:default"): 6_000, STRANGER: 17_000})
        # Busy: it ends what it has.
        await node.wait_event("draining", instance=newest(node, "a"))
        reply = await ask(node, "b")
        assert error_of(reply)["type"] == "no_capacity"
        assert "other programs leave 4600 MiB" in error_of(reply)["message"]
        gate.touch()
        await gone(node, "a")
        state = await state_of(node, lambda state: not state["active_instances"])
        assert state["external_vram_mb"] == 17_000
        assert state["evictions"] == {"strangers": 2}
        # The game ends.
        gpu.show({})
        await state_of(node, lambda state: state["external_vram_mb"] == 0)
        await ask_well(node, "b")
    assert len(said[0].split()) == 5


async def test_a_driver_that_goes_leaves_the_unknown(tmp_path: Path, gpu: Gpu) -> None:
    models: Any = {name: fake(tmp_path, name, 12_000) for name in "ab"}
    async with node_with(tmp_path, gpu, **models) as node:
        await ask_well(node, "a")
        gpu.show({pid_of(node, "a:default"): 12_000})
        await state_of(node, lambda state: state["device_vram_used_mb"] == 12_000)
        gpu.lose()
        state = await state_of(node, lambda state: not state["gpu_telemetry_available"])
        assert state["device_vram_used_mb"] is state["external_vram_mb"] is None
        # What there was in all is known all the same, and what ours need.
        assert (state["max_vram_mb"], state["reserved_vram_mb"]) == (21_600, 12_000)
        await ask_well(node, "a")
        await ask_well(node, "b")
        assert (await state_of(node))["loaded_models"] == ["b:default"]
        assert len(launches(tmp_path / "a.json")) == 1
        gpu.show({})
        await state_of(node, lambda state: state["gpu_telemetry_available"])
        assert await node.stop() == 0
    assert node.errors == []


FLAGS_AND_FAKE = """#!/bin/sh
case "$1" in
--version) echo "version: 1 (fake)"; exit 0;;
--help) printf '%s\\n' '--host H' '--port P' '-c, --ctx-size N' '-ngl, --gpu-layers N' '-dev, --device D'
    exit 0;;
esac
echo "$@" >> {log}
shift 2
exec {fake} -m {behaviour} "$@"
"""


async def test_embeddings_go_to_the_cpu_rather_than_evict_a_chat(
    tmp_path: Path, gpu: Gpu, tiny_model: Path
) -> None:
    behaviour, log, engine = fake_profile_file(tmp_path, "any"), tmp_path / "log", tmp_path / "engine"
    engine.write_text(FLAGS_AND_FAKE.format(log=log, fake=FAKE_LLAMA_SERVER, behaviour=behaviour))
    engine.chmod(engine.stat().st_mode | stat.S_IXUSR)
    models: Any = {
        "talk": profile(tiny_model, estimated_vram_mb=20_000),
        "embed": profile(tiny_model, "--embedding -c 1024", estimated_vram_mb=5_000),
    }
    async with node_with(tmp_path, gpu, binary=engine, **models) as node:
        await ask_well(node, "talk")
        document = {"model": "embed", "input": "one"}
        reply = await node.client.post("/v1/embeddings", json=document)
        assert reply.status_code == 200, reply.text
        state = await state_of(node)
        assert state["loaded_models"] == ["embed:default", "talk:default"]
        assert state["reserved_vram_mb"] == 20_000
        assert state["evictions"] == {}
        talk, embed = log.read_text().splitlines()
        assert "--gpu-layers 0 --device none" in embed
        assert "--device" not in talk


async def test_the_context_that_fits_is_passed_and_shown(tmp_path: Path, endless_model: Path) -> None:
    behaviour, log, engine = fake_profile_file(tmp_path, "any"), tmp_path / "log", tmp_path / "engine"
    engine.write_text(FLAGS_AND_FAKE.format(log=log, fake=FAKE_LLAMA_SERVER, behaviour=behaviour))
    engine.chmod(engine.stat().st_mode | stat.S_IXUSR)
    models: Any = {"long": profile(endless_model, "-np 1")}
    async with node_with(tmp_path, None, {"max_sysmem_mb": 48}, binary=engine, **models) as node:
        await ask_well(node, "long")
        [words] = log.read_text().splitlines()
        context = int(words.split(" -c ")[1].split()[0])
        assert 8192 <= context < 131_072
        entry = await entry_of(node, "long")
        assert entry["context_length"] == context
        assert entry["metadata"]["parsed_model_params"]["n_ctx"] == context
        stats = (await state_of(node))["model_stats"]["long:default"]
        assert 0 < stats["estimated_sysmem_mb"] <= 48
    async with node_with(tmp_path, None, {"max_sysmem_mb": 20}, binary=engine, **models) as node:
        error = error_of(await ask(node, "long"))
        assert error["type"] == "no_capacity"
        assert "8192 tokens" in error["message"]


@contextlib.contextmanager
def program(directory: Path) -> Iterator[tuple[str, Callable[[], subprocess.Popen[bytes]]]]:
    """The name of a program that nobody else runs, and how to start it."""
    name = f"game{uuid.uuid4().hex[:10]}"
    path = directory / name
    sleep = shutil.which("sleep")
    assert sleep is not None
    shutil.copy(sleep, path)
    running: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        running.append(subprocess.Popen([path, "600"]))
        return running[-1]

    try:
        yield name, start
    finally:
        for process in running:
            process.kill()
            process.wait()


async def test_the_machine_is_left_to_a_program_that_its_owner_named(tmp_path: Path) -> None:
    with program(tmp_path) as (name, start):
        models: Any = {"a": fake(tmp_path, "a")}
        async with node_with(tmp_path, None, {"yield_to": ["another", name]}, **models) as node:
            await ask_well(node, "a")
            running = start()
            assert name in await gone(node, "a")
            reply = await ask(node, "a")
            assert reply.status_code == 503
            assert error_of(reply)["type"] == "draining"
            assert name in error_of(reply)["message"]
            assert (await node.client.get("/readyz")).status_code == 503
            running.kill()
            running.wait()
            await ready_again(node)
            await ask_well(node, "a")


async def ready_again(node: Node) -> None:
    await wait_document(node, "/readyz", lambda document: document["status"] == "ready")


async def test_a_start_that_fails_for_memory_is_tried_again_after_others_left(tmp_path: Path) -> None:
    ending = {
        "code": 1,
        "lines": ["ggml_backend_cuda_buffer_type_alloc_buffer: cudaMalloc failed: out of memory"],
    }
    models: Any = {
        "idle": fake(tmp_path, "idle"),
        "large": fake(tmp_path, "large", launches=[{"exit_at_start": ending}, {}]),
    }
    async with node_with(tmp_path, None, **models) as node:
        await ask_well(node, "idle")
        await ask_well(node, "large")
        assert await gone(node, "idle") == "room for large:default"
        assert len(launches(tmp_path / "large.json")) == 2
        assert (await state_of(node))["loaded_models"] == ["large:default"]


async def test_a_hung_child_is_ended_and_replaced(tmp_path: Path) -> None:
    models: Any = {
        "a": fake(tmp_path, "a", launches=[{"hang_before_head": True}, {}]),
        "b": fake(tmp_path, "b"),
    }
    wedge = {"enabled": True, "window_ms": 500, "sample_interval_ms": 100}
    async with node_with(tmp_path, None, {"wedge_detector": wedge}, **models) as node:
        await ask_well(node, "b")
        reply = await ask(node, "a")
        assert reply.status_code == 502
        assert "without using CPU or GPU" in error_of(reply)["message"]
        assert "a:default" in error_of(reply)["message"]
        await node.wait_event("hung", instance=newest(node, "a"))
        await ask_well(node, "a")
        assert len(launches(tmp_path / "a.json")) == 2
        # Idle is flat as well, but holds nobody's request.
        assert len(launches(tmp_path / "b.json")) == 1


async def test_peaks_are_learned_and_read_again(tmp_path: Path, gpu: Gpu) -> None:
    models: Any = {"a": fake(tmp_path, "a", eat_mb=60), "b": fake(tmp_path, "b", 15_000)}

    async with node_with(tmp_path, gpu, **models) as node:
        await state_of(node, lambda s: s["model_stats"]["a:default"]["estimate_source"] == "unknown")
        await ask_well(node, "a")
        gpu.show({pid_of(node, "a:default"): 9_000})
        await state_of(node, lambda s: s["model_stats"]["a:default"]["estimated_vram_mb"] == 9_000)
        gpu.show({pid_of(node, "a:default"): 7_000})
        held = await state_of(node, lambda s: s["model_stats"]["a:default"]["vram_mb"] == 7_000)
        assert held["model_stats"]["a:default"]["estimated_vram_mb"] == 9_000
        assert await node.stop() == 0
    gpu.show({})
    peaks = json.loads((tmp_path / "node" / "node-metrics.json").read_text())["peaks"]
    assert [peak["vram_mb"] for peak in peaks.values()] == [9_000]
    assert "key-of-the-child" not in json.dumps(peaks)
    async with node_with(tmp_path, gpu, **models) as node:
        state = await state_of(node, lambda s: s["model_stats"]["a:default"]["estimate_source"] == "measured")
        found = state["model_stats"]["a:default"]
        assert found["estimated_vram_mb"] == 9_000
        assert found["estimated_sysmem_mb"] >= 60
        await ask_well(node, "b")
        # Nobody had to try: the two don't fit together, and that is known.
        await ask_well(node, "a")
        assert (await state_of(node))["loaded_models"] == ["a:default"]


async def test_real_memory_is_guarded(tmp_path: Path) -> None:
    models: Any = {}
    for name in "abc":
        models[name] = fake(tmp_path, name, eat_mb=120) | {"estimated_sysmem_mb": 150}
    worst = 0
    async with node_with(tmp_path, None, {"max_sysmem_mb": 350}, **models) as node:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_well, node, "a")
            nursery.start_soon(ask_well, node, "b")
        for name in "cab":
            await ask_well(node, name)
            worst = max(worst, _resident(node))
            state = await state_of(node)
            assert state["reserved_sysmem_mb"] <= 350
            assert len(node.children()) <= 2
        assert await node.stop() == 0
    assert 200 < worst <= 350
    assert processes_in(tmp_path) == []


def _resident(node: Node) -> int:
    """MiB of all children, what they share with others left out."""
    total = 0
    for child in node.children():
        with contextlib.suppress(psutil.NoSuchProcess):
            total += child.memory_full_info().uss
    return total >> 20


async def test_real_children_take_what_was_estimated(
    tmp_path: Path, endless_model: Path, engine_binary: Path | None
) -> None:
    models: Any = {
        "short": profile(endless_model, "-c 1024 -np 1"),
        "long": profile(endless_model, "-c 131072 -np 1"),
    }
    async with running_node(tmp_path, cookbook(**models), binary_path=engine_binary) as node:

        def all_from(source: str) -> Callable[[Any], bool]:
            return lambda state: all(
                state["model_stats"][f"{model}:default"]["estimate_source"] == source for model in models
            )

        estimated = (await state_of(node, all_from("estimate")))["model_stats"]
        for model in models:
            await ask_well(node, model)
        measured = (await state_of(node, all_from("measured")))["model_stats"]

    def growth(values: Any, name: str) -> float:
        return float(values["long:default"][name] - values["short:default"][name])

    # What an engine takes without a model isn't compared (Python and its libraries, for the embedded one).
    # Of what a longer context adds, the cache is there at once, and the room to compute in is reserved: on a
    # CPU it becomes resident as longer prompts come by. So what is measured at first is the lesser part.
    cache_mib = (131_072 - 1024) * 256 / (1 << 20)
    grown = growth(measured, "sysmem_mb")
    assert 0.75 * cache_mib < grown < 1.25 * growth(estimated, "estimated_sysmem_mb")
