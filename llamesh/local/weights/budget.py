"""`disk_budget_gb`: what our own downloads may take; the least used ones make room for a new one."""

from __future__ import annotations

from collections.abc import Callable, Collection

from llamesh.local.weights.cache import Cache, Record
from llamesh.local.weights.errors import DiskFull
from llamesh.local.weights.progress import in_words
from llamesh.telemetry.logs import get_logger

log = get_logger("weights")

GB = 10**9


def own_bytes(records: Collection[Record]) -> int:
    """What our own downloads take, each file once."""
    return sum({file.blob: file.size for record in records for file in record.files if file.ours}.values())


def make_room(
    cache: Cache, size: int, budget_gb: float | None, in_use: Callable[[], Collection[str]]
) -> list[Record]:
    """Remove our own downloads until `size` bytes more keep to the budget; those that were removed. Blocks.

    The one that wasn't used for longest goes first. What somebody else fetched stays, and so do the models
    whose keys `in_use` names. Raises DiskFull when that isn't enough; nothing is removed then.
    """
    if not budget_gb:
        return []
    budget, kept = round(budget_gb * GB), in_use()
    staying = list(cache.records())
    candidates = sorted(
        (r for r in staying if r.key not in kept and any(file.ours for file in r.files)), key=lambda r: r.used
    )
    leaving = []
    while own_bytes(staying) + size > budget and candidates:
        leaving.append(candidates.pop(0))
        staying.remove(leaving[-1])
    if (left := own_bytes(staying)) + size > budget:
        raise DiskFull(
            f"it needs {in_words(size)}, and disk_budget_gb allows {in_words(budget)} for all downloads, "
            f"of which {in_words(left)} are in use: raise it, or remove models with `llamesh rm`"
        )
    for record in leaving:
        freed = cache.remove(record, only_ours=True)
        log.info("removed a model, for disk_budget_gb", model=record.name, bytes=freed)
    return leaving
