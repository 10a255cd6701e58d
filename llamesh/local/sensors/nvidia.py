"""NVIDIA devices through NVML (pynvml), MIG devices included.

How it fails
    A call that one device doesn't support costs that value alone. A device that fails costs that device. When
    the driver is gone (unloaded, updated, suspended), all devices that were there stay in the list with
    unknown values, and NVML is opened anew with growing pauses. A GPU that fell off the bus needs that as
    well to be seen again. A driver that hangs is left alone: one call waits for it, the others don't.

NVML's own documentation of the calls is in nvml.h; a GPU's index here is NVML's, which is the order of PCI
addresses.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from llamesh.core.readings import Device, DeviceKind

LIBRARY = "libnvidia-ml.so.1"

_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 60.0
# MIG devices come and go while the driver stays.
_ENUMERATE_SECONDS = 30.0

# pynvml's numbers of NVML_ERROR_*; spelled out because the module is loaded only where there is a driver.
_UNINITIALIZED, _NOT_SUPPORTED, _NOT_FOUND = 1, 3, 6
_DRIVER_NOT_LOADED, _FUNCTION_NOT_FOUND, _GPU_IS_LOST, _RESET_REQUIRED = 9, 13, 15, 16
_INVALID_ARGUMENT, _VERSION_MISMATCH = 2, 25

_SESSION_LOST = frozenset({_UNINITIALIZED, _DRIVER_NOT_LOADED})
_DEVICE_LOST = frozenset({_GPU_IS_LOST, _RESET_REQUIRED})
# An answer, not a failure: this driver or this device doesn't have the value.
_NOT_THERE = frozenset({_NOT_SUPPORTED, _FUNCTION_NOT_FOUND})
# What drivers without the second version of a call say to it.
_TRY_OLDER = frozenset({_FUNCTION_NOT_FOUND, _VERSION_MISMATCH, _INVALID_ARGUMENT, _NOT_SUPPORTED})


class _SessionLost(Exception):
    """The driver doesn't know us any more."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """A device as enumerated. `handle` is None where the driver refuses one, and `device` says why."""

    handle: Any
    device: Device


class NvidiaSensor:
    """All NVIDIA devices of this machine. Opened by the first `read`, which may run in any thread."""

    def __init__(self) -> None:
        self.problem: str | None = None
        self._nvml: Any = None
        self._entries: tuple[_Entry, ...] | None = None
        self._last: tuple[Device, ...] = ()
        self._enumerate_at = 0.0
        self._reopen_at: float | None = None
        self._pause = _FIRST_PAUSE
        self._old_memory_call = False
        self._busy = threading.Lock()
        self._broken: list[int] = []

    def read(self, trees: Mapping[int, tuple[int, ...]], now: float) -> tuple[Device, ...]:
        """The devices now; see `GpuSensor`. Doesn't raise for anything that NVML answers."""
        if not self._busy.acquire(blocking=False):
            self.problem = "NVML: the driver has not answered the last question"
            return self._unknown(self.problem)
        try:
            return self._read(now)
        finally:
            self._busy.release()

    def close(self) -> None:
        """Shut NVML down, unless the driver hangs."""
        if self._busy.acquire(blocking=False):
            try:
                self._shut()
            finally:
                self._busy.release()

    def _read(self, now: float) -> tuple[Device, ...]:
        if self._reopen_at is not None and now >= self._reopen_at:
            self._shut()
            self._reopen_at = None
        if self._entries is None and self._reopen_at is not None:
            return self._unknown(self.problem)
        try:
            if self._entries is None:
                self._open()
            if self._entries is None or now >= self._enumerate_at:
                self._entries = self._enumerate()
                self._enumerate_at = now + _ENUMERATE_SECONDS
            self._broken.clear()
            devices = tuple(self._measure(entry) for entry in self._entries)
        except _SessionLost as lost:
            self._shut()
            self.problem = f"NVML: {lost}"
            self._reopen_later(now)
            return self._unknown(self.problem)
        self.problem = None
        self._last = devices
        if devices and all(device.error and device.used_bytes is None for device in devices):
            self.problem = f"NVML: no device answers: {devices[0].error}"
            self._reopen_later(now)
        elif any(code in _DEVICE_LOST for code in self._broken):
            self._reopen_later(now)
        else:
            self._reopen_at, self._pause = None, _FIRST_PAUSE
        if self._broken:
            self._enumerate_at = now  # The handle may be what is wrong.
        return devices

    def _reopen_later(self, now: float) -> None:
        if self._reopen_at is None:
            self._reopen_at = now + self._pause
            self._pause = min(self._pause * 2, _LONGEST_PAUSE)

    def _unknown(self, why: str | None) -> tuple[Device, ...]:
        """The devices that were there, as far as they don't change."""
        return tuple(
            Device(d.index, d.uuid, d.name, d.kind, error=why or "unknown", parent=d.parent)
            for d in self._last
        )

    # The session.

    def _open(self) -> None:
        if self._nvml is None:
            # pynvml takes 20 ms and 6 MB: not where it can't be of use.
            try:
                ctypes.CDLL(LIBRARY)
            except OSError as error:
                self._pause = _LONGEST_PAUSE
                raise _SessionLost(f"there is no NVIDIA driver here ({error})") from None
            import pynvml

            self._nvml = pynvml
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError as error:
            raise _SessionLost(f"can't be opened: {error}") from None
        self._entries = ()
        self._enumerate_at = 0.0
        self._old_memory_call = False

    def _shut(self) -> None:
        if self._entries is not None:
            self._entries = None
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()

    def _enumerate(self) -> tuple[_Entry, ...]:
        nvml = self._nvml
        try:
            count = nvml.nvmlDeviceGetCount()
        except nvml.NVMLError as error:
            raise _SessionLost(f"can't count devices: {error}") from None
        entries: list[_Entry] = []
        for index in range(count):
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
            except nvml.NVMLError as error:
                self._check(error)
                entries.append(_Entry(None, self._missing(index, str(error))))
                continue
            entries += self._with_parts(index, handle)
        return tuple(entries)

    def _missing(self, index: int, why: str) -> Device:
        """A device without a handle: under its old name, where it had one."""
        for known in self._last:
            if known.index == index and known.kind != "mig":
                return Device(index, known.uuid, known.name, known.kind, error=why)
        return Device(index, f"nvidia-{index}", "", "nvidia", error=why)

    def _with_parts(self, index: int, handle: Any) -> list[_Entry]:
        """A GPU and, if it was cut, its MIG devices."""
        nvml = self._nvml
        mode = self._ask(lambda: nvml.nvmlDeviceGetMigMode(handle)[0])
        if mode != nvml.NVML_DEVICE_MIG_ENABLE:
            return [_Entry(handle, self._describe(handle, index, "nvidia"))]
        gpu = self._describe(handle, index, "mig-parent")
        entries = [_Entry(handle, gpu)]
        for place in range(self._ask(lambda: nvml.nvmlDeviceGetMaxMigDeviceCount(handle)) or 0):
            try:
                part = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, place)
            except nvml.NVMLError as error:
                self._check(error)
                # Most places are empty.
                if error.value not in (_NOT_FOUND, _INVALID_ARGUMENT):
                    entries[0] = _Entry(handle, replace(gpu, error=f"MIG device {place}: {error}"))
                continue
            device = self._describe(part, index, "mig", fallback=f"{gpu.uuid}/{place}")
            entries.append(_Entry(part, replace(device, parent=gpu.uuid)))
        return entries

    def _describe(self, handle: Any, index: int, kind: DeviceKind, *, fallback: str = "") -> Device:
        uuid = self._ask(lambda: self._nvml.nvmlDeviceGetUUID(handle))
        name = self._ask(lambda: self._nvml.nvmlDeviceGetName(handle))
        return Device(index, uuid or fallback or f"nvidia-{index}", name or "", kind)

    # One device.

    def _measure(self, entry: _Entry) -> Device:
        if entry.handle is None:
            self._broken.append(_NOT_FOUND)
            return entry.device
        nvml, handle, device = self._nvml, entry.handle, entry.device
        total = used = reserved = None
        error = device.error
        try:
            total, used, reserved = self._memory(handle)
        except nvml.NVMLError as problem:
            self._check(problem)
            if problem.value not in _NOT_THERE:
                self._broken.append(problem.value)
                error = f"memory: {problem}"
        percent = self._ask(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        return replace(
            device,
            total_bytes=total,
            used_bytes=used,
            reserved_bytes=reserved,
            utilisation=None if percent is None else percent / 100,
            processes=self._processes(handle),
            error=error,
        )

    def _memory(self, handle: Any) -> tuple[int, int, int | None]:
        """Total, used and reserved bytes; the first version of the call counts reserved as used."""
        nvml = self._nvml
        if not self._old_memory_call:
            try:
                info = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
            except nvml.NVMLError as error:
                if error.value not in _TRY_OLDER:
                    raise
                self._old_memory_call = error.value == _FUNCTION_NOT_FOUND
            else:
                return info.total, info.used, info.reserved
        info = nvml.nvmlDeviceGetMemoryInfo(handle)
        return info.total, info.used, None

    def _processes(self, handle: Any) -> tuple[tuple[int, int | None], ...] | None:
        """Process ids with their bytes. One that computes and draws is in both lists, with one figure."""
        nvml = self._nvml
        held: dict[int, int | None] = {}
        answered = False
        for newer, older in (
            (nvml.nvmlDeviceGetComputeRunningProcesses_v3, nvml.nvmlDeviceGetComputeRunningProcesses_v2),
            (nvml.nvmlDeviceGetGraphicsRunningProcesses_v3, nvml.nvmlDeviceGetGraphicsRunningProcesses_v2),
        ):
            listed = self._ask_list(newer, handle)
            if listed is None:
                listed = self._ask_list(older, handle)
            if listed is None:
                continue
            answered = True
            for process in listed:
                bytes_, before = process.usedGpuMemory, held.get(process.pid)
                held[process.pid] = before if bytes_ is None else max(bytes_, before or 0)
        return tuple(held.items()) if answered else None

    def _ask_list(self, call: Callable[[Any], list[Any]], handle: Any) -> list[Any] | None:
        answer: list[Any] | None = self._ask(lambda: call(handle))
        return answer

    def _ask(self, question: Callable[[], Any]) -> Any:
        """The answer, or None where the driver has none for us."""
        try:
            return question()
        except self._nvml.NVMLError as error:
            self._check(error)
            return None

    def _check(self, error: Any) -> None:
        if error.value in _SESSION_LOST:
            raise _SessionLost(str(error)) from None
        if error.value in _DEVICE_LOST:
            self._broken.append(error.value)
