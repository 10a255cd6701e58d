"""The answer of `llamesh check` for people and for scripts."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import PurePath

import trio

from llamesh.commands.check.look import for_people
from llamesh.commands.check.plan import NO_ENGINE, Plan, Planned, make_plan
from llamesh.commands.shared import exit_codes
from llamesh.commands.shared.failed import BadFiles
from llamesh.commands.shared.options import Files
from llamesh.commands.shared.saying import out
from llamesh.commands.shared.sheets import Cell, Column, Sheet, cell, show
from llamesh.commands.shared.words import clean, one_line
from llamesh.config.problems import ConfigError
from llamesh.local.weights.progress import in_words

_STYLES = {"fits": "good", "eviction": "warn", "never": "bad", "missing": "bad"}

_COLUMNS = (
    Column("model"),
    Column("kind", keep=1),
    Column("weights", keep=3),
    Column("size", right=True, keep=4),
    Column("context", right=True, keep=6),
    Column("vram", right=True, keep=8),
    Column("ram", right=True, keep=7),
    Column("from", keep=2),
    Column("here"),
)


def check(files: Files, *, commands: bool, as_json: bool) -> int:
    """Check and print; the exit code. Raises BadFiles."""
    try:
        plan = trio.run(make_plan, files.for_store(), os.environ)
    except ConfigError as error:
        if not as_json:
            raise BadFiles(str(error)) from None
        out(json.dumps({"problems": [asdict(problem) for problem in error.problems]}, indent=1))
        return exit_codes.FAILED
    if as_json:
        out(json.dumps({"problems": [], **plan.document()}, indent=1))
    else:
        _print(plan, commands=commands)
    return exit_codes.FAILED if plan.errors else exit_codes.OK


def _print(plan: Plan, *, commands: bool) -> None:
    engine, budget = plan.engine, plan.budget
    if engine is not None:
        out(f"engine: {engine.origin}, version {engine.version}, {one_line(engine.command[0])}")
    out(f"GPU memory for models: {_limit(budget.vram, budget.vram_now)}")
    out(f"memory for models: {_limit(budget.sysmem, budget.sysmem_now)}")
    out(f"instances at once: {budget.max_instances}")
    out("")
    if not plan.profiles:
        out("the cookbook has no enabled model")
    else:
        show([Sheet("", _COLUMNS, [_row(planned) for planned in plan.profiles])])
    for planned in plan.profiles:
        why = planned.judgement.why
        if not why and not (commands and planned.command):
            continue
        out("")
        out(f"{planned.profile.public_name}" + (f": {one_line(why)}" if why else ""))
        if commands and planned.command:
            out(f"  {clean(for_people(planned.command, engine or NO_ENGINE))}")
    if plan.warnings or plan.errors:
        out("")
    for word, lines in (("warning", plan.warnings), ("error", plan.errors)):
        for line in lines:
            out(f"{word}: {one_line(line)}")


def _limit(most: int | None, now: int | None) -> str:
    if most is None:
        return "none was found, and max_vram_mb sets no limit" if now is None else "not limited"
    if now is None or now >= most:
        return f"{most} MiB"
    left = f"other programs (models of a running node, too) leave {max(0, now)} MiB at present"
    return f"{most} MiB, of which {left}"


def _row(planned: Planned) -> tuple[Cell, ...]:
    weights, needed, context = planned.weights, planned.size, planned.context
    used = "-" if context.used is None else f"{context.used}{' (reduced)' if context.reduced else ''}"
    where = {"download": f"{weights.name} (to be downloaded)", "engine": f"{weights.name} (by the engine)"}
    verdict = planned.judgement.verdict
    return (
        cell(planned.profile.public_name),
        cell(planned.profile.kind, "dim"),
        # The command line has the whole path.
        cell(where.get(weights.state, PurePath(weights.name).name or weights.name)),
        cell("-" if weights.size is None else in_words(weights.size)),
        cell(used),
        cell("-" if needed is None else f"{needed.need.vram} MiB"),
        cell("-" if needed is None else f"{needed.need.sysmem} MiB"),
        cell("-" if needed is None else needed.source, "dim"),
        cell("needs eviction" if verdict == "eviction" else verdict, _STYLES.get(verdict, "")),
    )
