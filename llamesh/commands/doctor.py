"""`llamesh doctor`: how it stands with the engine on this machine."""

from __future__ import annotations

import os

from llamesh.commands.shared.options import Files, files_options
from llamesh.commands.shared.options import command as make


@make(("llamesh doctor", "exit code 1 when something is wrong"))
@files_options()
def command(files: Files) -> int:
    """Say which engine is used, which GPUs it leaves unused, and what is missing to build another."""
    from llamesh.local.builds.doctor import doctor

    return doctor(files.settings().llama_cpp, os.environ)
