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
from llamesh.commands.shared import exit_codes
from llamesh.commands.shared.options import Files
from llamesh.commands.shared.saying import out
from llamesh.commands.shared.words import one_line

_COLOURS = {"ok": "green", "warn": "yellow", "bad": "red"}


def doctor(files: Files, *, as_json: bool) -> int:
    """Look at everything, and print what was found; the exit code."""
    found = trio.run(examine_all, files, os.environ)
    fine = is_fine(found)
    if as_json:
        lines = [{"section": name, **asdict(one)} for name, some in found.items() for one in some]
        out(json.dumps({"ok": fine, "findings": lines}, indent=1))
    else:
        _print(found)
    return exit_codes.OK if fine else exit_codes.FAILED


def is_fine(found: Mapping[str, Sequence[Finding]]) -> bool:
    """Whether nothing has to be mended."""
    return all(one.level != "bad" for some in found.values() for one in some)


def _print(found: Mapping[str, Sequence[Finding]]) -> None:
    for name, some in found.items():
        click.echo(click.style(name, bold=True))
        for one in some:
            click.echo(f"  {click.style(one.level.ljust(4), fg=_COLOURS[one.level])}  {one_line(one.text)}")
            if one.remedy:
                click.echo(f"        -> {one_line(one.remedy)}")
