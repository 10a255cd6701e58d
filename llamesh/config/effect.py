"""Keys that a configuration may hold while nothing comes of them in this version."""

from __future__ import annotations

from llamesh.config.settings import Settings


def without_effect(settings: Settings) -> tuple[str, ...]:
    """The dotted names of switches that do nothing: links between nodes are always encrypted."""
    switches = {"cluster.noise.enabled": not settings.cluster.noise.enabled}
    return tuple(name for name, on in switches.items() if on)
