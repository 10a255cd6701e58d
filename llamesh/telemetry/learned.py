"""What was learned about profiles by running them, kept across restarts in `metrics_path`.

The file is JSON, `{"version": 1, "profiles": {"model:profile": {...}}, "peaks": {...}, "keys": {...}}`;
members that this version doesn't know are kept as they are, so that going back and forth between versions
loses nothing. A file that can't be read is set aside with a warning: learning starts anew, the node starts.
"""

from __future__ import annotations

import contextlib
import glob
import os
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeAlias

import msgspec
import psutil

from llamesh.telemetry.logs import get_logger

log = get_logger("learned")


# Whoever edits the file by hand may be mistaken; admission must not add up negative sizes.
_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]
_Amount: TypeAlias = Annotated[float, msgspec.Meta(ge=0)]

# Far above what 500 argument lists and a thousand profiles take.
_MAX_BYTES = 16 << 20


class Said(Protocol):
    """What an instance said of itself, in tokens; 0 where it said nothing."""

    n_ctx: int
    n_ctx_slot: int
    n_ctx_train: int


class Learned(msgspec.Struct, omit_defaults=True):
    """One profile's values; 0 where nothing is known.

    n_ctx: context of the whole instance, in tokens; context_length: what one request may use;
    n_ctx_train: what the model was trained for; n_slots: requests at once; load_seconds: process
    start to ready; tokens_per_second: decode speed of one answer. engine: which one said so.
    """

    n_ctx: _Count = 0
    context_length: _Count = 0
    n_ctx_train: _Count = 0
    n_slots: _Count = 0
    load_seconds: _Amount = 0.0
    tokens_per_second: _Amount = 0.0
    speeds: dict[str, _Amount] = {}  # of requests and their parts, see core.speeds
    engine: str = ""

    def note_start(self, engine: str, said: Said, n_slots: int, load_seconds: float) -> None:
        """Take in what an instance said of itself by the time it was ready.

        Where it was silent an earlier answer stands, unless another engine gave it.
        """
        if self.engine != engine:
            self.n_ctx = self.context_length = self.n_ctx_train = 0
            self.engine = engine
        self.n_slots = n_slots
        self.n_ctx = said.n_ctx or self.n_ctx
        self.context_length = said.n_ctx_slot or self.context_length
        self.n_ctx_train = said.n_ctx_train or self.n_ctx_train
        self.load_seconds = round(load_seconds, 3)

    def slots_on(self, engine: str) -> int:
        """`n_slots` as far as it holds for an engine; 0 where it doesn't."""
        return self.n_slots if self.engine in ("", engine) else 0


class Peak(msgspec.Struct):
    """The most that an instance with certain arguments was seen to hold, in MiB."""

    vram_mb: _Count = 0
    sysmem_mb: _Count = 0


# More argument lists than anyone tries out; the one that was measured least recently goes first.
_MOST_PEAKS = 500


class LearnedValues:
    """The values of all profiles, in memory and in the file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._others: dict[str, Any] = {}
        self._unknown: dict[str, dict[str, Any]] = {}
        self._saved = b""
        self.profiles: dict[str, Learned] = {}
        self.keys: object = {}  # what keys have used, see web.meters
        self.peaks: dict[str, Peak] = {}  # by engine and exact argument list, see local.sizing

    def note_peak(self, key: str, vram_mb: int, sysmem_mb: int) -> None:
        """Take in what an instance with the arguments of `key` holds now; only the most counts."""
        known = self.peaks.pop(key, None) or Peak()
        self.peaks[key] = Peak(max(known.vram_mb, vram_mb), max(known.sysmem_mb, sysmem_mb))
        while len(self.peaks) > _MOST_PEAKS:
            del self.peaks[next(iter(self.peaks))]

    def of(self, key: str) -> Learned:
        """The values of "model:profile", made empty when there are none."""
        found = self.profiles.get(key)
        if found is None:
            found = self.profiles[key] = Learned()
        return found

    def load(self) -> None:
        """Read the file, if there is one. Never raises for what is in it."""
        self._remove_parts()
        try:
            with self._path.open("rb") as file:
                data = file.read(_MAX_BYTES + 1)
        except FileNotFoundError:
            return
        except OSError as error:
            # Perhaps only a matter of permissions, or not our file at all: leave it where it is.
            log.warning("learned values can't be read; learning starts anew", error=str(error))
            return
        try:
            if len(data) > _MAX_BYTES:
                raise msgspec.ValidationError(f"larger than {_MAX_BYTES >> 20} MiB")
            document = msgspec.json.decode(data, type=dict[str, Any])
            profiles = document.pop("profiles", {})
            if not isinstance(profiles, dict):
                raise msgspec.ValidationError("profiles is not an object")
            for key, values in profiles.items():
                self.profiles[key] = msgspec.convert(values, Learned)
                self._unknown[key] = {k: v for k, v in values.items() if k not in Learned.__struct_fields__}
            self.peaks = msgspec.convert(document.pop("peaks", {}), dict[str, Peak])
            self.keys = document.pop("keys", {})
            self._others = document
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            self.profiles.clear()
            self._unknown.clear()
            self.peaks.clear()
            aside = self._path.with_name(self._path.name + ".broken")
            try:
                os.replace(self._path, aside)
                moved = f"it was moved to {aside}"
            except OSError as failure:
                moved = f"and it can't be moved aside ({failure})"
            log.warning("learned values can't be read; learning starts anew", error=str(error), file=moved)

    def save(self) -> None:
        """Write the file when something changed, atomically. An unwritable one is a warning."""
        self.write(self.encode())

    def encode(self) -> bytes:
        """What the file should hold now; in the thread that changes the values."""
        profiles = {
            key: {**self._unknown.get(key, {}), **msgspec.to_builtins(values)}
            for key, values in sorted(self.profiles.items())
        }
        document = {**self._others, "version": 1, "profiles": profiles, "peaks": self.peaks}
        if self.keys:
            document["keys"] = self.keys
        return msgspec.json.format(msgspec.json.encode(document), indent=1)

    def write(self, data: bytes) -> None:
        """Make that the file's content, in any thread, but one at a time. Blocking, for the disk's sake."""
        if data == self._saved:
            return
        part = self._path.with_name(f"{self._path.name}.{os.getpid()}.part")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self._path)
            self._saved = data
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink()
            log.warning("learned values can't be saved", file=str(self._path), error=str(error))

    def _remove_parts(self) -> None:
        """What a node that was killed while writing has left; those of living ones stay."""
        with contextlib.suppress(OSError):
            for part in self._path.parent.glob(f"{glob.escape(self._path.name)}.*.part"):
                owner = part.name.removeprefix(f"{self._path.name}.").removesuffix(".part")
                if owner.isdecimal() and (int(owner) == os.getpid() or not psutil.pid_exists(int(owner))):
                    part.unlink()
