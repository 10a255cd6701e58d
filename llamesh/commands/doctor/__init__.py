"""`llamesh doctor`: what is wrong on this machine, and what to do about it."""

from __future__ import annotations

from llamesh.commands.shared.options import Files, files_options, json_option
from llamesh.commands.shared.options import command as make


@make(
    ("llamesh doctor", "what is wrong, and what to do"),
    ("llamesh doctor --json | jq '.findings[] | select(.level == \"bad\")'", "for a script"),
    epilog="Exit code 1 when something has to be mended; warnings leave it 0.",
)
@json_option
@files_options(cookbook=True)
def command(as_json: bool, files: Files) -> int:
    """Say what is wrong on this machine, and what mends it.

    Looks at files, ports, multicast, GPUs, the engine, the clock, peers, limits and the service; with a node
    running, at its state, too (LLAMESH_API_KEY, or the configuration's own key). Takes some seconds at most,
    and changes nothing.
    """
    from llamesh.commands.doctor.report import doctor

    return doctor(files, as_json=as_json)
