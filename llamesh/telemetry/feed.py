"""Which lines of the log are events for an operator, and what they say in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Level = Literal["info", "warning", "error"]

# Level, event, text, subject.
Said = tuple[Level, str, str, str]

# The event of a line -> the sentence. What is missing among the fields is left out of the feed.
_SENTENCES = {
    "peer joined": "node {peer} has joined the mesh",
    "peer left": "node {peer} has left the mesh",
    "peer recovered": "node {peer} answers again",
    "peer doesn't answer": "node {peer} doesn't answer",
    "peer lost": "node {peer} is lost: it doesn't answer, and nobody else reaches it",
    "a node wasn't let in": "a node wasn't let in: {problem}",
    "a handshake failed": "a node wasn't let in: {problem}",
    "another version": "node {peer} has version {version}",
    "starting": "{instance} starts",
    "ready": "{instance} is ready after {seconds} s, with {slots} slots",
    "draining": "{instance} leaves after its requests: {reason}",
    "gone": "{instance} has ended: {reason}",
    "serving again": "{instance} stays after all",
    "start failed": "{instance} failed to start: {error}",
    "crashed": "{instance} crashed: {error}",
    "hung": "{instance} hung for {seconds} s and is ended",
    "upstream broke": "{instance} broke in the middle of a request: {error}",
    "drained on request": "drained: no new requests are taken",
    "undrained on request": "undrained: requests are taken again",
    "paused on request": "paused: this machine is left to its owner",
    "pause ended on request": "the pause is over",
    "cancelled on request": "request {request_id} was cancelled by an operator",
    "administered by another node": "the operator of node {peer} did this here: {act}",
    "another node's administration was refused": "the operator of node {peer} was refused this here: {act}",
    "prewarm failed": "{profile} couldn't be loaded: {error}",
    "reloaded": "the files were read again",
    "a file was changed and has a mistake; the old one stays": (
        "a file has a mistake and isn't in force: {problem}"
    ),
    "these settings take effect at the next start": "these take effect at the next start: {settings}",
    "listening": "listening on {url}",
    "certificate reloaded": "the certificate was read again",
    "a sensor has nothing to say": "a sensor has nothing to say: {problem}",
}  # fmt: skip

TOLD = frozenset(_SENTENCES)
"""Events that are told whatever their level."""

# Shown with a level of their own, since the log's is about something else.
_LEVELS: dict[str, Level] = {"a sensor has nothing to say": "warning", "peer doesn't answer": "warning"}

# Fields that name whom an event is about, the first that there is.
_SUBJECTS = ("instance", "peer", "profile", "model", "request_id")

# Fields of each line that say nothing to people.
_SILENT = frozenset({"event", "logger", "exception"})


def describe(level: str, fields: Mapping[str, Any]) -> Said | None:
    """A line of the log as an event; None when it isn't one. `fields` are clean, see `log_lines.clean`."""
    event = fields.get("event", "")
    sentence = _SENTENCES.get(event)
    if sentence is None and level not in ("warning", "error", "critical"):
        return None
    subject = next((str(fields[name]) for name in _SUBJECTS if name in fields), "")
    shown: Level = _LEVELS.get(event) or (
        "error" if level in ("error", "critical") else "warning" if level == "warning" else "info"
    )
    if event == "peer lost" and "error" in fields:
        # The relay's: a request went to it and didn't come back.
        return shown, "request lost", f"a request was lost with node {subject}: {fields['error']}", subject
    try:
        text = sentence.format_map(fields) if sentence is not None else None
    except (KeyError, ValueError, IndexError, AttributeError):
        text = None
    return shown, str(event), text if text is not None else _plainly(str(event), fields), subject


def _plainly(event: str, fields: Mapping[str, Any]) -> str:
    details = ", ".join(f"{name} {value}" for name, value in fields.items() if name not in _SILENT)
    return f"{event}: {details}" if details else event
