"""A machine with NVIDIA devices that isn't there: `fake_nvml.c` compiled, and the file that it answers from.

Lines of the file, places counted from 0 in the order of the `device` lines:

    init CODE                       opening fails so
    gone CODE                       every call fails so
    device PARENT UUID TOTAL USED RESERVED UTILISATION MIG NAME...
                                    bytes and percent; PARENT is -1 or, for a MIG device, its GPU's place
    process PLACE compute|graphics PID BYTES|unknown
    error PLACE CALL CODE           one call on one device fails so; PLACE is -1 for count. Calls: count,
                                    handle, uuid, name, memory, utilisation, compute, graphics, mig, parts

The library is found by its name, as the real one is, so a process that is to see it needs `environment()`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

SOURCE = Path(__file__).with_name("fake_nvml.c")
LIBRARY = "libnvidia-ml.so.1"

# Codes of nvml.h that tests order.
NOT_SUPPORTED, NO_PERMISSION, DRIVER_NOT_LOADED, GPU_IS_LOST, UNKNOWN = 3, 4, 9, 15, 999

MIB = 1 << 20


@dataclass
class FakeDevice:
    """A device in MiB and percent. `errors`: call -> code; `parts`: MIG devices, which make it a parent."""

    uuid: str
    total: int = 24_000
    used: int = 0
    reserved: int = 0
    utilisation: int = 0
    name: str = "NVIDIA Fake"
    compute: dict[int, int | None] = field(default_factory=dict)
    graphics: dict[int, int | None] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    parts: list[FakeDevice] = field(default_factory=list)


def build_library(directory: Path, *, old_driver: bool = False) -> Path:
    """Compile the library into `directory`; a C compiler is part of what the tests need."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise AssertionError("the tests need a C compiler (`cc`, or the one that CC names) for a fake NVML")
    library = directory / LIBRARY
    options = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC", f"-Wl,-soname,{LIBRARY}"]
    if old_driver:
        options.append("-DOLD_DRIVER")
    subprocess.run([compiler, *options, "-o", str(library), str(SOURCE)], check=True)
    return library


class FakeNvml:
    """The state of the fake machine. `write` replaces all of it at once."""

    def __init__(self, library: Path, state: Path) -> None:
        self._library = library
        self.state = state
        self.write()

    def environment(self) -> dict[str, str]:
        """The variables by which a process finds this library and this state."""
        return {"LD_LIBRARY_PATH": str(self._library.parent), "FAKE_NVML": str(self.state)}

    def write(self, *devices: FakeDevice, init: int = 0, gone: int = 0, count_error: int = 0) -> None:
        """The machine from now on, as the next call will see it."""
        draft = self.state.with_suffix(".new")
        draft.write_text(self.text(*devices, init=init, gone=gone, count_error=count_error))
        draft.replace(self.state)

    @staticmethod
    def text(*devices: FakeDevice, init: int = 0, gone: int = 0, count_error: int = 0) -> str:
        """What `write` writes."""
        lines = [f"init {init}", f"gone {gone}"]
        if count_error:
            lines.append(f"error -1 count {count_error}")
        places: list[tuple[int, FakeDevice]] = []
        for device in devices:
            parent = len(places)
            places.append((-1, device))
            places += [(parent, part) for part in device.parts]
        for place, (parent, device) in enumerate(places):
            sizes = f"{device.total * MIB} {device.used * MIB} {device.reserved * MIB}"
            mig = int(bool(device.parts))
            lines.append(f"device {parent} {device.uuid} {sizes} {device.utilisation} {mig} {device.name}")
            for kind, held in (("compute", device.compute), ("graphics", device.graphics)):
                for pid, size in held.items():
                    shown = "unknown" if size is None else size * MIB
                    lines.append(f"process {place} {kind} {pid} {shown}")
            lines += [f"error {place} {call} {code}" for call, code in device.errors.items()]
        return "\n".join(lines) + "\n"
