"""What an instance of a profile will need, known before it starts.

In this order: what the cookbook says (`estimated_vram_mb`, `estimated_sysmem_mb`), what was measured
when these very arguments ran with this engine (`LearnedValues.peaks`), and the estimate from the GGUF
header. The header is read in a thread, since a file may lie on a mount that hangs; until then the
profile's size is "not known yet", and its requests wait for it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

import trio

from llamesh.config.cookbook import FromArguments, ModelPath, Profile
from llamesh.core.capacity import Need
from llamesh.core.devices import visible_devices
from llamesh.core.footprint import estimate, largest_context
from llamesh.core.memory_arguments import MemoryArguments, read_memory_arguments
from llamesh.core.model_header import GgufHeader
from llamesh.core.readings import Device
from llamesh.local.gguf import BadGguf
from llamesh.local.header_cache import HeaderCache
from llamesh.local.launch import Engine, child_environment, redacted, source_arguments
from llamesh.telemetry.learned import LearnedValues
from llamesh.telemetry.logs import get_logger

log = get_logger("sizing")

T = TypeVar("T")

# Size, modification time (ns) and inode of a file.
Stamp: TypeAlias = tuple[int, int, int]

MIB = 1 << 20

_UNLIMITED = 1 << 62

# A look at a header takes a millisecond. On a mount that hangs it is given up after this.
_LOOK_SECONDS = 10.0

# Threads that may look at the same time. More files than that hang only where all mounts do.
_LOOKS_AT_ONCE = 8

# An engine that lists one of these can be told to keep off the GPU.
_DEVICE_FLAGS = frozenset({"-dev", "--device"})

# Below this, a context isn't worth starting a model for (contract).
_SMALLEST_CONTEXT = 8192


@dataclass(frozen=True, slots=True)
class Size:
    """What one instance needs. `context`: tokens to start it with, None to leave that to the profile.

    `cpu_only`: what it would need without a GPU, None where it is the same. `source` says where the
    numbers are from: "cookbook", "measured", "estimate" or "unknown". `too_large`: why no context that
    is worth it fits, naming what would; `unreachable`: why the file can't be read just now.
    """

    need: Need
    context: int | None = None
    cpu_only: Need | None = None
    source: str = "unknown"
    too_large: str = ""
    unreachable: str = ""

    def needed(self, *, on_cpu: bool) -> Need:
        """With or without a GPU."""
        return self.cpu_only if on_cpu and self.cpu_only is not None else self.need


@dataclass(frozen=True, slots=True)
class Limits:
    """What instances may take at the most, in MiB; None for no limit. Sizes are computed for these."""

    vram: int | None
    sysmem: int | None


@dataclass(frozen=True, slots=True)
class _Known:
    """What a look found, and what it was found for. `stamp` tells whether the file is still the same one."""

    key: tuple[object, ...]
    size: Size
    path: str | None
    stamp: Stamp | None
    blind: bool = False  # the file didn't answer


class _Visit:
    """A thread that touches files: the one it is at, and whether it has come back."""

    def __init__(self) -> None:
        self.path = ""
        self.ended = threading.Event()


class Sizing:
    """Sizes of profiles; `of` never waits."""

    def __init__(
        self, engine: Engine, learned: LearnedValues, environ: Mapping[str, str], headers: HeaderCache
    ) -> None:
        self._engine = engine
        self._learned = learned
        self._environ = child_environment(environ, api_key="")
        self._headers = headers
        self._known: dict[str, _Known] = {}  # by profile key
        self._hanging: dict[str, _Visit] = {}  # files that a thread was left alone with
        # Of its own: threads that hang must not be taken from those who look at the sensors.
        self._threads = trio.CapacityLimiter(_LOOKS_AT_ONCE)

    def use_engine(self, engine: Engine) -> None:
        """What is started from now on runs another engine: sizes are found out anew."""
        if engine is not self._engine:
            self._engine = engine
            self._known.clear()

    def argument_key(
        self, profile: Profile, context: int | None, devices: Sequence[Device], engine: Engine | None = None
    ) -> str:
        """Name of an exact argument list, on an engine (the present one) and so many GPUs, in the learned
        values; no secrets in it. `context`: the one that is passed where the profile names none.
        """
        words = redacted([*source_arguments(profile), *profile.arguments])
        if context is not None:
            words += ["-c", str(context)]
        gpus = len(visible_devices(devices, self._environ, profile.arguments).devices)
        return "\x1f".join([(engine or self._engine).identity, f"gpus={gpus}", *words])

    def of(self, profile: Profile, devices: Sequence[Device], limits: Limits) -> Size | None:
        """The size of `profile`; None while it isn't known yet: then `look`, and ask again."""
        known = self._known.get(profile.key)
        if known is None or known.key != self._key(profile, devices, limits) or self._answers_again(known):
            return None
        size = known.size
        peak = self._learned.peaks.get(self.argument_key(profile, size.context, devices))
        vram, sysmem, source = size.need.vram, size.need.sysmem, size.source
        if peak is not None:
            vram, sysmem, source = peak.vram_mb, peak.sysmem_mb, "measured"
        if profile.estimated_vram_mb is not None:
            vram, source = profile.estimated_vram_mb, "cookbook"
        if profile.estimated_sysmem_mb is not None:
            sysmem, source = profile.estimated_sysmem_mb, "cookbook"
        unreachable = ""
        if known.path is not None and self._hangs(known.path):
            unreachable = f"{known.path} doesn't answer: is it on a network disk that is away?"
        return replace(size, need=Need(vram, sysmem), source=source, unreachable=unreachable)

    async def look(self, profile: Profile, devices: Sequence[Device], limits: Limits) -> None:
        """Read what is needed for `of`. Never raises for what is in a file; returns within seconds."""
        key = self._key(profile, devices, limits)
        known = self._known.get(profile.key)
        if known is not None and known.key == key and not self._answers_again(known):
            return
        visible = visible_devices(devices, self._environ, profile.arguments).devices
        has_gpu = bool(visible) and self._engine.origin != "embedded"
        path = model_file(profile)
        size, stamp, blind = Size(Need()), None, False
        if path is not None:

            def visit(at: _Visit) -> tuple[Size, Stamp | None]:
                at.path = path
                return self._size(profile, path, has_gpu, limits), _stamp(path)

            found = None if self._hangs(path) else await self._visit(visit)
            if found is None:
                log.warning("the model's file doesn't answer; its size is unknown", profile=profile.key)
                blind = True
            else:
                size, stamp = found
        self._known[profile.key] = _Known(key, size, path, stamp, blind)

    def forget(self, profile: Profile) -> None:
        """Look anew next time: the file may have changed."""
        self._known.pop(profile.key, None)

    async def forget_replaced(self) -> None:
        """Forget the sizes of files that aren't what they were. Bounded, like `look`."""
        known = {
            key: found for key, found in self._known.items() if found.path and not self._hangs(found.path)
        }
        paths = sorted({found.path for found in known.values() if found.path})

        def visit(at: _Visit) -> dict[str | None, Stamp | None]:
            stamps: dict[str | None, Stamp | None] = {}
            for at.path in paths:
                stamps[at.path] = _stamp(at.path)
            return stamps

        now = await self._visit(visit) if paths else None
        for key, found in known.items():
            replaced = now is not None and now[found.path] != found.stamp
            if replaced and self._known.get(key) is found:
                del self._known[key]

    def _key(self, profile: Profile, devices: Sequence[Device], limits: Limits) -> tuple[object, ...]:
        uuids = tuple(device.uuid for device in devices)
        given = (profile.estimated_vram_mb, profile.estimated_sysmem_mb)
        return (profile.source, profile.arguments, given, uuids, limits)

    def _answers_again(self, known: _Known) -> bool:
        return known.blind and known.path is not None and not self._hangs(known.path)

    def _hangs(self, path: str) -> bool:
        visit = self._hanging.get(path)
        return visit is not None and not visit.ended.is_set()

    async def _visit(self, work: Callable[[_Visit], T]) -> T | None:
        """`work`, which touches files, in a thread; None where it has to be left alone with one."""
        visit = _Visit()

        def in_thread() -> T:
            try:
                return work(visit)
            finally:
                visit.ended.set()

        with trio.move_on_after(_LOOK_SECONDS):
            return await trio.to_thread.run_sync(in_thread, abandon_on_cancel=True, limiter=self._threads)
        self._hanging[visit.path] = visit
        return None

    def _size(self, profile: Profile, path: str, gpu: bool, limits: Limits) -> Size:
        """In a thread: files are touched here."""
        try:
            arguments = read_memory_arguments(profile.arguments, self._environ)
            # Unless the profile has it, the child is started with a context, whatever its environment says.
            own = read_memory_arguments(profile.arguments, {})
            arguments = replace(arguments, context=own.context)
            files = _Files(
                self._headers.read(path),
                self._optional(arguments.draft),
                self._optional(arguments.projector),
                sum(os.path.getsize(adapter) for adapter in arguments.adapters),
            )
            # What the cookbook says about memory isn't doubted: it limits the context no more.
            given = profile.estimated_vram_mb is not None, profile.estimated_sysmem_mb is not None
            limits = Limits(None if given[0] else limits.vram, None if given[1] else limits.sysmem)
            context, too_large = _context(files, arguments, gpu, limits)
            if context is not None:
                arguments = replace(arguments, context=context)
            need = files.need(arguments, gpu=gpu)
            cpu_only = None
            if gpu and not self._engine.flags.isdisjoint(_DEVICE_FLAGS):
                cpu_only = files.need(replace(arguments, gpu_layers=0, use_devices=False), gpu=False)
        except (BadGguf, OSError) as error:
            # The engine will say so itself, to the caller of the request.
            log.debug("no estimate", profile=profile.key, error=str(error))
            return Size(Need())
        # The border to files of any origin: a header that nobody foresaw costs the estimate, not the node.
        except Exception as error:
            log.warning("no estimate", profile=profile.key, error=f"{type(error).__name__}: {error}")
            return Size(Need())
        return Size(need, context, cpu_only, "estimate", too_large)

    def _optional(self, path: str | None) -> GgufHeader | None:
        return None if path is None else self._headers.read(path)


@dataclass(frozen=True, slots=True)
class _Files:
    """All that an instance loads."""

    model: GgufHeader
    draft: GgufHeader | None
    projector: GgufHeader | None
    adapter_bytes: int

    def need(self, arguments: MemoryArguments, *, gpu: bool) -> Need:
        """In MiB, rounded up."""
        found = estimate(
            self.model,
            arguments,
            gpu=gpu,
            draft=self.draft,
            projector=self.projector,
            adapter_bytes=self.adapter_bytes,
        )
        return Need(-(-found.total_gpu // MIB), -(-found.total_cpu // MIB))


def _context(files: _Files, arguments: MemoryArguments, gpu: bool, limits: Limits) -> tuple[int | None, str]:
    """The context to pass where the profile names none and the whole doesn't fit; why none does."""
    if arguments.context is not None:
        return None, ""

    budget_gpu = None
    if gpu:
        budget_gpu = _UNLIMITED if limits.vram is None else limits.vram * MIB

    def fit(floor: int) -> int | None:
        return largest_context(
            files.model,
            arguments,
            budget_gpu,
            None if limits.sysmem is None else limits.sysmem * MIB,
            floor,
            draft=files.draft,
            projector=files.projector,
            adapter_bytes=files.adapter_bytes,
        )

    best = fit(_SMALLEST_CONTEXT)
    if best is None:
        smaller = fit(256)
        least = min(_SMALLEST_CONTEXT, files.model.context_length or _SMALLEST_CONTEXT)
        would = f"a context of {smaller} tokens would fit (-c {smaller})" if smaller else "no context fits"
        return None, f"not even {least} tokens of context fit beside its weights; {would}"
    return (best if best < files.model.context_length else None), ""


def model_file(profile: Profile) -> str | None:
    """The path of the profile's GGUF file on this machine; None where it has none."""
    if isinstance(profile.source, ModelPath):
        return profile.source.path
    if isinstance(profile.source, FromArguments) and profile.source.flag in ("-m", "--model"):
        return profile.source.value
    return None


def _stamp(path: str) -> Stamp | None:
    """Of the file as it is now, None where there is none. Blocking."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino
