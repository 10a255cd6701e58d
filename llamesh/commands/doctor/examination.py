"""The whole examination: every section at the same time, and none for longer than a few seconds."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import trio

from llamesh.commands.doctor.files import look_at_files, look_at_weights
from llamesh.commands.doctor.finding import Finding, Patient, bad, warn
from llamesh.commands.doctor.machine import (
    look_at_clock,
    look_at_engine,
    look_at_gpus,
    look_at_limits,
    look_at_service,
)
from llamesh.commands.doctor.network import look_at_multicast, look_at_peers
from llamesh.commands.doctor.ports import look_at_ports
from llamesh.commands.doctor.running import state_of, version_at
from llamesh.commands.shared.options import Files
from llamesh.config.check import cross_check
from llamesh.config.cookbook import Cookbook, load_cookbook
from llamesh.config.problems import ConfigError
from llamesh.config.settings import Settings, load_settings

Look = Callable[[Patient], Awaitable[list[Finding]]]

# The engine is asked three questions one after the other; everything else is faster.
SECONDS = 3.0
_ENGINE_SECONDS = 8.0

SECTIONS: dict[str, tuple[Look, float]] = {
    "files": (look_at_files, SECONDS),
    "weights": (look_at_weights, SECONDS),
    "ports": (look_at_ports, SECONDS),
    "multicast": (look_at_multicast, SECONDS),
    "gpu": (look_at_gpus, SECONDS),
    "engine": (look_at_engine, _ENGINE_SECONDS),
    "clock": (look_at_clock, SECONDS),
    "peers": (look_at_peers, SECONDS),
    "limits": (look_at_limits, SECONDS),
    "service": (look_at_service, SECONDS),
}


async def examine_all(
    files: Files, environ: Mapping[str, str], root: Path = Path("/")
) -> dict[str, list[Finding]]:
    """The findings of each section, in their order; sections with nothing to say are left out."""
    patient = await _meet(files, environ, root)
    found: dict[str, list[Finding]] = {}

    async def look(name: str, section: Look, seconds: float) -> None:
        found[name] = [warn(f"this didn't come to an end within {seconds:g} s")]
        with trio.move_on_after(seconds):
            try:
                found[name] = await section(patient)
            # The border to a machine in any state: what one section stumbles over, the others still tell.
            except Exception as error:
                found[name] = [bad(f"this can't be looked at: {type(error).__name__}: {error}")]

    async with trio.open_nursery() as nursery:
        for name, (section, seconds) in SECTIONS.items():
            nursery.start_soon(look, name, section, seconds)
    return {name: found[name] for name in SECTIONS if found[name]}


async def _meet(files: Files, environ: Mapping[str, str], root: Path) -> Patient:
    settings, cookbook, mistakes = await trio.to_thread.run_sync(_read, files, environ)
    version, state = "", {}
    if settings is not None:
        with trio.move_on_after(SECONDS):
            version = await trio.to_thread.run_sync(version_at, settings, abandon_on_cancel=True)
            if version:
                state = await trio.to_thread.run_sync(state_of, settings, environ, abandon_on_cancel=True)
    return Patient(files, environ, settings, cookbook, tuple(mistakes), version, state, root)


def _read(files: Files, environ: Mapping[str, str]) -> tuple[Settings | None, Cookbook | None, list[str]]:
    """Both files as far as they can be read: one with mistakes needn't keep the other from being used."""
    settings: Settings | None = None
    cookbook: Cookbook | None = None
    mistakes: list[str] = []
    try:
        settings = load_settings(
            files.config,
            files.secrets,
            environ,
            required=files.config_required,
            secrets_required=files.secrets_required,
        )
    except ConfigError as error:
        mistakes += [str(problem) for problem in error.problems]
    try:
        cookbook = load_cookbook(files.cookbook)
        if settings is not None:
            cross_check(settings, cookbook)
    except ConfigError as error:
        mistakes += [str(problem) for problem in error.problems]
    return settings, cookbook, mistakes
