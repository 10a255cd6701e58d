"""The log as its readers see it: whole processes on pipes and terminals, slow readers, many threads."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from llamesh.telemetry import logs


@dataclass(frozen=True)
class Settings:
    enabled: bool = False
    directory: Path = Path("logs")
    filename: str = "proxy.log"
    max_keep_files: int = 7
    compression: bool = True


class Capture:
    """A log on a real pipe; `lines()` closes it and gives the JSON objects that came out."""

    def __init__(self, level: str, settings: Settings) -> None:
        read, write = os.pipe()
        self._reader = os.fdopen(read, "rb")
        self._writer = os.fdopen(write, "w")
        self.handle = logs.configure(settings, level=level, stream=self._writer)
        self._data = b""
        self._thread = threading.Thread(target=self._collect)
        self._thread.start()

    def _collect(self) -> None:
        self._data = self._reader.read()

    def close(self) -> bytes:
        self.handle.close()
        if not self._writer.closed:
            self._writer.close()
            self._thread.join(10)
            self._reader.close()
        return self._data

    def lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.close().splitlines()]


@pytest.fixture
def capture() -> Iterator[Callable[..., Capture]]:
    made: list[Capture] = []

    def make(level: str = "debug", settings: Settings | None = None) -> Capture:
        made.append(Capture(level, settings or Settings()))
        return made[-1]

    yield make
    for one in made:
        one.close()


def run(program: str, **environment: str) -> list[str]:
    command = [sys.executable, "-c", program]
    return [*command] if not environment else ["env", *(f"{k}={v}" for k, v in environment.items()), *command]


PROGRAM = """
import sys
from types import SimpleNamespace
from llamesh.telemetry import logs
settings = SimpleNamespace(enabled=False, directory=".", filename="x", max_keep_files=1, compression=True)
logs.configure(settings)
logs.get_logger("program").info("listening", url="http://127.0.0.1:41234", note="two words")
"""


def test_a_line_is_json_with_time_level_and_event_first(capture: Callable[..., Capture]) -> None:
    log = capture()
    logs.get_logger("pool").bind(request="r1").info("instance ready", port=41234, seconds=0.5, ok=True)
    [line] = log.lines()
    assert list(line)[:3] == ["time", "level", "event"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", str(line.pop("time")))
    assert line == {
        "level": "info",
        "event": "instance ready",
        "logger": "pool",
        "request": "r1",
        "port": 41234,
        "seconds": 0.5,
        "ok": True,
    }


def test_levels_below_the_configured_one_are_silent(capture: Callable[..., Capture]) -> None:
    log = capture("warning")
    logger = logs.get_logger("x")
    assert not logger.debugging
    for level in logs.LEVELS:
        logger.log(level, f"by name {level}")
    logger.debug("no")
    logger.info("no")
    logger.warning("yes")
    logger.error("yes")
    logger.critical("yes")
    events = [line["event"] for line in log.lines()]
    assert events == ["by name warning", "by name error", "by name critical", "yes", "yes", "yes"]


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match=r"verbose.*debug, info"):
        logs.configure(Settings(), level="verbose")


def test_loggers_made_before_configure_follow_it_and_its_end(
    capture: Callable[..., Capture], capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logs.get_logger("early")
    log = capture()
    logger.info("inside")
    assert [line["event"] for line in log.lines()] == ["inside"]
    logger.info("too quiet for stderr")
    logger.warning("after")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [json.loads(line)["event"] for line in captured.err.splitlines()] == ["after"]


def test_exceptions_come_with_their_traceback_on_one_line(capture: Callable[..., Capture]) -> None:
    log = capture()
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        logs.get_logger("x").exception("failed")
        caught = error
    logs.get_logger("x").warning("later", exc_info=caught)
    logs.get_logger("x").info("none", exc_info=None)
    first, second, third = log.lines()
    assert (first["level"], second["level"]) == ("error", "warning")
    for line in (first, second):
        assert "ValueError: two\nlines" in str(line["exception"])
        assert "test_exceptions_come" in str(line["exception"])
    assert "exception" not in third
    assert "exc_info" not in third


def test_a_field_cannot_pose_as_time_or_level(capture: Callable[..., Capture]) -> None:
    log = capture()
    logs.get_logger("x").bind(event="no").info(
        "yes", level="critical", time="never", method_name="GET", self="s"
    )
    [line] = log.lines()
    assert (line["event"], line["level"]) == ("yes", "info")
    assert (line["level_"], line["time_"], line["method_name"]) == ("critical", "never", "GET")


def test_values_are_those_of_the_moment_of_the_call(capture: Callable[..., Capture]) -> None:
    log = capture()
    flags = ["a"]
    logs.get_logger("x").info("e", flags=flags)
    flags.append("b")
    assert log.lines()[0]["flags"] == ["a"]


def test_a_pipe_gets_json_without_colour_whatever_the_environment() -> None:
    done = subprocess.run(
        run(PROGRAM, FORCE_COLOR="1", TERM="xterm-256color"), capture_output=True, timeout=60
    )
    assert done.stderr == b""
    line = json.loads(done.stdout)  # written although nobody closed the log: at exit
    assert (line["event"], line["url"]) == ("listening", "http://127.0.0.1:41234")
    assert b"\x1b" not in done.stdout


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [({"NO_COLOR": ""}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
)
def test_a_terminal_gets_readable_lines(environment: dict[str, str], coloured: bool) -> None:
    ours, theirs = pty.openpty()
    environment = {"TERM": "xterm", "NO_COLOR": "", **environment}
    process = subprocess.Popen(run(PROGRAM, **environment), stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # Linux says so when the other side is closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    assert process.communicate(timeout=60)[1] == b""
    assert (b"\x1b[" in shown) is coloured
    text = re.sub(r"\x1b\[[0-9;]*m", "", shown.decode())
    expected = (
        r'[\d:.]{12} info     listening +logger=program url=http://127.0.0.1:41234 note="two words"\r\n'
    )
    assert re.fullmatch(expected, text)


def test_overflow_drops_lines_and_says_how_many() -> None:
    """A reader that doesn't read: calls return, the queue stays bounded, and the count adds up."""
    read, write = os.pipe()
    with os.fdopen(read, "rb") as reader, os.fdopen(write, "w") as writer:
        handle = logs.configure(Settings(), stream=writer)
        logger = logs.get_logger("x")
        sent = 30_000
        for number in range(sent):
            logger.info("e", number=number, filler="x" * 100)
        lines: list[dict[str, Any]] = []
        collector = threading.Thread(target=lambda: lines.extend(json.loads(line) for line in reader))
        collector.start()
        handle.close()
        writer.close()
        collector.join(20)
        numbers = [line["number"] for line in lines if line["event"] == "e"]
        dropped = [line for line in lines if line["event"] == "log lines dropped"]
    assert numbers == sorted(numbers)
    assert 10_000 <= len(numbers) < sent
    assert {line["level"] for line in dropped} == {"warning"}
    assert len(numbers) + sum(line["lines"] for line in dropped) == sent


def test_close_is_bounded_when_nobody_reads() -> None:
    program = PROGRAM + "\nfor n in range(20000): logs.get_logger('x').info('e', filler='x' * 100)\n"
    process = subprocess.Popen(run(program), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        assert process.wait(60) == 0  # stdout was never read
        assert process.stderr.read() == b""
    finally:
        process.kill()
        process.stdout.close()
        process.stderr.close()


def test_a_reader_that_goes_away_is_survived() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as writer, logs.configure(Settings(), stream=writer) as handle:
        logs.get_logger("x").info("to nobody")
        handle.close()
        handle.close()
        logs.get_logger("x").info("still fine")


def test_a_non_blocking_stdout_loses_nothing() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    with os.fdopen(read, "rb") as reader, os.fdopen(write, "w") as writer:
        handle = logs.configure(Settings(), stream=writer)
        for number in range(5_000):
            logs.get_logger("x").info("e", number=number)
        seen: list[int] = []
        collector = threading.Thread(
            target=lambda: seen.extend(json.loads(line)["number"] for line in reader)
        )
        collector.start()
        handle.close()
        writer.close()
        collector.join(20)
    assert seen == list(range(5_000))


def test_a_stream_without_descriptor_works() -> None:
    stream = io.StringIO()
    with logs.configure(Settings(), stream=stream):
        logs.get_logger("x").info("e")
    assert json.loads(stream.getvalue())["event"] == "e"


def test_lines_of_many_threads_stay_whole(capture: Callable[..., Capture]) -> None:
    log = capture()

    def work(name: int) -> None:
        for number in range(500):
            logs.get_logger("x").info("e", name=name, number=number)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = log.lines()
    for name in range(4):
        assert [line["number"] for line in lines if line["name"] == name] == list(range(500))


def test_standard_logging_warnings_are_brought_in(capture: Callable[..., Capture]) -> None:
    log = capture("info")
    library = logging.getLogger("some.library")
    library.info("not this")
    library.warning("peer %s is odd", "a\nb")
    [ours] = [
        handler for handler in logging.getLogger().handlers if type(handler).__module__ == logs.__name__
    ]
    ours.handle(library.makeRecord(library.name, logging.ERROR, "f", 1, "misformatted %d", ("x",), None))
    try:
        raise OSError("disk")
    except OSError:
        library.exception("failed")
    first, second, third = log.lines()
    assert (first["level"], first["event"], first["logger"]) == (
        "warning",
        "peer a\nb is odd",
        "some.library",
    )
    assert second["event"] == "misformatted %d"
    assert "OSError: disk" in str(third["exception"])
    assert ours not in logging.getLogger().handlers


def test_the_extra_file_gets_json_too(tmp_path: Path, capture: Callable[..., Capture]) -> None:
    log = capture("info", Settings(enabled=True, directory=tmp_path / "new" / "logs"))
    logs.get_logger("x").info("e", number=1)
    [line] = log.lines()
    path = tmp_path / "new" / "logs" / "proxy.log"
    assert json.loads(path.read_text()) == line
    assert path.stat().st_mode & 0o007 == 0


def test_a_file_that_cannot_be_made_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        logs.configure(Settings(enabled=True, directory=tmp_path / "file" / "logs"))


def test_a_file_that_fails_later_is_reported_once(tmp_path: Path, capture: Callable[..., Capture]) -> None:
    directory = tmp_path / "logs"
    log = capture("info", Settings(enabled=True, directory=directory))
    (directory / "proxy.log").unlink()
    directory.rmdir()
    directory.write_text("in the way")
    for number in range(3):
        logs.get_logger("x").info("e", number=number)
    lines = log.lines()
    assert [line["number"] for line in lines if line["event"] == "e"] == [0, 1, 2]
    assert [line["level"] for line in lines if line["event"] == "log file can't be written"] == ["error"]


def test_settings_of_the_protocol_are_enough() -> None:
    """The log depends on five attributes, not on the settings module."""
    settings: logs.LogSettings = replace(Settings(), enabled=False)
    with logs.configure(settings, stream=io.StringIO()):
        pass
