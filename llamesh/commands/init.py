"""`llamesh init`: a configuration and a cookbook for this machine, each where there is none."""

from __future__ import annotations

from pathlib import Path

import click
import psutil

from llamesh.commands.add import EMPTY_COOKBOOK, add, write_new
from llamesh.commands.shared import exit_codes
from llamesh.commands.shared.failed import Failed
from llamesh.commands.shared.named import MODEL_WORDS, Wishes, wishes_options
from llamesh.commands.shared.options import Files, files_options
from llamesh.commands.shared.options import command as make
from llamesh.commands.shared.saying import fail, out
from llamesh.config.problems import ConfigError
from llamesh.config.settings import default_node_id
from llamesh.local.sensors import Sensors
from llamesh.local.weights import WeightsError

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


@make(
    ("llamesh init ggml-org/gemma-3-1b-it-GGUF:Q4_K_M", "and a first model"),
    ("llamesh init --models-dir ~/models", "serve what is there"),
    epilog=f"MODEL is {MODEL_WORDS}.",
)
@click.argument("model", metavar="[MODEL]", required=False)
@click.option(
    "--models-dir",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="serve every GGUF file in this folder",
)
@wishes_options
@files_options(cookbook=True)
def command(model: str | None, models_dir: Path | None, wishes: Wishes, files: Files) -> int:
    """Write config.yaml and cookbook.yaml for this machine, each where there is none, and add MODEL."""
    config, cookbook = files.config, files.cookbook
    try:
        there = [str(path) for path in (config, cookbook) if path.exists()]
        if len(there) == 2 and model is None:
            raise Failed(f"{' and '.join(there)} are there already; they stay as they are")
        if not config.exists():
            write_new(config, _config(models_dir))
            out(f"wrote {config}")
        if not cookbook.exists():
            write_new(cookbook, EMPTY_COOKBOOK)
            out(f"wrote {cookbook}")
    except (Failed, ConfigError, WeightsError) as error:
        return fail(error)
    if model is not None and (code := add(model, cookbook, wishes)):
        return code
    out(f"now: llamesh --config {config} --cookbook {cookbook}")
    return exit_codes.OK


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
