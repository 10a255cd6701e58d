"""What a profile would be started with, found out on this machine. Nothing is started or fetched.

The parts that a node has do the work: they find the engine (asked for its version and flags only), the
weights on this disk, and the size of an instance from the header of its file, what was measured before,
or what the cookbook says.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import trio

from llamesh.config.cookbook import FromArguments, HubFile, ModelPath, Profile, UrlFile
from llamesh.config.settings import Settings
from llamesh.core.capacity import Need
from llamesh.core.memory_arguments import read_memory_arguments
from llamesh.core.model_files import later_part, part_names
from llamesh.local.gguf import BadGguf, read_header
from llamesh.local.launch import Engine, build_launch, redacted
from llamesh.local.memory import Memory
from llamesh.local.sizing import Size, model_file
from llamesh.local.weights.cache import Cache
from llamesh.local.weights.wanted import wanted_of, with_weights
from llamesh.telemetry.learned import LearnedValues

#: Stands for the embedded engine's command line.
EMBEDDED = "llama-server (embedded)"

# A file on a mount that hangs is given up after this.
_FILE_SECONDS = 5.0

#: `here`; `missing`, `unreadable` or `damaged`: it can't be loaded; `download`: it is fetched at its first
#: start; `engine`: llama-server fetches it itself.
State = Literal["here", "missing", "unreadable", "damaged", "download", "engine"]


@dataclass(frozen=True, slots=True)
class Weights:
    """Where a profile's weights are. `name` for people, `path` of the first file on this disk, `size` in
    bytes of all its files, `problem` in words; `trained`: the context in tokens that the model is made for.
    """

    state: State
    name: str
    path: str | None = None
    size: int | None = None
    problem: str = ""
    trained: int | None = None


@dataclass(frozen=True, slots=True)
class Context:
    """Tokens. `asked`: what the profile says, 0 for the whole, None for nothing; `used`: what it would get,
    None while that isn't known; `trained`: the model's whole one."""

    asked: int | None
    used: int | None
    trained: int | None

    @property
    def reduced(self) -> bool:
        """Whether it is less than the model has because no more fits."""
        return (
            not self.asked and self.used is not None and self.trained is not None and self.used < self.trained
        )


async def find_weights(
    profile: Profile,
    cache: Cache,
    seconds: float = _FILE_SECONDS,
    limiter: trio.CapacityLimiter | None = None,
) -> tuple[Profile, Weights]:
    """The profile with its weights where they are here, and what is known of them; for `seconds` at most, in
    a thread of `limiter`.
    """
    with trio.move_on_after(seconds):
        return await trio.to_thread.run_sync(
            _find_weights, profile, cache, abandon_on_cancel=True, limiter=limiter
        )
    name = _source_name(profile)
    return profile, Weights("unreadable", name, problem=f"{name} doesn't answer: is its disk away?")


def _find_weights(profile: Profile, cache: Cache) -> tuple[Profile, Weights]:
    wanted = wanted_of(profile)
    if wanted is not None:
        record = cache.look(wanted)
        if record is None:
            return profile, Weights("download", wanted.name)
        located = with_weights(profile, record.found)
        size = sum(file.size for file in record.files)
        return located, _read(record.found.model, wanted.name, size)
    path = model_file(profile)
    if path is None:
        return profile, Weights("engine", _source_name(profile))
    return profile, _of_path(path)


def _of_path(path: str) -> Weights:
    first = Path(path)
    if later_part(first.name):
        return Weights("damaged", path, problem=f"isn't the first part: name {part_names(first.name)[0]}")
    size = 0
    for name in part_names(first.name):
        part = first.with_name(name)
        try:
            size += part.stat().st_size
        except FileNotFoundError:
            return Weights("missing", path, problem=f"there is no file {part}")
        except OSError as error:
            return Weights("unreadable", path, problem=f"{part} can't be looked at: {error.strerror}")
        if not part.is_file():
            return Weights("missing", path, problem=f"{part} isn't a file")
        if not os.access(part, os.R_OK):
            return Weights("unreadable", path, path, size, problem=f"{part} can't be read by this user")
    return _read(path, path, size)


def _read(path: str, name: str, size: int) -> Weights:
    try:
        trained = read_header(path).context_length or None
    except BadGguf as error:
        return Weights("damaged", name, path, size, problem=error.message)
    return Weights("here", name, path, size, trained=trained)


def _source_name(profile: Profile) -> str:
    match profile.source:
        case ModelPath(path):
            return path
        case FromArguments(flag, value):
            return " ".join(masked([flag, value])).strip()
        case _:
            wanted = wanted_of(profile)
            return wanted.name if wanted is not None else profile.public_name


async def size_of(located: Profile, weights: Weights, memory: Memory) -> Size | None:
    """What an instance would need; None where nothing says anything about it. Bounded."""
    if weights.state == "here":
        await memory.look(located)
        size = memory.size(located)
        if size is not None and size.source != "unknown":
            return size
    return _told(located)


def _told(profile: Profile) -> Size | None:
    """What the cookbook itself says, for a model that can't be looked at."""
    vram, ram = profile.estimated_vram_mb, profile.estimated_sysmem_mb
    if vram is None and ram is None:
        return None
    return Size(Need(vram or 0, ram or 0), source="cookbook")


def context_of(located: Profile, weights: Weights, size: Size | None) -> Context:
    """The context that an instance would have."""
    asked = read_memory_arguments(located.arguments, {}).context
    used = asked or None
    if not asked:
        used = (size.context if size is not None else None) or weights.trained
    return Context(asked, used, weights.trained)


def command_line(
    located: Profile, weights: Weights, engine: Engine, context: int | None, ports: Iterable[int]
) -> tuple[str, ...]:
    """The words that the child would be started with, secrets masked. The port is the first that may be
    given to it, PORT where the system picks. Raises BadArguments.
    """
    if weights.state == "download" and isinstance(located.source, HubFile | UrlFile):
        # The folder has a name that only the hub knows.
        located = replace(located, source=ModelPath(f"DOWNLOADED/{weights.name}"))
    port = next(iter(ports), 0)
    launch = build_launch(located, engine, host="127.0.0.1", port=port, context=context)
    words = [*engine.command, *launch.arguments]
    if not launch.port:
        at = len(words) - 1 - words[::-1].index("--port")
        words[at + 1] = "PORT"
    key = ("LLAMA_API_KEY=***",) if located.api_key else ()
    return (*key, *masked(words))


def masked(words: Iterable[str]) -> list[str]:
    """Words as they may be shown: without keys and tokens, also those within addresses."""
    return [_without_secrets(word) for word in redacted(list(words))]


def _without_secrets(word: str) -> str:
    if "://" not in word:
        return word
    try:
        parts = urlsplit(word)
        host = parts.netloc.rpartition("@")
    except ValueError:
        return "***"
    netloc = f"***@{host[2]}" if host[1] else parts.netloc
    return parts._replace(netloc=netloc, query="***" if parts.query else "").geturl()


def in_shell(words: Iterable[str]) -> str:
    """The words as one would type them; what is masked stays readable."""
    return " ".join(word if "***" in word and " " not in word else shlex.quote(word) for word in words)


def for_people(words: Sequence[str], engine: Engine) -> str:
    """A command line to read. The embedded engine is only named: its own words say nothing to anybody."""
    lead = masked(engine.command)
    start = 1 if words[0].startswith("LLAMA_API_KEY=") else 0
    if engine.origin != "embedded" or list(words[start : start + len(lead)]) != lead:
        return in_shell(words)
    rest = in_shell(words[start + len(lead) :])
    return f"{in_shell(words[:start])} {EMBEDDED} {rest}".strip()


def learned_values(settings: Settings) -> LearnedValues:
    """What a node here has measured, read from a copy: the file belongs to the node that may be running."""
    with tempfile.TemporaryDirectory(prefix="llamesh-check-") as folder:
        copy = Path(folder) / "metrics.json"
        # Nothing was measured yet, or it can't be read: estimates have to do.
        with contextlib.suppress(OSError):
            shutil.copyfile(settings.metrics_path, copy)
        learned = LearnedValues(copy)
        learned.load()
        return learned
