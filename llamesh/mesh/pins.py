"""The known peers while the mesh runs: believed, noted, written down, read again when people edit them."""

from __future__ import annotations

from collections.abc import Callable

import trio

from llamesh.mesh.identity import Identity
from llamesh.mesh.key_files import IdentityError
from llamesh.mesh.known_peers import KnownPeers
from llamesh.mesh.mentions import Mentions
from llamesh.mesh.trust import Claim
from llamesh.telemetry.logs import get_logger

log = get_logger("mesh")

# Lines that somebody edits by hand count after this long.
REREAD_SECONDS = 5.0


class Pins:
    """`KnownPeers` for the mesh, whose file is touched in threads only. `contradicted` gets claims that were
    believed and noted here, while another node that shares the file was quicker to note something else."""

    def __init__(self, known: KnownPeers, me: Identity, contradicted: Callable[[Claim], None]) -> None:
        self._known = known
        self._me = me
        self._contradicted = contradicted
        self._noted = trio.Event()
        self._mentions = Mentions()

    def check(self, claim: Claim) -> None:
        """Believe the claim, or raise NotTrusted."""
        self._known.check(claim, self._me)

    def note(self, claim: Claim) -> None:
        """The connection stands: pin it, and have that written down. Raises NotTrusted."""
        if self._known.note(claim):
            self._noted.set()

    async def run(self) -> None:
        """Save what was noted, and look into the file now and then, for ever."""
        while True:
            with trio.move_on_after(REREAD_SECONDS):
                await self._noted.wait()
            if self._noted.is_set():
                self._noted = trio.Event()
                await self._save()
            else:
                await self._refresh()

    async def _save(self) -> None:
        try:
            lost = await trio.to_thread.run_sync(self._known.save)
        except (OSError, IdentityError) as error:
            # It stays noted, and is tried again with the next one, or after a while.
            if self._mentions.due("save"):
                log.warning("who was met can't be written down", problem=str(error))
            await trio.sleep(REREAD_SECONDS)
            self._noted.set()
            return
        for claim in lost:
            self._contradicted(claim)

    async def _refresh(self) -> None:
        try:
            changed = await trio.to_thread.run_sync(self._known.refresh, abandon_on_cancel=True)
        except (OSError, IdentityError) as error:
            if self._mentions.due("refresh"):
                log.warning("known_peers can't be read", problem=str(error))
            return
        if changed:
            for warning in self._known.warnings:
                log.warning("known_peers has a line that isn't understood", problem=warning)
