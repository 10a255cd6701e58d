"""Which key speaks for which node id: the known_peers file, and whether a claim is believed.

The file is for people, too. A line is `ID KEY [DATE] [anything]`, blanks in between; `#` begins a
comment. Lines that mean nothing here are kept as they are. Several nodes may share the file: what is
noted here is put into what is on disk at that moment, under a lock.

Rules, in this order:
1. This node's own id is ours alone.
2. `cluster.noise.allowed_keys`, if there are any, are the only keys that may come in.
3. A pinned id belongs to the pinned key. A node that proves to hold the pinned key moves its pin.
4. A new id is believed if its key is an allowed one, or if trust on first use is on. It is pinned
   when the connection stands (`note`). One key may own several ids.
"""

from __future__ import annotations

import hmac
import os
import re
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llamesh.config.settings import Settings
from llamesh.mesh.identity import Identity
from llamesh.mesh.key_files import IdentityError, locked, make_directory, read_private, replace_private
from llamesh.mesh.key_store import KeyStore
from llamesh.mesh.trust import (
    KEY_BYTES,
    Claim,
    ItsMe,
    NotTrusted,
    is_node_id,
    key_bytes,
    key_text,
)

# Who holds the token can make up ids as fast as it can compute; the file mustn't grow with them.
MOST_PINS = 4096
_LARGEST_BYTES = 1 << 20

_HEADER = "# Nodes that this one knows: ID KEY FIRST-SEEN. Remove a line to have the node trusted anew.\n"


@dataclass(slots=True)
class _File:
    """What stands on disk: its lines, and the line of each id. `warnings` are for the log."""

    lines: list[str] = field(default_factory=list)
    pins: dict[str, bytes] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Change:
    """A pin that isn't on disk yet. `before`: the key that it replaces; None adds one."""

    key: bytes
    before: bytes | None


class KnownPeers:
    """The pins of one node. `check` and `note` don't block; `refresh` and `save` do: call them in a thread,
    `refresh` every few seconds.

    `warnings` are lines of the file that weren't understood, as text for people.
    """

    def __init__(self, path: Path, allowed_keys: Iterable[str], tofu: bool) -> None:
        """Read the file, if there is one. Raises IdentityError when others could change it."""
        self.path = path
        self.warnings: tuple[str, ...] = ()
        self._allowed = tuple(key_bytes(text) for text in allowed_keys)
        self._tofu = tofu
        # `save` and `refresh` run in threads. The first lock guards the values, for a moment; the
        # second one keeps two of them from going to the disk at the same time.
        self._guard = threading.Lock()
        self._disk = threading.Lock()
        self._pins: dict[str, bytes] = {}
        self._numbers: dict[str, int] = {}
        self._changes: dict[str, _Change] = {}
        self._signature: tuple[int, ...] | None = None
        self.refresh()

    def pins(self) -> Mapping[str, bytes]:
        """The key of each known id, those that aren't saved yet included."""
        with self._guard:
            return dict(self._pins)

    def check(self, claim: Claim, me: Identity) -> None:
        """Believe the claim, or raise NotTrusted (ItsMe: this node talks to itself)."""
        if not is_node_id(claim.node_id) or len(claim.key) != KEY_BYTES:
            raise NotTrusted(f"the node at {claim.address} names itself by what can't be a node id")
        self._check_own(claim, me)
        allowed = sum(_same(claim.key, key) for key in self._allowed) > 0
        if self._allowed and not allowed:
            raise NotTrusted(
                f"{_who(claim)} isn't one of cluster.noise.allowed_keys of {me.node_id}; "
                f"add {key_text(claim.key)} there if it is yours"
            )
        with self._guard:
            pinned, count = self._pins.get(claim.node_id), len(self._pins)
        if pinned is None:
            self._check_new(claim, me, allowed, count)
        elif not _same(pinned, claim.key) and not _proves(claim, pinned):
            raise self._stolen(claim, me.node_id)

    def note(self, claim: Claim) -> bool:
        """Pin what `check` believed; whether there is something to `save`.

        Call it when the connection stands. Raises NotTrusted when another key was quicker meanwhile.
        """
        with self._guard:
            pinned = self._pins.get(claim.node_id)
            if pinned is not None and _same(pinned, claim.key):
                return bool(self._changes)
            if pinned is not None and not _proves(claim, pinned):
                raise self._stolen(claim, "this one")
            if pinned is None and len(self._pins) >= MOST_PINS:
                raise self._full(claim, "this one")
            waiting = self._changes.get(claim.node_id)
            before = pinned if waiting is None else waiting.before
            self._pins[claim.node_id] = claim.key
            self._changes[claim.node_id] = _Change(claim.key, before)
            return True

    def trust(self, node_id: str, key: bytes, *, replace: bool = False) -> bool:
        """Pin what a person vouches for; whether there is something to `save`.

        Another key of that id is replaced only if `replace` says so, else NotTrusted.
        """
        with self._guard:
            pinned, number = self._pins.get(node_id), self._numbers.get(node_id)
        if pinned is not None and not replace and not _same(pinned, key):
            where = self.path if number is None else f"{self.path}:{number}"
            raise NotTrusted(f"{node_id} is known here by another key than {key_text(key)}, see {where}")
        return self.note(Claim(node_id, key, pinned, "here"))

    def refresh(self) -> bool:
        """Read the file again if it changed: people may edit it. Whether it did. Raises IdentityError."""
        with self._disk:
            signature = self._look()
            if signature == self._signature:
                return False
            self._take(self._read(), signature)
            return True

    def save(self) -> tuple[Claim, ...]:
        """Write what was noted. Raises IdentityError; what wasn't written stays noted.

        Returned are claims that `note` took and that the file now contradicts, because another node
        that shares it was quicker: they aren't believed any more, and their connections should end.
        """
        with self._disk:
            with self._guard:
                changes = dict(self._changes)
            if not changes:
                return ()
            if not os.path.lexists(self.path.parent):
                make_directory(self.path.parent)
            with locked(self.path):
                found = self._read()
                lost = tuple(
                    Claim(node_id, change.key, None, "")
                    for node_id, change in changes.items()
                    if not _apply(found, node_id, change)
                )
                if len(lost) < len(changes):
                    replace_private(self.path, "".join(found.lines).encode("utf-8"))
                signature = self._look()
            with self._guard:
                for node_id, change in changes.items():
                    # Unless it was noted anew while we wrote.
                    if self._changes.get(node_id) == change:
                        del self._changes[node_id]
            self._take(found, signature)
            return lost

    def _check_own(self, claim: Claim, me: Identity) -> None:
        if claim.node_id != me.node_id:
            return
        if _same(claim.key, me.public):
            raise ItsMe(f"the node at {claim.address} is {me.node_id} itself")
        raise NotTrusted(
            f"another node, at {claim.address} with key {key_text(claim.key)}, calls itself {me.node_id}, "
            "too; give each node its own node_id"
        )

    def _check_new(self, claim: Claim, me: Identity, allowed: bool, count: int) -> None:
        line = f"{claim.node_id} {key_text(claim.key)}"
        if not allowed and not self._tofu:
            raise NotTrusted(
                f"{_who(claim)} isn't known to {me.node_id}, which takes no strangers "
                f"(cluster.noise.tofu is false); to let it in, add this line to its {self.path}: {line}"
            )
        if count >= MOST_PINS:
            raise self._full(claim, me.node_id)

    def _stolen(self, claim: Claim, me: str) -> NotTrusted:
        number = self._numbers.get(claim.node_id)
        line = "the line" if number is None else f"line {number}"
        return NotTrusted(
            f"{_who(claim)} has another key than {me} knows for that id: {key_text(claim.key)}. "
            "Somebody else may have taken the name. If you changed its key yourself, "
            f"remove {line} of {claim.node_id} from {self.path} of {me}"
        )

    def _full(self, claim: Claim, me: str) -> NotTrusted:
        return NotTrusted(
            f"{_who(claim)} isn't known to {me}, and {self.path} there already holds {MOST_PINS} nodes; "
            "remove the lines of those that are gone"
        )

    def _look(self) -> tuple[int, ...] | None:
        """What changes when the file does; None where there is none."""
        try:
            status = self.path.stat()
        except OSError:
            return None  # if it is there, reading it tells what is wrong
        return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_mode)

    def _read(self) -> _File:
        content = read_private(self.path, _LARGEST_BYTES)
        if content is None:
            return _File()
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise IdentityError(self.path, "isn't UTF-8 text", "restore it, or remove it") from None
        return _parse(text, str(self.path))

    def _take(self, found: _File, signature: tuple[int, ...] | None) -> None:
        with self._guard:
            pins = dict(found.pins)
            for node_id, change in self._changes.items():
                if pins.get(node_id) in (None, change.before):
                    pins[node_id] = change.key
            self._pins, self._numbers = pins, found.numbers
            self._signature = signature
            self.warnings = tuple(found.warnings)


def known_peers(settings: Settings) -> KnownPeers:
    """The known peers of a configuration. Raises IdentityError. Blocks."""
    noise = settings.cluster.noise
    path = KeyStore(settings, {}).known_peers_path
    return KnownPeers(path, noise.allowed_keys, noise.tofu)


def _parse(text: str, file: str) -> _File:
    found = _File()
    # Not splitlines: what it takes for the end of a line besides \n stays inside the line here.
    for number, line in enumerate(re.findall(r"[^\n]*\n|[^\n]+", text), start=1):
        found.lines.append(line)
        words = line.partition("#")[0].split()
        if not words:
            continue
        where = f"{file}:{number}"
        if len(words) < 2 or not is_node_id(words[0]):
            found.warnings.append(f"{where}: not understood, and left alone; a line is ID KEY")
            continue
        try:
            key = key_bytes(words[1])
        except ValueError as error:
            found.warnings.append(
                f"{where}: the key of {words[0]} isn't one: {error}; the line is left alone"
            )
            continue
        if found.pins.setdefault(words[0], key) == key:
            found.numbers.setdefault(words[0], number)
        else:
            first = found.numbers[words[0]]
            found.warnings.append(f"{where}: another key for {words[0]}; line {first} counts, remove one")
    return found


def _apply(found: _File, node_id: str, change: _Change) -> bool:
    """Put a change into the lines; False when they contradict it."""
    present = found.pins.get(node_id)
    if present == change.key:
        return True
    new = key_text(change.key)
    if present is None:
        if not found.lines:
            found.lines.append(_HEADER)
        elif not found.lines[-1].endswith("\n"):
            found.lines[-1] += "\n"
        found.lines.append(f"{node_id} {new} {time.strftime('%Y-%m-%d', time.gmtime())}\n")
        found.numbers[node_id] = len(found.lines)
    elif present == change.before:
        index = found.numbers[node_id] - 1
        found.lines[index] = found.lines[index].replace(key_text(present), new, 1)
    else:
        return False
    found.pins[node_id] = change.key
    return True


def _proves(claim: Claim, pinned: bytes) -> bool:
    return claim.previous_key is not None and _same(claim.previous_key, pinned)


def _same(one: bytes, other: bytes) -> bool:
    return hmac.compare_digest(one, other)


def _who(claim: Claim) -> str:
    return f"{claim.node_id} at {claim.address}"
