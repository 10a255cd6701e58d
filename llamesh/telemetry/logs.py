"""Structured logs that never hold up the program.

`get_logger(name)` gives a structlog logger. A call cleans and renders the event, appends the
line to a queue and returns: microseconds, whatever the reader of our output does. One daemon
thread writes the lines in batches. When the reader is slower than we are for long, the queue
is full, lines are dropped, and one line says how many: losing lines is better than losing
requests.

To a file or a pipe goes one JSON object a line, to a terminal a line for people; `log_lines`
says what they look like and what is hidden. An extra file (`logging.*` in config.yaml) always
gets JSON. Warnings of libraries that use the standard `logging` come out the same way.

Before `configure` and after its handle is closed, warnings and worse go to stderr directly:
tests and tools need no set-up.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, Self, TextIO

from llamesh.telemetry.lean_structlog import BoundLoggerBase, DropEvent
from llamesh.telemetry.log_files import RotatingFile
from llamesh.telemetry.log_lines import clean, json_line, terminal_line

LEVELS: Mapping[str, int] = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
_DEBUG, _INFO, _WARNING, _ERROR, _CRITICAL = LEVELS.values()

_QUEUE_LINES = 10_000
_BATCH_LINES = 512
# A busy node then wakes the writer 50 times a second, not once a line.
_PAUSE_SECONDS = 0.02
_CLOSE_SECONDS = 2.0


class LogSettings(Protocol):
    """The keys `logging.*` of config.yaml."""

    @property
    def enabled(self) -> bool: ...
    @property
    def directory(self) -> Path | str: ...
    @property
    def filename(self) -> str: ...
    @property
    def max_keep_files(self) -> int: ...
    @property
    def compression(self) -> bool: ...


class _Output(Protocol):
    """Where events go. `threshold` is the least level, as a number, that it wants."""

    threshold: int

    def emit(self, level: str, fields: Mapping[str, Any]) -> None: ...


class _Direct:
    """Nothing is configured: what matters goes to stderr, at once."""

    threshold = _WARNING

    def emit(self, level: str, fields: Mapping[str, Any]) -> None:
        stream = sys.stderr  # looked up each time: a test or a tool may have replaced it
        with contextlib.suppress(Exception):  # none, closed or full: there is nobody left to tell
            stream.write(_Rendering(stream).line(time.time(), level, fields).decode())


class _Rendering:
    """How lines look on a stream: JSON, or for people on a terminal, coloured unless NO_COLOR is set."""

    def __init__(self, stream: TextIO) -> None:
        try:
            self.terminal = stream.isatty()
        except ValueError:  # closed
            self.terminal = False
        self._colour = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def line(self, now: float, level: str, fields: Mapping[str, Any]) -> bytes:
        if self.terminal:
            return terminal_line(now, level, fields, colour=self._colour)
        return json_line(now, level, fields)


class LogWriter:
    """The queue, the thread that empties it, and the streams that it writes to. `configure` makes one.

    `emit` may be called from any thread and doesn't block. `close` writes what is queued and
    ends the thread, within 2 seconds even when nobody reads our output. It is a context
    manager, too.
    """

    def __init__(self, stream: TextIO, file: RotatingFile | None, threshold: int) -> None:
        self.threshold = threshold
        self._stream = stream
        self._rendering = _Rendering(stream)
        self._file = file
        self._file_failed = False
        self._stream_gone = False
        self._queue: deque[tuple[bytes, bytes]] = deque()
        self._dropped = 0
        self._dropped_lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = threading.Event()
        # The descriptor rather than the stream: a daemon thread that dies inside a buffered
        # write takes the interpreter down with it.
        self._fd: int | None = None
        with contextlib.suppress(OSError, ValueError, io.UnsupportedOperation):
            stream.flush()
            self._fd = stream.fileno()
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def emit(self, level: str, fields: Mapping[str, Any]) -> None:
        """Queues one event; `fields` are clean (see `log_lines.clean`)."""
        if len(self._queue) >= _QUEUE_LINES:
            with self._dropped_lock:
                self._dropped += 1
            return
        now = time.time()
        line = self._rendering.line(now, level, fields)
        for_file = line
        if self._file is not None and self._rendering.terminal:
            for_file = json_line(now, level, fields)
        self._queue.append((line, for_file))
        # After the append: the writer clears the flag before it empties the queue, so no line is left behind.
        if not self._wake.is_set():
            self._wake.set()

    def close(self) -> None:
        """Writes what is queued, within 2 seconds; later events go to stderr. Closing twice is fine."""
        global _output
        if _output is self:
            _output = _Direct()
            logging.getLogger().removeHandler(_STANDARD)
        atexit.unregister(self.close)
        self._closing.set()
        self._wake.set()
        self._thread.join(_CLOSE_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            while self._queue:
                self._write_batch()
            self._report_dropped()
            if self._closing.is_set():
                break
            self._closing.wait(_PAUSE_SECONDS)
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

    def _write_batch(self) -> None:
        # Only this thread takes from the queue, so what was counted is there.
        batch = [self._queue.popleft() for _ in range(min(len(self._queue), _BATCH_LINES))]
        self._write_stream(b"".join(line for line, _ in batch))
        self._write_file(b"".join(line for _, line in batch))

    def _report_dropped(self) -> None:
        with self._dropped_lock:
            dropped, self._dropped = self._dropped, 0
        if dropped:
            self._say("warning", {"event": "log lines dropped", "lines": dropped})

    def _say(self, level: str, fields: dict[str, Any]) -> None:
        """A line of the writer's own, past the queue."""
        self._write_stream(self._rendering.line(time.time(), level, fields))
        if not self._file_failed:
            self._write_file(json_line(time.time(), level, fields))

    def _write_stream(self, data: bytes) -> None:
        if self._stream_gone:
            return
        try:
            if self._fd is None:
                self._stream.write(data.decode())
                self._stream.flush()
                return
            view = memoryview(data)
            while view:
                try:
                    view = view[os.write(self._fd, view) :]
                except BlockingIOError:  # someone made our stdout non-blocking, and its reader is slow
                    time.sleep(0.01)
        except BrokenPipeError:
            self._stream_gone = True
        except (OSError, ValueError):
            pass  # a full disk behind a redirection: this batch is lost, the next one is tried

    def _write_file(self, data: bytes) -> None:
        if self._file is None:
            return
        try:
            self._file.write(data)
            self._file_failed = False
        except OSError as error:
            if not self._file_failed:
                self._file_failed = True
                fields = {
                    "event": "log file can't be written",
                    "file": str(self._file.path),
                    "error": str(error),
                }
                self._say("error", fields)


class _StandardHandler(logging.Handler):
    """Brings warnings of libraries into our log."""

    def emit(self, record: logging.LogRecord) -> None:
        level = next(
            (name for name, number in reversed([*LEVELS.items()]) if record.levelno >= number), "debug"
        )
        try:
            event = record.getMessage()
        except Exception:  # arguments that don't fit the format: a library's defect
            event = str(record.msg)
        fields: dict[str, Any] = {"logger": record.name}
        if record.exc_info:
            fields["exc_info"] = record.exc_info
        Logger(None, [_cleaned], fields).log(level, event)


_STANDARD = _StandardHandler(level=logging.WARNING)
_output: _Output = _Direct()
_listeners: tuple[Callable[[str, Mapping[str, Any]], None], ...] = ()
_heard: frozenset[str] = frozenset()


def _cleaned(
    _logger: object, _method: str, event: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The last structlog processor: the event as the single argument of `_Output.emit`."""
    return (clean(event),), {}


class Logger(BoundLoggerBase):
    """A structlog logger: `log.info("instance ready", port=41234)`; `log.bind(request=id)` adds a field.

    The event is a short constant text, what varies goes into fields. A call below the
    configured level costs a comparison. No call raises.
    """

    @property
    def debugging(self) -> bool:
        """Whether `debug` lines go anywhere: asked before collecting what only they show."""
        return _output.threshold <= _DEBUG

    def debug(self, event: str, /, **fields: object) -> None:
        if _output.threshold <= _DEBUG:
            self._send("debug", event, fields)

    def info(self, event: str, /, **fields: object) -> None:
        if _output.threshold <= _INFO:
            self._send("info", event, fields)

    def warning(self, event: str, /, **fields: object) -> None:
        if _output.threshold <= _WARNING:
            self._send("warning", event, fields)

    def error(self, event: str, /, **fields: object) -> None:
        if _output.threshold <= _ERROR:
            self._send("error", event, fields)

    def critical(self, event: str, /, **fields: object) -> None:
        self._send("critical", event, fields)

    def exception(self, event: str, /, **fields: object) -> None:
        """An error with the traceback of the exception being handled."""
        if _output.threshold <= _ERROR:
            self._send("error", event, {"exc_info": True, **fields})

    def log(self, level: str, event: str, /, **fields: object) -> None:
        """An event of a level that is only known when it happens; `level` is one of `LEVELS`."""
        if _output.threshold <= LEVELS[level]:
            self._send(level, event, fields)

    def _send(self, level: str, event: str, fields: dict[str, Any]) -> None:
        output = _output
        try:
            arguments, _ = self._process_event(level, event, fields)
            output.emit(level, arguments[0])
            if level != "info" or event in _heard:
                for listener in _listeners:
                    listener(level, arguments[0])
        except DropEvent:
            pass
        except Exception as error:  # the border: whoever logs is busy with something that matters more
            with contextlib.suppress(Exception):
                output.emit("error", {"event": "an event could not be logged", "error": type(error).__name__})


def listen(
    listener: Callable[[str, Mapping[str, Any]], None], events: Iterable[str] = ()
) -> Callable[[], None]:
    """Have `listener` called with level and clean fields of each line, in the thread that logs; it must be
    quick. Of level info only with `events`, since there is one for each request. The result ends that.
    """
    global _listeners, _heard
    _listeners, _heard = (*_listeners, listener), _heard.union(events)

    def end() -> None:
        global _listeners
        _listeners = tuple(one for one in _listeners if one is not listener)

    return end


def get_logger(name: str, **fields: object) -> Logger:
    """The logger of a part of the program (`logger` on its lines), with `fields` on each line."""
    return Logger(None, [_cleaned], {"logger": name, **fields})


def configure(settings: LogSettings, *, level: str = "info", stream: TextIO | None = None) -> LogWriter:
    """Starts the log of a program: to `stream` (stdout), and to the file that `settings` enable.

    All loggers write there until the handle is closed, those made before included. Raises
    OSError when the directory or file can't be made, ValueError for a level not in `LEVELS`.
    """
    global _output
    if level not in LEVELS:
        raise ValueError(f"{level!r} is not a log level; use one of {', '.join(LEVELS)}")
    file = None
    if settings.enabled:
        file = RotatingFile(
            Path(settings.directory),
            settings.filename,
            keep=settings.max_keep_files,
            compress=settings.compression,
        )
    writer = LogWriter(stream if stream is not None else sys.stdout, file, LEVELS[level])
    _output = writer
    logging.getLogger().addHandler(_STANDARD)
    return writer
