"""Reads a llama-server command line for the embedded engine.

`read` checks every flag and value against the table of `table` without importing the engine,
so that a mistake is told in milliseconds; `Request.apply` writes the result into a `CommonParams`.
Nothing is ignored silently: a flag is set or refused, by name. What llama-server does after its own
parsing is done here too: slots are automatic unless given, the port is 8080, escapes in stop texts
are replaced, reasoning is preserved in the history unless told otherwise.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llamesh.local.engine.flag import TEMPLATE, Flag
from llamesh.local.engine.late import BadValue, Late
from llamesh.local.engine.refused import REFUSED
from llamesh.local.engine.table import FLAGS, GATHERED
from llamesh.local.engine.values import model_file, unescaped

BY_NAME: dict[str, Flag] = {name: flag for flag in FLAGS for name in flag.names}

# llama.cpp's parser calls for these and ends.
ACTIONS = {
    "-h": "help",
    "--help": "help",
    "--usage": "help",
    "--version": "version",
    "--list-devices": "devices",
}


class FlagError(Exception):
    """The command line can't be used. The text names the flag and says what would be right."""


@dataclass
class Request:
    """What a command line asks for.

    `values` maps fields of `CommonParams` to plain or late values; `origin` says which flag set one.
    `action` is `serve`, or what to print instead: `help`, `version`, `devices`.
    """

    action: str = "serve"
    values: dict[str, object] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def model(self) -> str:
        """The path of the model file."""
        return str(self.values["model.path"])

    def put(self, path: str, value: object, flag: str) -> None:
        """Set the field at `path`, or add to it where several flags gather."""
        if path in GATHERED and path in self.values:
            value = _gather(self.values[path], value)
        self.values[path] = value
        self.origin[path] = flag

    def apply(self, params: Any, binding: Any) -> None:
        """Write the values into `params`, a `CommonParams` of `binding` (the module xllamacpp).

        Raises `FlagError` where this version of the binding refuses a value or lacks the field.
        """
        for path, value in self.values.items():
            owner, name = params, path
            try:
                while "." in name:
                    outer, name = name.split(".", 1)
                    owner = getattr(owner, outer)
                setattr(owner, name, _resolved(value, binding, getattr(owner, name)))
            except BadValue as error:
                raise FlagError(f"bad value for {self.origin[path]}: expected {error}") from None
            except AttributeError:
                raise FlagError(
                    f"this version of the embedded engine (xllamacpp {binding.__version__}) has no setting "
                    f"for {self.origin[path]}"
                ) from None
            except (AssertionError, OverflowError, RuntimeError, TypeError, ValueError) as error:
                raise FlagError(
                    f"bad value for {self.origin[path]}: {error or 'the engine refuses it'}"
                ) from None


def read(argv: Sequence[str], environ: Mapping[str, str]) -> Request:
    """The request that the arguments (without the program's name) and the environment make.

    Of the environment only `LLAMA_API_KEY` is read, which keeps a key out of the process list; the
    `LLAMA_ARG_...` variables of llama-server are named in `warnings`. Raises `FlagError`.
    """
    request = Request()
    if key := environ.get("LLAMA_API_KEY"):
        request.put("api_keys", tuple(part for part in key.split(",") if part), "LLAMA_API_KEY")
    request.warnings += [
        f"{name} is set, but the embedded engine takes flags only"
        for name in sorted(environ)
        if name.startswith("LLAMA_ARG_")
    ]
    arguments = iter(argv)
    for spelling in arguments:
        # llama.cpp reads --ctx_size as --ctx-size.
        name = spelling.replace("_", "-") if spelling.startswith("--") else spelling
        if name in ACTIONS:
            return Request(ACTIONS[name])
        if name in ("-dt", "--defrag-thold"):
            next(arguments, None)
            request.warnings.append(f"{name} has no effect any more, in llama-server either")
            continue
        _take(request, name, arguments)
    _finish(request)
    return request


def _take(request: Request, name: str, arguments: Iterator[str]) -> None:
    flag = BY_NAME.get(name)
    if flag is None:
        raise FlagError(_unknown(name))
    value: Any = flag.constant
    if flag.convert is not None:
        raw = next(arguments, None)
        if raw is None:
            raise FlagError(f"{name} needs a value: {name} {flag.placeholder}")
        try:
            value = flag.convert(raw)
        except BadValue as error:
            # A key is the one value that must not be repeated.
            shown = "" if "api-key" in name else f" {raw!r}"
            raise FlagError(f"bad value{shown} for {name}: expected {error}") from None
    for path in flag.paths:
        request.put(path, value, name)
    if flag.then is not None:
        for path, following in flag.then(value).items():
            request.put(path, following, name)


def _finish(request: Request) -> None:
    values = request.values
    if not values.get("model.path"):
        raise FlagError("no model: name its file with -m FILE")
    path = Path(request.model)
    if not path.exists():
        raise FlagError(f"no such model file: {path}")
    try:
        model_file(request.model)
    except BadValue as error:
        raise FlagError(f"can't use the model {path}: expected {error}") from None
    values.setdefault("n_parallel", -1)
    values.setdefault("port", 8080)
    template: dict[str, str | None] = {"preserve_reasoning": "true"} | dict(values.get(TEMPLATE, {}))  # type: ignore[call-overload]
    values[TEMPLATE] = {name: value for name, value in template.items() if value is not None}
    if (last := values.get("sampling.penalty_last_n")) is not None:
        # The sampler remembers as many tokens as the penalties look back over; 64 is its default.
        values["sampling.n_prev"] = max(64, last)  # type: ignore[call-overload]
    if values.get("escape", True) and (stops := values.get("antiprompt")):
        values["antiprompt"] = tuple(unescaped(stop) for stop in stops)  # type: ignore[attr-defined]
    for path_ in values:
        request.origin.setdefault(path_, "a default")


def _gather(old: Any, new: Any) -> object:
    return old + new if isinstance(old, tuple) else old | new


def _resolved(value: object, binding: Any, current: Any) -> object:
    if isinstance(value, Late):
        return value.resolve(binding, current)
    if isinstance(value, tuple):
        return [*current, *(_resolved(entry, binding, None) for entry in value)]
    if isinstance(value, frozenset):
        return set(value)
    return value


def _unknown(name: str) -> str:
    if name in REFUSED:
        return f"can't take {name}: {REFUSED[name]}"
    said = f"unknown flag {name}: the embedded engine doesn't take it"
    plain, equals, value = name.partition("=")
    if equals and plain in BY_NAME:
        return f"{said}; write `{plain} {value}`"
    if not name.startswith("-"):
        return f"unexpected argument {name!r}: the flag before it takes no value"
    known = difflib.get_close_matches(name, [*BY_NAME, *REFUSED], n=1, cutoff=0.75)
    return f"{said}; did you mean {known[0]}?" if known else f"{said}; --help lists those that it takes"


def help_text() -> str:
    """The flags, one row of the table a line."""
    lines = ["usage: python -m llamesh.local.engine -m FILE [flags of llama-server]", ""]
    lines += [f"  {', '.join(flag.names)} {flag.placeholder}".rstrip() for flag in FLAGS]
    return "\n".join([*lines, "  --version", "  --list-devices", "  -h, --help, --usage"])
