"""`llamesh init`: a configuration and a cookbook for this machine, each where there is none."""

from __future__ import annotations

import argparse
from pathlib import Path

import psutil

from llamesh.config.problems import ConfigError
from llamesh.config.settings import default_node_id
from llamesh.local.sensors import Sensors
from llamesh.local.weights import WeightsError
from llamesh.model_commands.add import add, write_new
from llamesh.model_commands.common import Failed, cookbook_path, fail, say

_MIB = 1 << 20

_CONFIG = """\
# The node on this machine. Everything has a default: config.example.yaml lists every key.

# Its name in the mesh.
node_id: {node_id}

# Where the API answers. 0.0.0.0:8080 opens it to the network: then set auth, too.
listen_addr: 127.0.0.1:8080

# {machine}
# Models may use all of it less 10 %, unless these say otherwise (MiB).
# max_vram_mb:
# max_sysmem_mb:

# Every GGUF file in this folder is served under its own name.
{models_dir}

# What downloads may take on the disk, in GB; the least used are removed for new ones.
# disk_budget_gb: 100
"""

_COOKBOOK = """\
# The models of this node. `llamesh add OWNER/NAME:QUANTISATION` (or a path) appends one;
# cookbook.example.yaml lists every key. A node that runs takes changes in within a second.

models: []
"""


def init(options: argparse.Namespace) -> int:
    """Do it; the exit code."""
    config, cookbook = options.config or Path("config.yaml"), cookbook_path(options)
    try:
        there = [str(path) for path in (config, cookbook) if path.exists()]
        if len(there) == 2 and options.model is None:
            raise Failed(f"{' and '.join(there)} are there already; they stay as they are")
        if not config.exists():
            write_new(config, _config(options.models_dir))
            say(f"wrote {config}")
        if not cookbook.exists():
            write_new(cookbook, _COOKBOOK)
            say(f"wrote {cookbook}")
    except (Failed, ConfigError, WeightsError) as error:
        return fail(error)
    if options.model is not None and (code := add(options)):
        return code
    say(f"now: llamesh --config {config} --cookbook {cookbook}")
    return 0


def _config(models_dir: Path | None) -> str:
    folder = "# models_dir: ~/models"
    if models_dir is not None:
        path = str(models_dir.expanduser().absolute())
        folder = "models_dir: '{}'".format(path.replace("'", "''"))
    return _CONFIG.format(node_id=default_node_id(), machine=_machine(), models_dir=folder)


def _machine() -> str:
    """What there is, in words."""
    sensors = Sensors()
    try:
        reading = sensors.sample([], now=0.0)
    finally:
        sensors.close()
    memory = (reading.sysmem_total or psutil.virtual_memory().total) // _MIB
    words = [f"{memory} MiB of memory"]
    for device in reading.devices:
        size = f" with {device.usable_bytes // _MIB} MiB" if device.usable_bytes else ""
        words.append(f"{device.name}{size}")
    return f"This machine has {', '.join(words)}."
