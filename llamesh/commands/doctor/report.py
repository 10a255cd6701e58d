"""What the doctor says, for people and for scripts."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import click
import trio

from llamesh.commands.doctor.examination import examine_all
from llamesh.commands.doctor.finding import Finding
from llamesh.commands.exit_codes import FAILED, OK
from llamesh.commands.file_options import FilePaths
from llamesh.commands.saying import out
from llamesh.commands.tables import printable

_COLOURS = {"ok": "green", "warn": "yellow", "bad": "red"}


def doctor(paths: FilePaths, *, as_json: bool) -> int:
    """Look at everything, and print what was found; the exit code."""
    found = trio.run(examine_all, paths, os.environ)
    fine = is_fine(found)
    if as_json:
        lines = [{"section": name, **asdict(one)} for name, some in found.items() for one in some]
        out(json.dumps({"ok": fine, "findings": lines}, indent=1))
    else:
        _print(found)
    return OK if fine else FAILED


def is_fine(found: Mapping[str, Sequence[Finding]]) -> bool:
    """Whether nothing has to be mended."""
    return all(one.level != "bad" for some in found.values() for one in some)


def _print(found: Mapping[str, Sequence[Finding]]) -> None:
    for name, some in found.items():
        click.echo(click.style(name, bold=True))
        for one in some:
            click.echo(f"  {click.style(one.level.ljust(4), fg=_COLOURS[one.level])}  {printable(one.text)}")
            if one.remedy:
                click.echo(f"        -> {printable(one.remedy)}")
