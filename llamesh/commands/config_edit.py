"""Putting a node into a mesh by changing its config.yaml, with everything else in it kept.

ruamel.yaml says where what stands; the few characters that are missing are put in there, and every other
one stays: comments, order, quotes, indentation, blanks. (Its round trip keeps less: it moves comments and
dashes, and gives up on some of what people write.) Whatever comes out is read again before it counts,
and must mean what was meant.
"""

from __future__ import annotations

import contextlib
import copy
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode

from llamesh.config.problems import ConfigError
from llamesh.config.settings import Address
from llamesh.config.yaml_source import MAX_BYTES, parse_yaml

_NEW_FILE_MODE = 0o644


class CannotEdit(Exception):
    """The file can't be changed without harm; the message has the lines to write by hand."""


def read(path: Path) -> str:
    """The file's text, empty where there is none. Raises CannotEdit."""
    try:
        with path.open("rb") as source:
            raw = source.read(MAX_BYTES + 1)
        return raw.decode("utf-8-sig")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it isn't UTF-8 text"
        raise CannotEdit(f"{path} can't be read: {reason}") from None


def joined(text: str, file: str, peers: Sequence[Address]) -> str:
    """The text with `cluster.enabled: true` and these peers among `cluster.peers`.

    The very same text if that is so already. Raises CannotEdit.
    """
    try:
        before = parse_yaml(text, file).data
    except ConfigError as error:
        raise CannotEdit(str(error)) from None
    wanted = _wanted(before, peers)
    if wanted is None:
        raise _by_hand(file, "isn't a mapping where one belongs", peers)
    if wanted == before:
        return text
    if isinstance(before, dict) and "cluster" in before:
        present = (before["cluster"] or {}).get("peers") or []
        candidates = _inserted(text, _missing(present, peers))
    else:
        candidates = [_appended(text, peers), *_into_flow(text, peers)]
    for candidate in candidates:
        with contextlib.suppress(ConfigError):
            if parse_yaml(candidate, file).data == wanted:
                return candidate
    raise _by_hand(file, "is written in a way that can't be changed safely", peers)


@contextlib.contextmanager
def staged(path: Path, text: str) -> Iterator[Path]:
    """Write the text to a file beside `path`; after the block it takes the place of `path`, as a whole.

    The block gets the name of that file, to look whether it is right: an exception leaves `path` as it
    was. The mode stays; a symlink keeps leading to the file. Raises CannotEdit.
    """
    target = Path(os.path.realpath(path))
    # It ends as the other one does: what reads it may go by that.
    temporary = target.with_name(f".{target.stem}.{os.getpid()}.{secrets.token_hex(4)}{target.suffix}")
    try:
        try:
            mode = target.stat().st_mode & 0o777
        except FileNotFoundError:
            mode = None
        how = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        handle = os.open(temporary, how, _NEW_FILE_MODE if mode is None else mode)
        with os.fdopen(handle, "wb") as sink:
            if mode is not None:
                os.fchmod(handle, mode)
            sink.write(text.encode("utf-8"))
            sink.flush()
            os.fsync(handle)
        yield temporary
        temporary.replace(target)
    except OSError as error:
        raise CannotEdit(f"{path} can't be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def _wanted(data: Any, peers: Sequence[Address]) -> dict[str, Any] | None:
    """What the file should say; None if its shape is wrong."""
    data = {} if data is None else copy.deepcopy(data)
    if not isinstance(data, dict):
        return None
    cluster = data.setdefault("cluster", None) or {}
    if not isinstance(cluster, dict):
        return None
    present = cluster.get("peers") or []
    if not isinstance(present, list):
        return None
    missing = _missing(present, peers)
    data["cluster"] = cluster | {"enabled": True} | ({"peers": present + missing} if missing else {})
    return data


def _missing(present: Sequence[Any], peers: Sequence[Address]) -> list[str]:
    known = set()
    for entry in present:
        # An entry with more than an address is a mapping.
        text = entry.get("address") if isinstance(entry, dict) else entry
        with contextlib.suppress(ValueError):
            known.add(Address.parse(str(text).strip()))
    return [str(peer) for peer in peers if peer not in known]


def _section(peers: Sequence[Address]) -> str:
    lines = ["cluster:", "  enabled: true"]
    if peers:
        lines += ["  peers:", *(f'    - "{peer}"' for peer in peers)]
    return "\n".join(lines) + "\n"


def _appended(text: str, peers: Sequence[Address]) -> str:
    gap = "" if not text.strip() else "\n" if text.endswith("\n") else "\n\n"
    ends = "\r\n" if "\r\n" in text else "\n"
    return text + (gap + _section(peers)).replace("\n", ends)


def _into_flow(text: str, peers: Sequence[Address]) -> list[str]:
    """A file that is one `{...}`, as JSON is, with a `cluster` in front."""
    root = _composed(text)
    if not isinstance(root, MappingNode) or not root.flow_style:
        return []
    edits = _Edits(text)
    inside = ", ".join(['"enabled": true', *_flow_member([str(peer) for peer in peers])])
    edits.insert(root.start_mark.index + 1, f'"cluster": {{{inside}}}' + (", " if root.value else ""))
    return [edits.done()]


def _inserted(text: str, peers: Sequence[str]) -> list[str]:
    """The text with a few characters put in where they belong: one candidate, or none."""
    root = _composed(text)
    section = _value(root, "cluster")
    if section is None:
        return []
    edits = _Edits(text)
    key, cluster = section
    if _is_null(cluster):
        step = key.start_mark.column + 2
        edits.after_line(key.end_mark.line, _block(["enabled: true"], step) + _listed(peers, step))
    elif not isinstance(cluster, MappingNode) or not cluster.value:
        edits.replace(section, "{" + ", ".join(["enabled: true", *_flow_member(peers)]) + "}")
    else:
        _into_mapping(edits, key, cluster, peers)
    return [edits.done()]


def _into_mapping(edits: _Edits, key: Any, cluster: MappingNode, peers: Sequence[str]) -> None:
    enabled, present = _value(cluster, "enabled"), _value(cluster, "peers")
    first = cluster.value[0][0]
    column = first.start_mark.column
    members: list[str] = []
    if enabled is None:
        members.append("enabled: true")
    elif enabled[1].value != "true":
        edits.replace(enabled, "true")
    listed = ""
    if peers and present is None:
        listed = _listed(peers, column)
        members += _flow_member(peers) if cluster.flow_style else []
    elif peers and present is not None:
        _into_list(edits, present, peers)
    if cluster.flow_style:
        edits.insert(first.start_mark.index, "".join(f"{member}, " for member in members))
    else:
        # Right behind `cluster:`, so that comments stay with the key that they stand above.
        edits.after_line(key.end_mark.line, _block(members, column) + listed)


def _into_list(edits: _Edits, pair: tuple[Any, Any], peers: Sequence[str]) -> None:
    quoted, node = [f'"{peer}"' for peer in peers], pair[1]
    if not isinstance(node, SequenceNode) or not node.value:
        edits.replace(pair, "[" + ", ".join(quoted) + "]")
    elif node.flow_style:
        edits.insert(node.value[-1].end_mark.index, "".join(f", {peer}" for peer in quoted))
    else:
        # The column of a list is that of its dashes.
        lines = _block([f"- {peer}" for peer in quoted], node.start_mark.column)
        edits.after_line(_last(node).end_mark.line, lines)


class _Edits:
    """Changes to a text, by positions in it as it was."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._ends = "\r\n" if "\r\n" in text else "\n"
        self._changes: list[tuple[int, int, str]] = []

    def replace(self, pair: tuple[Any, Any], new: str) -> None:
        """Put `new` where the value of a key stands, or would stand where there is none."""
        key, node = pair
        if _is_null(node):
            # A value that isn't there has no place of its own.
            at = self._text.find(":", key.end_mark.index) + 1
            self.insert(at, f" {new}")
        else:
            self._changes.append((node.start_mark.index, node.end_mark.index, new))

    def insert(self, index: int, new: str) -> None:
        """Put `new` in front of what is at `index`."""
        self._changes.append((index, index, new))

    def after_line(self, line: int, new: str) -> None:
        """Put whole lines behind a line, counted from 0, which may be the last one and not end."""
        at, lines = self._start(line + 1), new.replace("\n", self._ends)
        ended = at == 0 or self._text[at - 1] == "\n"
        self.insert(at, lines if ended else self._ends + lines)

    def done(self) -> str:
        """The text with all changes."""
        text = self._text
        for start, end, new in sorted(self._changes, reverse=True):
            text = text[:start] + new + text[end:]
        return text

    def _start(self, line: int) -> int:
        at = 0
        for _ in range(line):
            found = self._text.find("\n", at)
            if found < 0:
                return len(self._text)
            at = found + 1
        return at


def _composed(text: str) -> Any:
    try:
        return YAML(typ="safe", pure=True).compose(text)
    except (YAMLError, ValueError, LookupError, AttributeError, TypeError, AssertionError, RecursionError):
        return None  # `parse_yaml` is milder here and there; the lines go in by hand then


def _value(node: Any, name: str) -> tuple[Any, Any] | None:
    """Key and value of this name in a mapping."""
    pairs = node.value if isinstance(node, MappingNode) else []
    return next((pair for pair in pairs if isinstance(pair[0], ScalarNode) and pair[0].value == name), None)


def _is_null(node: Any) -> bool:
    return isinstance(node, ScalarNode) and node.start_mark.index == node.end_mark.index


def _last(node: Any) -> Any:
    """The last node inside: a block that holds others has no end of its own."""
    while isinstance(node, (MappingNode, SequenceNode)) and node.value and not node.flow_style:
        node = node.value[-1][1] if isinstance(node, MappingNode) else node.value[-1]
    return node


def _block(lines: Sequence[str], column: int) -> str:
    return "".join(f"{' ' * column}{line}\n" for line in lines)


def _listed(peers: Sequence[str], column: int) -> str:
    if not peers:
        return ""
    return _block(["peers:"], column) + _block([f'- "{peer}"' for peer in peers], column + 2)


def _flow_member(peers: Sequence[str]) -> list[str]:
    return ["peers: [" + ", ".join(f'"{peer}"' for peer in peers) + "]"] if peers else []


def _by_hand(file: str, why: str, peers: Sequence[Address]) -> CannotEdit:
    return CannotEdit(f"{file} {why}; write this into it yourself:\n{_section(peers)}")
