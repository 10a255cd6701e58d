"""Which GPUs this machine has, and which tools for them, from what lies about: nothing is started."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from llamesh.core.backends import Machine

# PCI's numbers of makers, as /sys has them.
_MAKERS = {"0x10de": "nvidia", "0x1002": "amd", "0x8086": "intel"}

# Where toolkits install themselves without telling PATH.
_PLACES = {
    "nvcc": ("/usr/local/cuda/bin", "/opt/cuda/bin"),
    "hipcc": ("/opt/rocm/bin",),
    "glslc": (),
}

_VULKAN_HEADER = "vulkan/vulkan.h"
_INCLUDES = ("/usr/include", "/usr/local/include", "/opt/homebrew/include")


def look(environ: Mapping[str, str], *, root: Path = Path("/")) -> Machine:
    """Look. `root` is for tests. Blocking, for some milliseconds."""
    gpus = {
        maker
        for vendor in root.glob("sys/class/drm/card*/device/vendor")
        if (maker := _MAKERS.get(_first_word(vendor)))
    }
    # Without a display (in a container, on a server) there may be no card in /sys.
    if (root / "proc/driver/nvidia/version").exists() or (root / "dev/nvidiactl").exists():
        gpus.add("nvidia")
    if (root / "dev/kfd").exists():
        gpus.add("amd")
    system = platform.system()
    if system == "Darwin":
        gpus.add("apple")
    path = search_path(environ, root=root)
    tools = {tool for tool in _PLACES if shutil.which(tool, path=path)}
    sdk = environ.get("VULKAN_SDK")
    includes = [root / place.lstrip("/") for place in _INCLUDES] + ([Path(sdk) / "include"] if sdk else [])
    if any((place / _VULKAN_HEADER).exists() for place in includes):
        tools.add("vulkan headers")
    return Machine(system, frozenset(gpus), frozenset(tools))


def search_path(environ: Mapping[str, str], *, root: Path = Path("/")) -> str:
    """PATH, and after it the places where toolkits are that aren't on it."""
    places = [str(root / place.lstrip("/")) for several in _PLACES.values() for place in several]
    return os.pathsep.join([environ.get("PATH", os.defpath), *places])


def _first_word(path: Path) -> str:
    try:
        return path.read_text().strip().lower()
    except OSError:
        return ""


def processor() -> str:
    """What a binary made with -march=native is bound to: the architecture and its extensions."""
    words = [os.uname().machine, sys.platform]
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                words += sorted(line.partition(":")[2].split())
                break
    except OSError:
        pass  # not Linux: the architecture has to do
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]
