"""What an operator should look at now. Nothing, when all is well."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path, PurePath
from typing import NamedTuple

from llamesh.config.cookbook import Profile
from llamesh.config.store import Store
from llamesh.dispatch import Dispatch
from llamesh.local.failure import Failure
from llamesh.local.pool import Pool
from llamesh.telemetry.audit import Audit
from llamesh.telemetry.recorder import Happening, Recorder
from llamesh.web.state_schema import MOST_CONCERNS, Concern, Level

# What was a moment ago is still worth a look for so long, in seconds.
_LINGERS = 30.0
_RECENT = 600.0
_LOST = 3600.0

# Where drivers of NVIDIA and AMD cards show themselves.
_DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/dev/kfd"))

# Of a child's last words, the line that says why.
_TELLING = re.compile(
    r"error|fail|unable|cannot|can't|could ?n[o']t|invalid|out of memory|not within|no such|unknown|unsupp",
    re.IGNORECASE,
)


class Finding(NamedTuple):
    """A concern without its node and its age. subject: whom it is about; with `what` it tells one from
    others.
    """

    level: Level
    what: str
    subject: str
    text: str
    fix: str


def telling_line(failure: Failure) -> str:
    """Why it failed: what happened, and the line of its log that says most."""
    lines = [line.strip() for line in failure.last_words.splitlines() if line.strip()]
    found = next((line for line in reversed(lines) if _TELLING.search(line)), lines[-1] if lines else "")
    return f"{failure.message}: {found}" if found else failure.message


class Attention:
    """Looks at one node. `open_address`: a listening address that others can reach though no key is asked
    for; `audit`: the audit file; `certificate`: what is wrong with that of the API.
    """

    def __init__(self, store: Store, pool: Pool, dispatch: Dispatch, recorder: Recorder) -> None:
        self.open_address = ""
        self.audit: Audit | None = None
        self.certificate: Callable[[], str] = lambda: ""
        self._store = store
        self._pool = pool
        self._dispatch = dispatch
        self._recorder = recorder
        self._since: dict[tuple[str, str], float] = {}
        self._full: dict[str, tuple[float, int]] = {}  # subject -> when it was full last, its limit

    def concerns(self, node: str, others: Iterable[Finding] = ()) -> list[Concern]:
        """Everything, the worst first. `others`: findings from elsewhere, about the mesh."""
        now = time.time()
        found = {
            (one.what, one.subject): one
            for look in (
                self._models,
                self._queues,
                self._config,
                self._files,
                self._machine,
                self._events,
            )
            for one in look(now)
        }
        found |= {(one.what, one.subject): one for one in others}
        self._since = {key: self._since.get(key, now) for key in found}
        concerns = [
            Concern(one.level, one.what, node, one.text[:2000], self._since[key], one.fix)
            for key, one in found.items()
        ]
        concerns.sort(key=lambda one: (one.level != "error", one.since))
        return concerns[:MOST_CONCERNS]

    # Each of these looks at one kind of trouble.

    def _models(self, now: float) -> Iterator[Finding]:
        for profile in self._store.current.cookbook.profiles:
            trouble, key = self._pool.trouble(profile.key), profile.key
            if trouble is None or not (trouble.failures or trouble.rounds) or trouble.last is None:
                continue
            why = telling_line(trouble.last)
            if trouble.out_of_memory:
                yield Finding(
                    "error",
                    "out_of_memory",
                    key,
                    f"{key} failed to start for want of memory: {why}",
                    "unload another model, give it a smaller context (-c), or set estimated_vram_mb "
                    "and estimated_sysmem_mb so that others leave first",
                )
            else:
                fix = "read its log, mend the profile in the cookbook, then ask for the model again"
                yield Finding("error", "load_failed", key, f"{key} failed to start: {why}", fix)

    def _queues(self, now: float) -> Iterator[Finding]:
        settings = self._store.current.settings
        for profile in self._store.current.cookbook.profiles:
            self._note_queue(profile.key, self._dispatch.queue_length(profile.key), self._limit(profile), now)
        self._note_queue("", self._dispatch.queue_length(), settings.max_total_queue_entries, now)
        self._full = {key: seen for key, seen in self._full.items() if now - seen[0] < _LINGERS}
        for key, (_, limit) in self._full.items():
            yield Finding(
                "warning",
                "queue_full",
                key,
                f"the queue of {key or 'this node'} is at its limit of {limit}: requests are refused",
                "add an instance or a node, or raise "
                + ("max_queue_size of the profile" if key else "max_total_queue_entries"),
            )

    def _limit(self, profile: Profile) -> int:
        if profile.max_queue_size is not None:
            return profile.max_queue_size
        return self._store.current.settings.model_defaults.max_queue_size_per_model

    def _note_queue(self, key: str, length: int, limit: int, now: float) -> None:
        if 0 < limit <= length:
            self._full[key] = (now, limit)

    def _config(self, now: float) -> Iterator[Finding]:
        problems = self._store.problems
        for problem in problems.problems[:8] if problems is not None else ():
            # Where the file is on the disk is nobody's business who only has a key.
            shown = str(replace(problem, file=PurePath(problem.file).name))
            yield Finding(
                "error",
                "config",
                shown,
                f"a file has a mistake and isn't in force: {shown}",
                "mend the file; it is read again by itself",
            )
        if self.open_address and not self._store.current.settings.auth.enabled:
            yield Finding(
                "warning",
                "no_auth",
                "",
                f"whoever reaches {self.open_address} can use the models: no key is asked for",
                "set auth.enabled and auth.allowed_keys, or listen on 127.0.0.1",
            )

    def _files(self, now: float) -> Iterator[Finding]:
        if self.audit is not None and (trouble := self.audit.trouble()):
            fix = "see that the disk has room and that audit.directory can be written"
            yield Finding("error", "audit", "", trouble, fix)
        if trouble := self.certificate():
            fix = "mend server_tls.cert_path and .key_path; they are read again by themselves"
            yield Finding("error", "certificate", "", trouble, fix)

    def _machine(self, now: float) -> Iterator[Finding]:
        reading = self._pool.memory.reading
        if reading is None or reading.gpu_telemetry:
            return
        broken = [device for device in reading.devices if device.error]
        if broken or any(driver.exists() for driver in _DRIVERS):
            why = (broken[0].error if broken else "") or next(iter(reading.problems), "no sensor answers")
            yield Finding(
                "warning",
                "no_sensors",
                "",
                f"this machine has a GPU, but how much of its memory is in use isn't known: {why}",
                "install the driver's management library, or set max_vram_mb and estimated_vram_mb",
            )

    def _events(self, now: float) -> Iterator[Finding]:
        """What only happened, and isn't to be seen any more."""
        lost: dict[str, Happening] = {}
        for one in self._recorder.events():
            age = now - one.time
            if one.event == "peer lost" and age < _LOST:
                lost[one.subject] = one
            elif one.event in ("peer joined", "peer recovered", "peer left"):
                lost.pop(one.subject, None)
            elif age < _RECENT and (finding := _of_event(one)) is not None:
                yield finding
        for node in lost:
            yield Finding(
                "error",
                "peer_lost",
                node,
                f"node {node} is lost: it doesn't answer, and no other node reaches it",
                "see whether the machine runs and has a network; it joins again by itself",
            )


def _of_event(one: Happening) -> Finding | None:
    if one.event in ("a node wasn't let in", "a handshake failed"):
        fix = "if it is yours: give it the token (llamesh invite, llamesh join), and look at known_peers"
        return Finding("warning", "unknown_key", one.text, one.text, fix)
    if one.event == "crashed":
        subject = one.subject.partition("#")[0]
        return Finding("warning", "crashed", subject, one.text, "read its log; a new instance is started")
    if one.event.startswith("another life of this node"):
        fix = "give each node a node_id of its own"
        return Finding("error", "same_id", "", "another node may use this node's id", fix)
    if one.event == "learned values can't be saved":
        return Finding("warning", "disk", "", one.text, "see that metrics_path can be written")
    return None
