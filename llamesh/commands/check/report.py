"""The answer of `llamesh check` for people and for scripts."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import PurePath

import trio

from llamesh.commands.check.look import in_shell
from llamesh.commands.check.plan import Plan, Planned, make_plan
from llamesh.commands.exit_codes import FAILED, OK
from llamesh.commands.file_options import FilePaths
from llamesh.commands.saying import out
from llamesh.commands.tables import printable, show_table
from llamesh.config.problems import ConfigError
from llamesh.config.store import Files
from llamesh.local.weights.progress import in_words

_STYLES = {"fits": "green", "needs eviction": "yellow", "never": "bold red", "missing": "bold red"}


def check(paths: FilePaths, *, commands: bool, as_json: bool) -> int:
    """Check and print; the exit code."""
    files = Files(
        paths.config_file,
        paths.cookbook,
        paths.secrets_file,
        config_required=paths.config is not None,
        secrets_required=paths.secrets is not None,
    )
    try:
        plan = trio.run(make_plan, files, os.environ)
    except ConfigError as error:
        if as_json:
            out(json.dumps({"problems": [asdict(problem) for problem in error.problems]}, indent=1))
        else:
            sys.stderr.write(f"{error}\n")
        return FAILED
    if as_json:
        out(json.dumps({"problems": [], **plan.document()}, indent=1))
    else:
        _print(plan, commands=commands)
    return FAILED if plan.errors else OK


def _print(plan: Plan, *, commands: bool) -> None:
    engine, budget = plan.engine, plan.budget
    if engine is not None:
        out(f"engine: {engine.origin}, version {engine.version}, {printable(engine.command[0])}")
    out(f"GPU memory for models: {_limit(budget.vram, budget.vram_now)}")
    out(f"memory for models: {_limit(budget.sysmem, budget.sysmem_now)}")
    out(f"instances at once: {budget.max_instances}")
    out("")
    if not plan.profiles:
        out("the cookbook has no enabled model")
    else:
        headers = ("MODEL", "KIND", "WEIGHTS", "SIZE", "CONTEXT", "GPU MiB", "MEMORY MiB", "FROM", "HERE")
        show_table(
            headers,
            [_row(planned) for planned in plan.profiles],
            right=("SIZE", "CONTEXT", "GPU MiB", "MEMORY MiB"),
            styles=_STYLES,
        )
    for planned in plan.profiles:
        why = planned.judgement.why
        if not why and not (commands and planned.command):
            continue
        out("")
        out(f"{planned.profile.public_name}" + (f": {printable(why)}" if why else ""))
        if commands and planned.command:
            out(f"  {printable(in_shell(planned.command))}")
    if plan.warnings or plan.errors:
        out("")
    for word, lines in (("warning", plan.warnings), ("error", plan.errors)):
        for line in lines:
            out(f"{word}: {printable(line)}")


def _limit(most: int | None, now: int | None) -> str:
    if most is None:
        return "none was found, and max_vram_mb sets no limit" if now is None else "not limited"
    if now is None or now >= most:
        return f"{most} MiB"
    left = f"other programs (models of a running node, too) leave {max(0, now)} MiB at present"
    return f"{most} MiB, of which {left}"


def _row(planned: Planned) -> tuple[str, ...]:
    weights, size, context = planned.weights, planned.size, planned.context
    used = "-" if context.used is None else f"{context.used}{' (reduced)' if context.reduced else ''}"
    where = {"download": f"{weights.name} (to be downloaded)", "engine": f"{weights.name} (by the engine)"}
    verdict = planned.judgement.verdict
    return (
        planned.profile.public_name,
        planned.profile.kind,
        # The command line has the whole path.
        where.get(weights.state, PurePath(weights.name).name or weights.name),
        "-" if weights.size is None else in_words(weights.size),
        used,
        "-" if size is None else str(size.need.vram),
        "-" if size is None else str(size.need.sysmem),
        "-" if size is None else size.source,
        "needs eviction" if verdict == "eviction" else verdict,
    )
