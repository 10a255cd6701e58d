"""YAML from strangers: plain data with the line of every key, and no way to hurt the reader.

The tree is built from ruamel.yaml's event stream, without recursion, so that size, depth and
aliases are bounded while reading, and a bad file is refused at once instead of being expanded.
Anchors, aliases and merge keys (`<<`) work; what they expand to counts against the same bound.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
)
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.reader import ReaderError

from llamesh.config.problems import ConfigError, KeyPath, Place, Problem, written

# The pure-Python scanner reads about 1 MB/s and 40,000 events/s at its worst. These bounds keep a
# refusal under a second, and still hold a cookbook of a thousand profiles.
MAX_BYTES = 512 * 1024
MAX_NODES = 20_000
MAX_DEPTH = 32
# Python takes quadratic time for long ones.
_LONGEST_NUMBER = 100

_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True, slots=True)
class Document:
    """What a file says.

    `data` is made of dict (text keys), list, str, int, float, bool and None; an empty file is None.
    `places` has the place of each key and list item by its path. `problems` are those that left
    something to go on with, such as a key that stands there twice (the first one counts).
    """

    file: str
    data: Any
    places: Mapping[KeyPath, Place]
    problems: tuple[Problem, ...] = ()


def read_yaml(path: Path, *, absent: str = "check the path") -> Document:
    """Read one file; `ConfigError` when it can't be read or isn't YAML. absent: advice when there is none."""
    text = _read_text(path, absent)
    return parse_yaml(text, str(path))


def parse_yaml(text: str, file: str) -> Document:
    """Parse the text of `file`; `ConfigError` when it isn't YAML, or more than a person writes."""
    try:
        builder = _Builder(file)
        builder.build(text)
        return builder.document()
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else None
        # Never `str(error)`: it quotes the line, and the line may hold a key.
        words = " ".join(str(error.problem or error.context or "it can't be parsed").split())
        raise _refused(file, line, f"not valid YAML: {words}", _syntax_hint(words)) from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1 if isinstance(error.position, int) else None
        raise _refused(file, line, "holds a character that YAML forbids", "save it as plain text") from None
    except (YAMLError, ValueError, LookupError, AttributeError, AssertionError, TypeError, RecursionError):
        # ruamel.yaml answers some garbage with whatever happens to break first.
        raise _refused(file, None, "not valid YAML", "see the example file") from None


def _refused(file: str, line: int | None, message: str, hint: str) -> ConfigError:
    return ConfigError([Problem(file, line, "", message, hint)])


def _syntax_hint(words: str) -> str:
    if "'\\t'" in words:
        return "indent with spaces, not tabs"
    if "mapping values are not allowed" in words:
        return "check the indentation, and put text that holds ': ' in quotes"
    return "check the indentation and the quotes of this line and the one before it"


def _read_text(path: Path, absent: str) -> str:
    file = str(path)
    try:
        # Looked at before it is opened: opening a pipe without a writer would wait for ever.
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise _refused(file, None, "is a directory", "name the YAML file in it")
        if not stat.S_ISREG(mode):
            raise _refused(file, None, "isn't a regular file", "name a YAML file")
        with path.open("rb") as source:
            raw = source.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise _refused(file, None, "doesn't exist", absent) from None
    except PermissionError:
        raise _refused(file, None, "can't be read", "allow this user to read it") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not a path"
        raise _refused(file, None, f"can't be read: {reason}", "check the path") from None
    if len(raw) > MAX_BYTES:
        raise _refused(file, None, f"is larger than {MAX_BYTES // 1024} KiB", "is it the right file?")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _refused(file, line, "isn't UTF-8 text", "save it as UTF-8") from None


@dataclass(slots=True)
class _Scalar:
    line: int
    value: Any
    text: str
    plain: bool


@dataclass(slots=True)
class _List:
    line: int
    items: list[_Node] = field(default_factory=list)


@dataclass(slots=True)
class _Map:
    line: int
    pairs: list[tuple[_Scalar, _Node]] = field(default_factory=list)
    key: _Scalar | None = None


_Node = _Scalar | _List | _Map


class _Builder:
    """Events to nodes, and nodes to data; a node that several aliases name is expanded for each."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._yaml = YAML(typ="safe", pure=True)
        self._root: _Node | None = None
        self._open: list[_List | _Map] = []
        self._anchors: dict[str, _Node] = {}
        self._written = self._expanded = 0
        self._places: dict[KeyPath, Place] = {}
        self._problems: list[Problem] = []

    def build(self, text: str) -> None:
        documents = 0
        for event in self._yaml.parse(text):
            line = event.start_mark.line + 1
            if isinstance(event, DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise _refused(self._file, line, "holds more than one document", "remove the `---` line")
            elif isinstance(event, (SequenceEndEvent, MappingEndEvent)):
                self._open.pop()
            elif isinstance(event, (ScalarEvent, CollectionStartEvent, AliasEvent)):
                self._add(event, line)

    def document(self) -> Document:
        data = None if self._root is None else self._expand(self._root, ())
        return Document(self._file, data, self._places, tuple(self._problems))

    def _add(self, event: Event, line: int) -> None:
        self._written += 1
        if self._written > MAX_NODES:
            raise self._too_large(line)
        node = self._node(event, line)
        parent = self._open[-1] if self._open else None
        if parent is None:
            self._root = node
        elif isinstance(parent, _List):
            parent.items.append(node)
        elif parent.key is None:
            if not isinstance(node, _Scalar):
                raise _refused(self._file, line, "a list or a mapping can't be a key", "write `key: value`")
            parent.key = node
        else:
            parent.pairs.append((parent.key, node))
            parent.key = None
        if isinstance(event, CollectionStartEvent):
            assert isinstance(node, (_List, _Map))  # noqa: S101 - told to the type checker only
            self._open.append(node)
            if len(self._open) > MAX_DEPTH:
                raise _refused(
                    self._file, line, f"nested deeper than {MAX_DEPTH} levels", "see the example file"
                )

    def _node(self, event: Any, line: int) -> _Node:
        if isinstance(event, AliasEvent):
            target = self._anchors.get(event.anchor)
            if target is None:
                raise _refused(
                    self._file, line, f"alias *{event.anchor} has no anchor", "mark one with & first"
                )
            if any(target is container for container in self._open):
                raise _refused(self._file, line, f"alias *{event.anchor} holds itself", "write the value out")
            return target
        node: _Node
        if isinstance(event, ScalarEvent):
            node = self._scalar(event, line)
        else:
            node = _Map(line) if isinstance(event, MappingStartEvent) else _List(line)
            if event.tag is not None and event.tag not in (_TAG + "map", _TAG + "seq", "!"):
                raise self._bad_tag(line)
        if event.anchor is not None:
            self._anchors[event.anchor] = node
        return node

    def _scalar(self, event: Any, line: int) -> _Scalar:
        tag = event.tag
        if tag is None or tag == "!":
            implicit = (False, True) if tag else event.implicit
            tag = str(self._yaml.resolver.resolve(ScalarNode, event.value, implicit))
        name = tag.removeprefix(_TAG)
        text = self._whole_characters(event.value, line)
        if name in ("int", "float") and len(text) > _LONGEST_NUMBER:
            raise _refused(self._file, line, f"not a valid {name}", "fewer digits")
        value: Any = text
        build = self._yaml.constructor
        node = ScalarNode(tag, text, event.start_mark, event.end_mark, style=event.style)
        try:
            match name:
                case "null":
                    value = None
                case "bool":
                    value = build.construct_yaml_bool(node)
                case "int":
                    value = build.construct_yaml_int(node)
                case "float":
                    value = build.construct_yaml_float(node)
                case "str" | "timestamp" | "merge" | "value":
                    pass  # a date is text here: nothing takes dates, and names may look like one
                case _:
                    raise self._bad_tag(line)
        except (ValueError, LookupError, OverflowError):
            raise _refused(self._file, line, f"not a valid {name}", "write it without a tag") from None
        return _Scalar(line, value, text, plain=event.style is None)

    def _whole_characters(self, text: str, line: int) -> str:
        """JSON writes large characters as two escapes, each half of one; halves alone mean nothing."""
        if not any("\ud800" <= letter <= "\udfff" for letter in text):
            return text
        try:
            return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
        except UnicodeDecodeError:
            hint = "write the character itself"
            raise _refused(self._file, line, "an escape that isn't a character", hint) from None

    def _expand(self, node: _Node, path: KeyPath) -> Any:
        self._expanded += 1
        if self._expanded > MAX_NODES or len(path) > MAX_DEPTH:
            raise self._too_large(node.line)
        if isinstance(node, _Scalar):
            return node.value
        if isinstance(node, _List):
            for index, item in enumerate(node.items):
                self._places[*path, index] = Place(self._file, item.line)
            return [self._expand(item, (*path, index)) for index, item in enumerate(node.items)]
        data: dict[str, Any] = {}
        for key, value in self._pairs(node, path):
            self._places[*path, key.text] = Place(self._file, key.line)
            data[key.text] = self._expand(value, (*path, key.text))
        return data

    def _pairs(self, node: _Map, path: KeyPath, depth: int = 0) -> list[tuple[_Scalar, _Node]]:
        """A mapping's own pairs, then what it merges: the first one to name a key has it."""
        own: dict[str, tuple[_Scalar, _Node]] = {}
        merged: list[_Map] = []
        for key, value in node.pairs:
            self._expanded += 1
            if self._expanded > MAX_NODES or depth > MAX_DEPTH:
                raise self._too_large(key.line)
            if key.text == "<<" and key.plain:
                sources = value.items if isinstance(value, _List) else [value]
                if not all(isinstance(source, _Map) for source in sources):
                    raise _refused(self._file, key.line, "<< merges mappings only", "write `<<: *anchor`")
                merged += [source for source in sources if isinstance(source, _Map)]
            elif key.text in own:
                here = written((*path, key.text))
                first = own[key.text][0].line
                hint = f"remove one; the first is on line {first}"
                self._problems.append(Problem(self._file, key.line, here, "the key is there twice", hint))
            else:
                own[key.text] = (key, value)
        for source in merged:
            for key, value in self._pairs(source, path, depth + 1):
                own.setdefault(key.text, (key, value))
        return list(own.values())

    def _too_large(self, line: int) -> ConfigError:
        return _refused(
            self._file, line, f"holds more than {MAX_NODES} values", "aliases count as often as they are used"
        )

    def _bad_tag(self, line: int) -> ConfigError:
        return _refused(self._file, line, "a YAML tag that isn't known", "write the value without a `!tag`")
