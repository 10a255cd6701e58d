"""One row of the flag table, and short ways to write one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llamesh.local.engine import values as v
from llamesh.local.engine.late import Member, SamplingMarks

PRIORITIES = {
    number: Member("ggml_sched_priority", f"GGML_SCHED_PRIO_{name}")
    for number, name in {"-1": "LOW", "0": "NORMAL", "1": "MEDIUM", "2": "HIGH", "3": "REALTIME"}.items()
}
CACHE_TYPE = v.member(
    "ggml_type", "GGML_TYPE_", ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
)
TEMPLATE = "default_template_kwargs"
OVERRIDES = "tensor_buft_overrides"


@dataclass(frozen=True)
class Flag:
    """One row. A flag without `convert` is a switch and sets `constant`."""

    names: tuple[str, ...]
    paths: tuple[str, ...]
    placeholder: str = ""
    convert: v.Convert | None = None
    constant: object = True
    then: Callable[[Any], Mapping[str, object]] | None = None
    """More fields that follow from the value."""


def takes(names: str, placeholder: str, convert: v.Convert, *paths: str, mark: str = "", **more: Any) -> Flag:
    """A flag with a value. `mark` is the sampling setting that counts as the user's choice from then on."""
    if mark:
        more["then"] = lambda _: {"sampling.user_sampling_config": SamplingMarks(frozenset({mark}))}
    return Flag(tuple(names.split()), paths, placeholder, convert, **more)


def switch(names: str, *paths: str, value: object = True, **more: Any) -> Flag:
    """A flag without a value."""
    return Flag(tuple(names.split()), paths, constant=value, **more)


def toggle(on: str, off: str, *paths: str, inverted: bool = False) -> tuple[Flag, Flag]:
    """A pair of flags, one for each state. `inverted`: the field says the opposite of the flag."""
    return switch(on, *paths, value=not inverted), switch(off, *paths, value=inverted)


def cpu_flags(names: Mapping[str, str], path: str) -> tuple[Flag, ...]:
    """The flags for one set of threads, spelled as `names` says, for the CPU parameters at `path`."""

    def valid(_: object) -> Mapping[str, object]:
        return {f"{path}.mask_valid": True}

    return (
        takes(names["threads"], "N", v.threads, f"{path}.n_threads"),
        takes(names["mask"], "HEX", v.cpu_mask, f"{path}.cpumask", then=valid),
        takes(names["range"], "LOW-HIGH", v.cpu_range, f"{path}.cpumask", then=valid),
        takes(names["strict"], "0|1", v.one_of({"0": False, "1": True}), f"{path}.strict_cpu"),
        takes(names["priority"], "N", v.one_of(PRIORITIES), f"{path}.priority"),
        takes(names["poll"], "0..100", v.integer(0, 100), f"{path}.poll"),
    )
