"""What a request asks for, and what it gets: a slot of an instance, held until it is released; or the
news of one that is loading."""

from __future__ import annotations

from dataclasses import dataclass

import trio

from llamesh.config.cookbook import Profile
from llamesh.local.instance import Instance
from llamesh.net.exchange import UpstreamConnection


@dataclass(frozen=True, slots=True)
class Ask:
    """What a request wants. `streams`: it asked for a stream, so an abandoned slot is free at once."""

    profile: Profile
    request_id: str
    streams: bool = False


class Lease:
    """A slot of an instance, held for one request. `release` exactly once; a second call does nothing."""

    __slots__ = ("_ask", "_number", "_released", "instance", "queued_seconds")

    def __init__(self, ask: Ask, instance: Instance, queued_seconds: float) -> None:
        """Takes the slot: the caller has just seen that one is free."""
        self._number = instance.occupy()
        self.instance = instance
        self.queued_seconds = queued_seconds
        self._ask = ask
        self._released = False

    async def connect(self, *, fresh: bool = False) -> UpstreamConnection:
        """A connection to the instance. Raises UpstreamBroken."""
        kept = None if fresh else self.instance.idle_connection()
        return kept or await self.instance.connect()

    def release(
        self,
        connection: UpstreamConnection | None = None,
        *,
        complete: bool = False,
        working: bool = False,
    ) -> None:
        """Free the slot. `connection` goes back to the instance when the response was `complete`,
        else it is closed. `working`: llama-server was left in the middle of the request; a stream
        ends with its connection, anything else keeps the slot busy until llama-server says otherwise.
        """
        if self._released:
            return
        self._released = True
        if connection is not None:
            if complete:
                self.instance.keep(connection)
            else:
                connection.close()
        self.instance.vacate(self._number, abandoned=working and not complete and not self._ask.streams)


def loading_info(instance: Instance, node: str, usual_seconds: float) -> dict[str, object]:
    """What is told to those who couldn't wait for a start: {model, state, node, progress?, eta_seconds?}.

    `usual_seconds`: how long it took before, 0 when unknown; a guess isn't made up then.
    """
    info: dict[str, object] = {"model": instance.profile.public_name, "state": "loading", "node": node}
    if usual_seconds:
        passed = trio.current_time() - instance.created
        info["progress"] = round(min(0.99, passed / usual_seconds), 2)
        info["eta_seconds"] = round(max(0.0, usual_seconds - passed), 1)
    return info
