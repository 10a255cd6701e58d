"""The doctor's look at the machine: GPUs, engine, clock, limits, service."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import trio

from llamesh.commands.doctor.finding import Finding, Patient, bad, ok, warn
from llamesh.local.builds import machine
from llamesh.local.builds.doctor import examine
from llamesh.local.launch import child_environment
from llamesh.local.sensors import Sensors, SystemMemory
from llamesh.local.sensors.system import machine_memory

_MIB = 1 << 20

# Each question to the engine, and to systemd.
_ASK_SECONDS = 1.5
_LIST_SECONDS = 3.0
_TOOL_SECONDS = 2.0

# A connection takes one descriptor or two, an instance about four.
_FEW_FILES = 4096

# Before this was written; a clock that was never set says 1970.
_WRITTEN = 1_760_000_000.0
# News takes a moment to come here.
_SKEW_SECONDS = 3.0

_UNIT = "llamesh.service"
_LABEL = "org.llamesh.node"


async def look_at_gpus(patient: Patient) -> list[Finding]:
    """What the drivers show."""
    return await trio.to_thread.run_sync(lambda: list(_gpus(patient)), abandon_on_cancel=True)


def _gpus(patient: Patient) -> Iterator[Finding]:
    sensors = Sensors(root=patient.root)
    try:
        reading = sensors.sample([], now=time.monotonic())
    finally:
        sensors.close()
    makers = machine.look(patient.environ, root=patient.root).gpus
    for device in reading.devices:
        if device.error:
            yield warn(f"{device.name}: {device.error}", "is its driver the one of the running kernel?")
            continue
        total = "unknown memory" if device.total_bytes is None else f"{device.total_bytes // _MIB} MiB"
        used = "" if device.used_bytes is None else f", {device.used_bytes // _MIB} MiB of it in use"
        yield ok(f"{device.name}: {total}{used}")
    if reading.devices:
        return
    for maker in sorted(makers):
        if maker == "intel":
            yield ok("a GPU of intel is here; how much memory it has isn't measured")
            continue
        why = "; ".join(reading.problems) or "its driver says nothing"
        yield warn(f"a GPU of {maker} is here, but can't be measured: {why}", _driver(maker))
    if not makers:
        yield ok("no GPU was found: models run on the CPU")


def _driver(maker: str) -> str:
    if maker == "nvidia":
        return "install NVIDIA's driver (nvidia-smi should work); in a container: --gpus all"
    if maker == "amd":
        return "load amdgpu; in a container: --device /dev/kfd --device /dev/dri"
    return "set max_vram_mb to what models may use"


async def look_at_engine(patient: Patient) -> list[Finding]:
    """Which llama-server is used, and whether it uses the GPUs."""
    if patient.settings is None:
        return []
    remarks = await examine(
        patient.settings.llama_cpp, patient.environ, ask_seconds=_ASK_SECONDS, list_seconds=_LIST_SECONDS
    )
    return [bad(remark.text) if remark.wrong else ok(remark.text) for remark in remarks]


async def look_at_clock(patient: Patient) -> list[Finding]:
    """Whether the time is right: certificates, logs and tokens go by it."""
    now = time.time()
    if now < _WRITTEN:
        return [bad("the clock is years behind", "set it: timedatectl set-ntp true")]
    own = await trio.to_thread.run_sync(_synchronized, patient, abandon_on_cancel=True)
    return [own, *_skews(patient.state, now)]


def _synchronized(patient: Patient) -> Finding:
    if (patient.root / "run/systemd/timesync/synchronized").exists():
        return ok("the clock follows a time server")
    said = _ask(["timedatectl", "show", "-p", "NTPSynchronized", "--value"], patient.environ).strip()
    if said == "yes":
        return ok("the clock follows a time server")
    if said == "no":
        return warn("the clock follows no time server", "timedatectl set-ntp true")
    return ok("whether the clock follows a time server can't be told here")


def _skews(state: Mapping[str, Any], now: float) -> Iterator[Finding]:
    """Peers that tell of the future. The past may be the past."""
    newest: dict[str, float] = {}
    told = [(node.get("id"), node.get("started")) for node in state.get("nodes", ()) if not node.get("self")]
    told += [(event.get("node"), event.get("time")) for event in state.get("events", ())]
    for node, moment in told:
        if isinstance(moment, (int, float)) and node != state.get("node_id"):
            newest[str(node)] = max(newest.get(str(node), 0.0), moment)
    for node, moment in sorted(newest.items()):
        if moment > now + _SKEW_SECONDS:
            yield warn(
                f"the clock of {node} is at least {moment - now:.0f} s ahead of this one",
                "have both follow a time server",
            )


async def look_at_limits(patient: Patient) -> list[Finding]:
    """What the system lets one process have."""
    return await trio.to_thread.run_sync(lambda: list(_limits(patient)), abandon_on_cancel=True)


def _limits(patient: Patient) -> Iterator[Finding]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = "any number of open files" if files == resource.RLIM_INFINITY else f"{files} open files"
    if files != resource.RLIM_INFINITY and files < _FEW_FILES:
        yield warn(f"{text} are few for many clients", "ulimit -n 65536; in a unit: LimitNOFILE=65536")
    else:
        yield ok(f"{text} are allowed")
    locks = any(
        "--mlock" in profile.arguments or any("mlock" in word for word in profile.arguments)
        for profile in (patient.cookbook.profiles if patient.cookbook is not None else ())
    )
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if locks and locked != resource.RLIM_INFINITY:
        yield warn(
            f"a profile locks its weights in memory, and {locked // _MIB} MiB are allowed",
            "ulimit -l unlimited; in a unit: LimitMEMLOCK=infinity",
        )
    yield from _memory(patient)


def _memory(patient: Patient) -> Iterator[Finding]:
    total, _ = SystemMemory(patient.root).read()
    whole = machine_memory()[0]
    if total is None:
        yield warn("how much memory there is can't be told", "set max_sysmem_mb")
        return
    text = f"{total // _MIB} MiB of memory"
    if total < whole:
        text = f"a cgroup allows {total // _MIB} of {whole // _MIB} MiB of memory"
    most = patient.settings.max_sysmem_mb if patient.settings is not None else None
    if most is not None and most * _MIB > total:
        yield bad(f"{text}, less than max_sysmem_mb ({most})", "lower max_sysmem_mb, or leave it out")
    else:
        yield ok(text)


async def look_at_service(patient: Patient) -> list[Finding]:
    """Whether llamesh is a service of this machine, and runs."""
    return [await trio.to_thread.run_sync(_service, patient, abandon_on_cancel=True)]


def _service(patient: Patient) -> Finding:
    if sys.platform == "darwin":
        said = _ask(["launchctl", "list", _LABEL], patient.environ)
        return ok(f"{_LABEL} is loaded" if said else "llamesh isn't a launchd service here")
    if not (patient.root / "run/systemd/system").exists():
        return ok("systemd doesn't run here")
    names = "LoadState,ActiveState,UnitFileState,NRestarts"
    said = _ask(["systemctl", "show", _UNIT, "-p", names], patient.environ)
    shown = dict(line.split("=", 1) for line in said.splitlines() if "=" in line)
    if shown.get("LoadState") in (None, "not-found"):
        return ok("llamesh isn't a service here", "deploy/install.sh makes it one")
    state, restarts = shown.get("ActiveState"), shown.get("NRestarts", "0")
    if state == "failed":
        return bad(f"{_UNIT} has failed", f"journalctl -u {_UNIT} -n 50 says why")
    if state in ("active", "reloading"):
        if restarts.isdecimal() and int(restarts) > 3:
            return warn(f"{_UNIT} was restarted {restarts} times", f"journalctl -u {_UNIT} says why")
        if shown.get("UnitFileState") == "disabled":
            return warn(f"{_UNIT} runs, but won't at the next start", f"systemctl enable {_UNIT}")
        return ok(f"{_UNIT} runs")
    return warn(f"{_UNIT} is {state}", f"systemctl enable --now {_UNIT}")


def _ask(words: Sequence[str], environ: Mapping[str, str]) -> str:
    """What a program prints; "" where it isn't there, fails, or takes too long."""
    try:
        done = subprocess.run(
            words,
            env=child_environment(environ, api_key=""),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TOOL_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError, ValueError):
        return ""
    return done.stdout if done.returncode == 0 else ""
