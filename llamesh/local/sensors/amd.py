"""AMD devices through the files of the amdgpu driver; no library, no daemon.

`/sys/class/drm/cardN/device/` has mem_info_vram_total, mem_info_vram_used (bytes) and gpu_busy_percent.
What a process holds is in `/sys/class/kfd/kfd/proc/PID/vram_GPUID` (bytes; ROCm) and in the lines
drm-memory-vram or drm-total-vram of `/proc/PID/fdinfo/N` (KiB; everything else). Both may count the same
buffers, so the larger figure counts. Formats: Documentation/gpu/amdgpu/driver-misc and gpu/drm-usage-stats in
the Linux kernel. Only our own processes are looked at: those of others may not be readable.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from llamesh.core.readings import Device

_ENUMERATE_SECONDS = 30.0
_CARD = re.compile(r"card\d+")
_PCI = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-9a-f]")
_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


@dataclass(frozen=True, slots=True)
class _Card:
    folder: Path
    pci: str
    kfd_id: str | None
    device: Device


class AmdSensor:
    """All amdgpu devices, in the order of their PCI addresses, which is that of ROCm."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.problem: str | None = None
        self._root = root
        self._cards: tuple[_Card, ...] = ()
        self._enumerate_at: float | None = None

    def read(self, trees: Mapping[int, tuple[int, ...]], now: float) -> tuple[Device, ...]:
        """The devices now; see `GpuSensor`. `processes` has ours only."""
        if self._enumerate_at is None or now >= self._enumerate_at:
            self._cards = self._enumerate()
            self._enumerate_at = now + _ENUMERATE_SECONDS
        if not self._cards:
            return ()
        pids = {pid for members in trees.values() for pid in members}
        drawn = _by_card(self._root / "proc", pids)
        return tuple(self._measure(card, pids, drawn) for card in self._cards)

    def close(self) -> None:
        """Nothing is held open."""

    def _measure(self, card: _Card, pids: Iterable[int], drawn: Mapping[int, Mapping[str, int]]) -> Device:
        total = _number(card.folder / "mem_info_vram_total")
        used = _number(card.folder / "mem_info_vram_used")
        busy = _number(card.folder / "gpu_busy_percent")
        held: list[tuple[int, int | None]] = []
        for pid in sorted(pids):
            figures = [drawn[pid][card.pci]] if card.pci in drawn.get(pid, {}) else []
            if card.kfd_id is not None:
                computed = _number(self._root / f"sys/class/kfd/kfd/proc/{pid}/vram_{card.kfd_id}")
                figures += [] if computed is None else [computed]
            if figures:
                held.append((pid, max(figures)))
        error = None if total is not None and used is not None else "amdgpu: memory can't be read"
        return replace(
            card.device,
            total_bytes=total,
            used_bytes=used,
            utilisation=None if busy is None else busy / 100,
            # No entry says nothing: an old kernel names nobody, and ours may have taken nothing yet.
            processes=tuple(held) or None,
            error=error,
        )

    def _enumerate(self) -> tuple[_Card, ...]:
        try:
            names = os.listdir(self._root / "sys/class/drm")
        except OSError:
            return ()
        found: dict[str, Path] = {}
        for name in names:
            folder = self._root / "sys/class/drm" / name / "device"
            # Connectors (card0-HDMI-A-1) and other drivers' cards have no such file.
            if _CARD.fullmatch(name) and (folder / "mem_info_vram_total").exists():
                found[_pci_address(folder)] = folder
        kfd = self._kfd_ids() if found else {}
        cards = []
        for index, (pci, folder) in enumerate(sorted(found.items())):
            unique = _text(folder / "unique_id")
            device = Device(
                index,
                f"GPU-{unique}" if unique and unique.strip("0") else f"amd-{pci}",
                _text(folder / "product_name") or "AMD GPU",
                "amd",
            )
            cards.append(_Card(folder, pci, kfd.get(pci), device))
        return tuple(cards)

    def _kfd_ids(self) -> dict[str, str]:
        """ROCm's number of each GPU by PCI address: what its per-process files are named after."""
        nodes = self._root / "sys/class/kfd/kfd/topology/nodes"
        try:
            names = os.listdir(nodes)
        except OSError:
            return {}
        ids = {}
        for name in names:
            gpu = _text(nodes / name / "gpu_id")
            pairs = (line.split() for line in (_text(nodes / name / "properties") or "").splitlines())
            properties = {pair[0]: pair[1] for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}
            if not gpu or gpu == "0" or "location_id" not in properties:
                continue  # "0" is the processor.
            # location_id is bus, device and function in 16 bits.
            place, domain = int(properties["location_id"]), int(properties.get("domain", "0"))
            ids[f"{domain:04x}:{place >> 8 & 255:02x}:{place >> 3 & 31:02x}.{place & 7:x}"] = gpu
        return ids


def _by_card(proc: Path, pids: Iterable[int]) -> dict[int, dict[str, int]]:
    """Bytes of video memory per process and PCI address, from fdinfo."""
    return {pid: held for pid in pids if (held := _of_process(proc / str(pid)))}


def _of_process(folder: Path) -> dict[str, int]:
    held: dict[str, int] = {}
    seen: set[tuple[str, str]] = set()
    try:
        numbers = os.listdir(folder / "fd")
    except OSError:
        return held
    for number in numbers:
        try:
            # Reading a link is cheap, reading fdinfo of each socket isn't.
            if not os.readlink(folder / "fd" / number).startswith("/dev/dri/"):
                continue
        except OSError:
            continue
        pairs = (line.partition(":") for line in (_text(folder / "fdinfo" / number) or "").splitlines())
        fields = {name: value.strip() for name, _, value in pairs}
        pci, client = fields.get("drm-pdev", ""), fields.get("drm-client-id", number)
        size = _size(fields.get("drm-memory-vram") or fields.get("drm-total-vram") or "")
        # Several descriptors may be one client.
        if size is not None and pci and (pci, client) not in seen:
            seen.add((pci, client))
            held[pci] = held.get(pci, 0) + size
    return held


def _size(text: str) -> int | None:
    number, _, unit = text.partition(" ")
    return int(number) * _UNITS[unit] if number.isdecimal() and unit in _UNITS else None


def _pci_address(folder: Path) -> str:
    """The PCI address that the `device` link of a card leads to, or the card's own name."""
    name = folder.resolve().name
    return name if _PCI.fullmatch(name) else folder.parent.name


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text is not None and text.isdecimal() else None
