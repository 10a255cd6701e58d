"""Converters: the text behind a llama-server flag to a value of `CommonParams`.

What a converter accepts is what llama.cpp's own parser accepts, less what only happens to pass there
("12abc" as a number). It returns a plain value, or a `Late` one; it raises `BadValue` with what would
be right.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import cast

from llamesh.local.engine.late import BadValue, CpuMask, Grammar, Lora, Member, Overrides, Shares

Convert = Callable[[str], object]

INT32_MAX = 2**31 - 1


def text(raw: str) -> str:
    """Any text."""
    return raw


def integer(low: int = -INT32_MAX, high: int = INT32_MAX) -> Convert:
    """A whole number from `low` to `high`."""

    def convert(raw: str) -> int:
        try:
            number = int(raw)
        except ValueError:
            raise BadValue("a whole number") from None
        if not low <= number <= high:
            limit = f"{low} or more" if high == INT32_MAX else f"from {low} to {high}"
            raise BadValue(f"a whole number, {limit}")
        return number

    return convert


def number(low: float = -math.inf, *, above: float = -math.inf) -> Convert:
    """A finite number that is at least `low` and more than `above`."""

    def convert(raw: str) -> float:
        try:
            value = float(raw)
        except ValueError:
            raise BadValue("a number") from None
        if not math.isfinite(value) or value < low or value <= above:
            limit = (
                f", {low:g} or more"
                if low > -math.inf
                else f", more than {above:g}"
                if above > -math.inf
                else ""
            )
            raise BadValue(f"a finite number{limit}")
        return value

    return convert


def threads(raw: str) -> object:
    """A number of threads; 0 or less means one for each logical CPU."""
    count = cast(int, integer()(raw))
    return count if count > 0 else os.cpu_count() or 1


def reciprocal(raw: str) -> object:
    """One divided by a number."""
    return 1 / cast(float, number(above=0)(raw))


def sleep_seconds(raw: str) -> object:
    """Seconds, at least 1, or -1 for never."""
    if (seconds := integer(-1)(raw)) == 0:
        raise BadValue("seconds, 1 or more, or -1 for never")
    return seconds


def hosts(raw: str) -> object:
    """Addresses to listen on, commas between; a path that ends in .sock is a Unix socket."""
    return list(_parts(raw))


def reasoning_effort(raw: str) -> object:
    """A level that the chat template knows; `default` leaves it to the template."""
    return {"reasoning_effort": None if raw == "default" else json.dumps(raw)}


def stop_text(raw: str) -> object:
    """A text that ends a reply."""
    return (raw,)


def slots(raw: str) -> object:
    """A number of slots; -1 is llama-server's auto (4 slots that share one cache)."""
    if (count := integer(-1)(raw)) == 0:
        raise BadValue("a number of slots, or -1 for auto")
    return count


def seed(raw: str) -> object:
    """A random seed; -1 draws one, which llama.cpp writes as the largest unsigned number."""
    chosen = integer(-1, 2**32 - 1)(raw)
    return 2**32 - 1 if chosen == -1 else chosen


def layers(raw: str) -> object:
    """A number of layers for the GPU: `auto`, `all`, or a number."""
    return {"auto": -1, "all": -2}[raw] if raw in {"auto", "all"} else integer()(raw)


def one_of(choices: Mapping[str, object]) -> Convert:
    """One of the words of `choices`, for the value beside it."""

    def convert(raw: str) -> object:
        if raw not in choices:
            raise BadValue("one of " + ", ".join(choices))
        return choices[raw]

    return convert


def switch_words(on: object, off: object, auto: object = None) -> Mapping[str, object]:
    """llama.cpp's words for on, off and (where `auto` isn't None) auto."""
    words: dict[str, object] = dict.fromkeys(("on", "enabled", "true", "1"), on)
    words |= dict.fromkeys(("off", "disabled", "false", "0"), off)
    if auto is not None:
        words |= dict.fromkeys(("auto", "-1"), auto)
    return words


def member(enum: str, prefix: str, words: Iterable[str]) -> Convert:
    """One of `words`, for the member of `enum` of that name behind `prefix`."""
    return one_of({word: Member(enum, prefix + word.upper().replace("-", "_")) for word in words})


def comma_list(convert: Convert, *, separator: str = ",") -> Convert:
    """A tuple of what `convert` makes of each part. Blanks around parts and empty parts are dropped."""

    def split(raw: str) -> tuple[object, ...]:
        parts = tuple(convert(part.strip()) for part in re.split(f"[{separator}]", raw) if part.strip())
        if not parts:
            raise BadValue("a list with commas between")
        return parts

    return split


def names(raw: str) -> object:
    """A set of names with commas between."""
    return frozenset(part.strip() for part in raw.split(",") if part.strip())


def existing_file(raw: str) -> str:
    """The path of a file that can be read."""
    path = Path(raw)
    if not path.is_file():
        raise BadValue("a file" if path.exists() else "a file; there is none at this path")
    if not os.access(path, os.R_OK):
        raise BadValue("a file that may be read")
    return raw


def model_file(raw: str) -> str:
    """The path of a GGUF file, as far as its first four bytes tell."""
    existing_file(raw)
    with open(raw, "rb") as file:
        if file.read(4) != b"GGUF":
            raise BadValue("a GGUF file; this one isn't")
    return raw


def directory(raw: str) -> str:
    """The path of a directory, with the separator that llama.cpp wants at its end."""
    if not Path(raw).is_dir():
        raise BadValue("a directory; there is none at this path")
    return os.path.join(raw, "")


def contents(raw: str) -> str:
    """The text in the file at this path."""
    try:
        return Path(existing_file(raw)).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise BadValue("a text file in UTF-8") from None


def contents_of(convert: Convert) -> Convert:
    """What `convert` makes of the text in the file at this path."""
    return lambda raw: convert(contents(raw))


def key_lines(raw: str) -> object:
    """The API keys in a file, one a line; lines that start with # are comments."""
    return tuple(line for line in contents(raw).splitlines() if line and not line.startswith("#"))


def json_object(raw: str) -> Mapping[str, str]:
    """A JSON object, each value of it as JSON text again (llama.cpp's form for template arguments)."""
    try:
        document = json.loads(raw)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise BadValue('a JSON object, such as {"key": "value"}')
    return {key: json.dumps(value) for key, value in document.items()}


def grammar(raw: str) -> object:
    """A grammar in GBNF."""
    return Grammar(raw, schema=False)


def schema(raw: str) -> object:
    """A JSON schema."""
    try:
        json.loads(raw)
    except ValueError:
        raise BadValue("a JSON schema") from None
    return Grammar(raw, schema=True)


def lora(raw: str) -> object:
    """LoRA adapter files, commas between."""
    return tuple(Lora(existing_file(path), 1.0) for path in _parts(raw))


def lora_scaled(raw: str) -> object:
    """LoRA adapter files with their scales, `FILE:SCALE,...`."""
    adapters = []
    for part in _parts(raw):
        path, colon, scale = part.rpartition(":")
        if not colon:
            raise BadValue("FILE:SCALE, several with commas between")
        adapters.append(Lora(existing_file(path), cast(float, number()(scale))))
    return tuple(adapters)


def cpu_mask(raw: str) -> object:
    """CPUs as a hexadecimal number, CPU 0 in its lowest bit."""
    try:
        return CpuMask(int(raw.removeprefix("0x"), 16))
    except ValueError:
        raise BadValue("a hexadecimal number") from None


def cpu_range(raw: str) -> object:
    """CPUs as `LOW-HIGH`, both included; without LOW from the first."""
    match = re.fullmatch(r"(\d*)-(\d+)", raw)
    if match is None or int(match[2]) > 4095 or (low := int(match[1] or 0)) > (high := int(match[2])):
        raise BadValue("LOW-HIGH, such as 0-7")
    return CpuMask((1 << high + 1) - (1 << low))


def shares(*, unit: int = 1, broadcast: bool = False) -> Convert:
    """A number per device with commas (or slashes) between, each multiplied by `unit`."""

    def convert(raw: str) -> object:
        numbers = cast("tuple[float, ...]", comma_list(number(0), separator=",/")(raw))
        return Shares(tuple(value if unit == 1 else int(value) * unit for value in numbers), broadcast)

    return convert


def overrides(raw: str) -> object:
    """`PATTERN=TYPE`, several with commas between."""
    parts = _parts(raw)
    if not all("=" in part.strip("=") for part in parts):
        raise BadValue("PATTERN=TYPE, several with commas between")
    return Overrides(parts)


# The names of the feed-forward tensors in GGUF files: of all experts, and of dense layers.
EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"
DENSE = r"\.ffn_(up|down|gate)\."


def first_layers(pattern: str) -> Convert:
    """The tensors that `pattern` names in the first N layers, for the CPU."""

    def convert(raw: str) -> object:
        layer_count = cast(int, integer(0, 4096)(raw))
        return Overrides(tuple(rf"blk\.{layer}{pattern}=CPU" for layer in range(layer_count)))

    return convert


# By the letter that --sampler-seq uses for each.
SAMPLERS = {
    "e": "penalties",
    "d": "dry",
    "s": "top_n_sigma",
    "k": "top_k",
    "y": "typ_p",
    "p": "top_p",
    "m": "min_p",
    "x": "xtc",
    "t": "temperature",
    "i": "infill",
    "a": "adaptive_p",
}


def samplers(raw: str) -> object:
    """Samplers by name in their order, semicolons between; `top-k` and `topk` are `top_k`."""
    spellings = {"nucleus": "top_p", "temp": "temperature", "typ": "typ_p"}
    for name in SAMPLERS.values():
        spellings |= {name: name, name.replace("_", "-"): name, name.replace("_", ""): name}
    chosen = [part.strip() for part in raw.split(";") if part.strip()]
    if not chosen or not all(name in spellings for name in chosen):
        raise BadValue("names with semicolons between, of " + ";".join(SAMPLERS.values()))
    return ";".join(spellings[name] for name in chosen)


def sampler_letters(raw: str) -> object:
    """Samplers by letter in their order."""
    if not raw or not all(letter in SAMPLERS for letter in raw):
        raise BadValue("letters of " + ", ".join(f"{letter} ({name})" for letter, name in SAMPLERS.items()))
    return ";".join(SAMPLERS[letter] for letter in raw)


_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "'": "'", '"': '"', "\\": "\\"}


def unescaped(raw: str) -> str:
    r"""The text with llama.cpp's escapes (\n, \r, \t, \', \", \\, \xHH) replaced; others stay as they are."""

    def replace(match: re.Match[str]) -> str:
        code = match[1]
        return chr(int(code[1:], 16)) if code.startswith("x") else _ESCAPES[code]

    return re.sub(r"""\\(x[0-9A-Fa-f]{2}|[nrt'"\\])""", replace, raw)


def _parts(raw: str) -> tuple[str, ...]:
    return cast("tuple[str, ...]", comma_list(text)(raw))
