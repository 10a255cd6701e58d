"""Figures and names as people read them."""

from __future__ import annotations

import re

# What a terminal takes as more than text: all controls but tab and newline. Names and lines of a log come
# from anywhere in the mesh. Halves of surrogates can't be written at all: Python makes them of a file's name
# that isn't UTF-8.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def clean(text: str) -> str:
    """Text that can't steer a terminal."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)


def one_line(text: str) -> str:
    """The same without newlines and tabs."""
    return clean(" ".join(text.split()))


def size(mib: float | None) -> str:
    """MiB in words: `812 MiB`, `23.4 GiB`."""
    if mib is None:
        return "?"
    return f"{mib:.0f} MiB" if mib < 1000 else f"{mib / 1024:.1f} GiB"


def of_size(part: float | None, whole: float | None) -> str:
    """A share of memory: `3.1/24.0 GiB`; `-` where there is none."""
    if not whole:
        return "-"
    if whole < 1000:
        return f"{'?' if part is None else round(part)}/{whole:.0f} MiB"
    return f"{'?' if part is None else f'{part / 1024:.1f}'}/{whole / 1024:.1f} GiB"


def lasting(seconds: float | None) -> str:
    """How long: `8s`, `4m12s`, `2h05m`, `3d4h`."""
    if seconds is None:
        return "?"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600}h"


def millis(ms: float | None) -> str:
    """A duration in ms: `0.4 ms`, `85 ms`, `1.2 s`, `4m12s`."""
    if ms is None:
        return "?"
    if ms < 10:
        return f"{ms:.1f} ms"
    if ms < 1000:
        return f"{ms:.0f} ms"
    return f"{ms / 1000:.1f} s" if ms < 60_000 else lasting(ms / 1000)


def count(number: int, noun: str) -> str:
    """`1 node`, `2 nodes`, `no nodes`."""
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"
