"""The audit file: who did what, one JSON object a line, never with content and never with a key.

    request     an inference request, answered or refused
    admin       an act of administration, done or refused
    unlisted    so many more refused requests without a valid key: anybody can send those, without end
    lost        so many lines are missing here

A line is made when the request has ended, appended to a queue, and written by a thread of its own: no request
ever waits for the disk. While the disk says no, lines wait and are tried again each second; what has no room
in the queue is lost, counted, told in the log and to whoever asks for `trouble`, and in the file itself once
it can be written again.

A line reaches the kernel within 50 ms and the disk within about a second (`fdatasync`, in that thread): a
node that is killed loses the former, a power cut the latter. What a client can choose (ids, paths, names) is
JSON text of bounded length, in which nothing ends a line.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from pathlib import Path
from typing import Protocol, Self

from llamesh.telemetry.audit_lines import ActLine, CountLine, Line, RequestLine, cut, encoded
from llamesh.telemetry.log_files import RotatingFile
from llamesh.telemetry.log_lines import utc_text
from llamesh.telemetry.logs import get_logger
from llamesh.telemetry.recorder import Record

log = get_logger("audit")

_QUEUE_LINES = 20_000
_BATCH_LINES = 512

# How long lines gather before they are written together, and between two tries of a disk that says no.
_PAUSE_SECONDS = 0.05
_RETRY_SECONDS = 1.0

_SYNC_SECONDS = 1.0

# What an idle node's file needs now and then: a new day, retention.
_TURN_SECONDS = 600.0

_CLOSE_SECONDS = 5.0

# What those get who have no key, or a page that may not.
_LOCKED_OUT = (401, 403)

# Requests refused so that have a line of their own, in each second.
_STRANGERS = 20

# A line that waits for so long means a disk that doesn't answer; lost ones are worth a look for an hour.
_SLOW_SECONDS = 10.0
_RECENT_SECONDS = 3600.0

# Statuses whose message says why somebody wasn't let in. Others (of acts: from 500 on) may hold what a child
# printed.
_REFUSALS = (401, 403, 429)


class AuditSettings(Protocol):
    """The keys `audit.*` of config.yaml."""

    @property
    def directory(self) -> Path: ...
    @property
    def filename(self) -> str: ...
    @property
    def max_file_mb(self) -> int: ...
    @property
    def keep_days(self) -> int: ...
    @property
    def compression(self) -> bool: ...


class Audit:
    """The queue, the thread that empties it, and the file. `lost`: lines that never reach it.

    A context manager: the end writes what is queued, within 5 seconds.
    """

    def __init__(self, file: RotatingFile, node: str) -> None:
        self.lost = 0
        self._file = file
        self._node = node
        self._queue: deque[tuple[float, bytes]] = deque()
        self._told_lost = 0
        self._lost_at = 0.0
        self._failing = ""
        self._strangers = (0, 0)  # the second, and how many came in it
        self._unlisted = self._told_unlisted = 0
        self._synced = 0.0
        self._dirty = False
        self._turned = time.monotonic()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="audit-writer", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, settings: AuditSettings, node: str) -> Self:
        """Raises OSError when the file can't be written."""
        file = RotatingFile(
            settings.directory,
            settings.filename,
            keep=None,
            keep_days=settings.keep_days,
            compress=settings.compression,
            rotate_at=settings.max_file_mb << 20,
            mode=0o600,
        )
        return cls(file, node)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what is queued; a disk that doesn't answer is given up."""
        self._closing.set()
        self._wake.set()
        self._thread.join(_CLOSE_SECONDS)

    # What is told. From the thread of the requests.

    def request(self, record: Record, address: str) -> None:
        """An inference request has ended; its record is complete."""
        now, status = time.time(), record.status
        self._add(
            now,
            RequestLine(
                time=utc_text(now),
                what="request",
                node=self._node,
                request_id=cut(record.id),
                key=record.key,
                address=address,
                origin=record.origin,
                path=cut(record.path),
                model=cut(record.model),
                served_by=record.node,
                status=status,
                outcome=record.error or ("ok" if 0 < status < 400 else "upstream_status"),
                reason=cut(record.message) if status in _REFUSALS else "",
                prompt_tokens=record.prompt_tokens,
                cached_tokens=record.cached_tokens,
                completion_tokens=record.tokens,
                ms=None if record.ms is None else round(record.ms, 1),
            ),
        )

    def refused(
        self,
        request_id: str,
        key: str,
        address: str,
        origin: str,
        path: bytes,
        error: tuple[int, str, str],
    ) -> None:
        """An inference request wasn't admitted. `error`: status, type, message."""
        now = time.time()
        status, outcome, reason = error
        if not key and not origin and self._is_one_too_many(now, status):
            return
        line = RequestLine(
            time=utc_text(now),
            what="request",
            node=self._node,
            request_id=cut(request_id),
            key=key,
            address=address,
            origin=origin,
            path=cut(path),
            model="",
            served_by="",
            status=status,
            outcome=outcome,
            reason=cut(reason),
        )
        self._add(now, line)

    def act(
        self,
        key: str,
        address: str,
        path: str,
        node: str,
        model: str,
        outcome: tuple[int, str, str],
        *,
        request_id: str = "",
        origin: str = "",
        about: str = "",
    ) -> None:
        """An act of administration ended. `node`, `model`: that were named; `outcome`: status, "ok" or the
        error's type, why.
        """
        now = time.time()
        status, what, reason = outcome
        if not key and not origin and self._is_one_too_many(now, status):
            return
        line = ActLine(
            time=utc_text(now),
            what="admin",
            node=self._node,
            request_id=cut(request_id),
            key=key,
            address=address,
            origin=origin,
            path=cut(path),
            target=cut(node),
            model=cut(model),
            about=cut(about),
            status=status,
            outcome=what,
            reason=cut(reason) if status < 500 else "",
        )
        self._add(now, line)

    def trouble(self) -> str:
        """What is wrong with the file now, "" when nothing is."""
        name = self._file.path.name
        try:
            oldest = self._queue[0][0]
        except IndexError:
            oldest = time.time()
        lost = f"{self.lost} lines are lost so far" if self.lost else "no line is lost so far"
        if self._failing:
            return f"the audit file {name} can't be written: {self._failing}; {lost}"
        if time.time() - oldest > _SLOW_SECONDS:
            return f"the audit file {name} isn't written: its disk doesn't answer; {lost}"
        if self._lost_at and time.time() - self._lost_at < _RECENT_SECONDS:
            return f"the audit file {name} lacks lines: {lost}"
        return ""

    def _add(self, now: float, line: Line) -> None:
        if len(self._queue) >= _QUEUE_LINES:
            self.lost += 1
            self._lost_at = now
            if self.lost == self._told_lost + 1:
                log.error("lines of the audit file are lost: its disk is too slow, or says no")
            return
        self._queue.append((now, encoded(line)))
        if not self._wake.is_set():
            self._wake.set()

    def _is_one_too_many(self, now: float, status: int) -> bool:
        """Whether so many strangers were locked out in this second that this one is only counted."""
        if status not in _LOCKED_OUT:
            return False
        second, came = self._strangers
        came = came + 1 if second == int(now) else 1
        self._strangers = (int(now), came)
        if came <= _STRANGERS:
            return False
        self._unlisted += 1
        return True

    # The thread.

    def _run(self) -> None:
        while True:
            soon = self._dirty or self._unlisted != self._told_unlisted
            self._wake.wait(_SYNC_SECONDS if soon else _TURN_SECONDS)
            self._wake.clear()
            try:
                self._write_all()
                self._sync()
                self._turn()
                if self._failing:
                    self._failing = ""
                    log.info("the audit file can be written again", lost=self.lost)
            except OSError as error:
                self._fail(error)
                if self._closing.is_set():
                    break
                self._closing.wait(_RETRY_SECONDS)
                self._wake.set()
                continue
            if self._closing.is_set() and not self._queue:
                break
            self._closing.wait(_PAUSE_SECONDS)
        if left := len(self._queue):
            self.lost += left
            log.error("the audit file couldn't be written to its end", lines=left)
        try:
            self._sync(now=True)
            self._file.close()
        except OSError as error:
            self._fail(error)

    def _write_all(self) -> None:
        while self._queue:
            # Only this thread takes from the queue; lines stay there until they are on the disk.
            count = min(len(self._queue), _BATCH_LINES)
            self._file.write(b"".join(self._queue[at][1] for at in range(count)))
            for _ in range(count):
                self._queue.popleft()
            self._dirty = True
        if self.lost != self._told_lost:
            lost = self.lost
            self._count("lost", lost - self._told_lost)
            self._told_lost = lost
        if self._unlisted != self._told_unlisted and self._strangers[0] != int(time.time()):
            unlisted = self._unlisted
            self._count("unlisted", unlisted - self._told_unlisted)
            self._told_unlisted = unlisted

    def _count(self, what: str, count: int) -> None:
        now = utc_text(time.time())
        self._file.write(encoded(CountLine(time=now, what=what, node=self._node, count=count)))
        self._dirty = True

    def _sync(self, *, now: bool = False) -> None:
        if self._dirty and (now or time.monotonic() - self._synced >= _SYNC_SECONDS):
            self._file.sync()
            self._dirty, self._synced = False, time.monotonic()

    def _turn(self) -> None:
        if time.monotonic() - self._turned >= _TURN_SECONDS:
            self._turned = time.monotonic()
            self._file.turn()

    def _fail(self, error: OSError) -> None:
        if not self._failing:
            log.error("the audit file can't be written", file=str(self._file.path), error=str(error))
        self._failing = error.strerror or str(error)
