"""Tell a process that hangs from one that works silently.

llama-server that computes uses a CPU or a GPU; one that holds a request and uses neither, for the
whole window, never comes back. An idle instance is flat too, so only busy ones are looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

# Below these a process counts as flat: its timers and health checks cost about a tenth of it.
_CPU_SHARE = 0.005
_GPU_SHARE = 0.01


@dataclass(frozen=True, slots=True)
class Flat:
    """A process that has been flat since `since`; at the last look, `at`, it had used `cpu_seconds`."""

    since: float
    at: float
    cpu_seconds: float


def look(
    flat: Flat | None, *, now: float, busy: bool, cpu_seconds: float | None, gpu: float | None
) -> Flat | None:
    """The next state after one sample; None means that it works, is idle, or can't be judged.

    `cpu_seconds`: used by the process tree since its start, None when unknown. `gpu`: utilisation of
    the devices it may use, 0 to 1, None when unknown or not asked for.
    """
    if not busy or cpu_seconds is None or (gpu is not None and gpu > _GPU_SHARE):
        return None
    if flat is None:
        return Flat(now, now, cpu_seconds)
    if cpu_seconds - flat.cpu_seconds > _CPU_SHARE * max(now - flat.at, 0.001):
        return Flat(now, now, cpu_seconds)
    return Flat(flat.since, now, cpu_seconds)


def is_wedged(flat: Flat | None, *, window: float) -> bool:
    """Whether it has been flat for the whole `window` (seconds)."""
    return flat is not None and flat.at - flat.since >= window
