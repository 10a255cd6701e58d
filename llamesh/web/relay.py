"""One inference request, from its body to the last byte of its answer.

    find a slot here or a seat at a peer (maybe wait, telling the client what for)
    -> send the request there -> hand the answer on, piece by piece -> give slot or seat back

Rules
- Bodies pass byte for byte, both ways.
- A reused connection that turns out to be closed is replaced silently: llama-server closes them
  after 5 s and after 100 requests, and that can cross with a request on its way.
- Before the first byte of the answer, a failed upstream is tried once more; a request that killed
  an instance gets one more instance in the whole mesh, not all of them. A peer that can't be reached, or
  that says no before it began, isn't asked again for this request, and others are. After the first byte
  the answer is cut.
- Leaving early in any way (cancelled, client gone, timeout) closes the upstream connection, which
  is how llama-server, or the peer, learns of it, and frees the slot. All of that is in one `finally`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import trio

from llamesh.config.settings import Settings
from llamesh.core.lifecycle import State
from llamesh.core.offers import encode
from llamesh.dispatch import Dispatch
from llamesh.dispatch.lease import AnyLease, Forward, Lease
from llamesh.errors import LlameshError, NoCapacity, UpstreamError, UpstreamTimeout
from llamesh.net.exchange import Headers, UpstreamBroken, UpstreamConnection
from llamesh.telemetry.logs import get_logger
from llamesh.web.answer import SSE_HEADERS, Job, keepalive, note_place, pass_answer, working, write
from llamesh.web.headers import upstream_request
from llamesh.web.own_headers import own_headers, remember
from llamesh.web.peer_exchange import PeerRefused, heard_attempts, peer_headers, refused

log = get_logger("relay")

# One retry in all: the second failure is the request's own doing more often than not.
_MAX_BROKEN = 2

_MAX_LOST = 3  # peers that went away with the request in their hands; it may be what they die of

# How long a broken instance may take to be reaped, so that its last words are known.
_REAP_SECONDS = 1.0

# Until its answer begins, a peer says once in one or two seconds what it waits for. One that is silent for
# longer, in seconds, is cut off from us though its machine may live; nothing shorter can be asked of it.
_PEER_SILENCE = 15.0
_PEER_SPEAKS = 3.0

# A refusal is read whole, for its message; none is longer, and it comes in one piece.
_REFUSAL_BYTES = 65_536
_REFUSAL_SECONDS = 5.0

# How long a machine may take to wake up.
_WAKE_SECONDS = 90.0


class Relay:
    """Carries requests out; one object for the whole node."""

    def __init__(self, settings: Settings, dispatch: Dispatch) -> None:
        self._dispatch = dispatch
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        """Take over settings, at the start and after a reload."""
        self._node = settings.node_id
        self._node_header = settings.node_id.encode()
        self._key_header = settings.auth.required_header.lower().encode()
        self._keepalive = settings.http.stream_keepalive_seconds or math.inf
        silence = self._silence_ms = settings.upstream_read_timeout_ms
        self._peer_silence = max(_PEER_SPEAKS, silence / 1000) if silence else _PEER_SILENCE
        self._duration_ms = settings.model_defaults.max_request_duration_ms

    async def run(self, job: Job) -> None:
        """Answer one request through `job.sink`.

        Raises LlameshError when no byte of an upstream's answer was sent (though the sink may have
        started with comments), ClientGone when the client can't be written to.
        """
        limit: float | None = job.ask.profile.max_request_duration_ms
        if limit is None:
            limit = self._duration_ms
        name = "max_request_duration_ms"
        told = job.ask.travel.deadline_ms
        if told is not None and not 0 < limit < told:
            limit, name = max(told, 1.0), "what was left of max_request_duration_ms"
        if not limit:
            await self._attempts(job)
            return
        job.deadline = trio.current_time() + limit / 1000
        with trio.move_on_at(job.deadline) as scope:
            await self._attempts(job)
        if scope.cancelled_caught:
            self._too_late(f"took longer than {name} ({limit:.0f} ms)", job)

    def _too_late(self, what: str, job: Job) -> None:
        if job.outcome.first_byte_seconds is not None:
            job.outcome.error = "request_timeout"
            job.sink.abort()
            return
        raise UpstreamTimeout(f"the request to {job.ask.profile.key} on node {self._node} {what}")

    async def _attempts(self, job: Job) -> None:
        outcome = job.outcome
        refusal: LlameshError | None = None
        while True:
            outcome.attempts += 1
            lease = self._dispatch.take(job.ask)
            if lease is None:
                try:
                    lease = await self._wait_for_turn(job)
                except NoCapacity as error:
                    # The peer's own word is nearer to the cause than ours that nobody else is left.
                    raise refusal or error from None
            outcome.queued_seconds += lease.queued_seconds
            outcome.instance = lease.place
            note_place(outcome.record, lease)
            try:
                await self._exchange(lease, job)
                return
            except PeerRefused as error:
                refusal = error.face
                job.exclude(error.node)
                outcome.retries += (refusal.type,)
                outcome.record.note_try(f"node {error.node} refused it: {refusal.message}")
                job.broken = max(job.broken, error.broken)
                log.info("peer refused", request_id=job.ask.request_id, peer=error.node, error=refusal.type)
            except UpstreamBroken as error:
                if isinstance(lease, Lease):
                    await self._after_break(error, lease, job)
                else:
                    self._after_loss(error, lease, job)
                if outcome.first_byte_seconds is not None:
                    return

    async def _wait_for_turn(self, job: Job) -> AnyLease:
        """Wait in the queue; a stream hears after a while, and again and again, what it waits for."""
        ask = job.ask
        # A peer hears it in interim responses (see web.peer_connection) and keeps its client company itself.
        every = self._keepalive if self._comments(job) else math.inf
        with self._dispatch.join(ask, admitted=job.outcome.attempts > 1) as ticket:
            job.inbound.waiting_for = lambda: ticket.waiting_for
            while True:
                lease = await ticket.wait(every)
                if lease is not None:
                    job.inbound.waiting_for = working
                    return lease
                await self._say_what_for(job, ticket.waiting_for)

    @staticmethod
    def _comments(job: Job) -> bool:
        """Whether the client hears what it waits for."""
        return job.ask.streams and not job.ask.travel.origin

    async def _say_what_for(self, job: Job, text: str) -> None:
        job.spoke = trio.current_time()
        if not job.sink.started:
            job.sink.start(200, [*SSE_HEADERS, *self._own_headers(job, None, [])], length=None)
        await write(job.sink, keepalive(job.route, text))

    async def _exchange(self, lease: AnyLease, job: Job) -> None:
        connection: UpstreamConnection | None = None
        complete = False
        under_way = isinstance(lease, Forward)  # of an instance's slot it is asked later what became of it
        try:
            if isinstance(lease, Forward) and lease.seat.asleep:
                await self._wake(lease, job)
            # A peer's connections don't break with one of its instances, so those at hand will do.
            fresh = job.outcome.attempts > 1 and isinstance(lease, Lease)
            connection = await lease.connect(fresh=fresh)
            request = self._request(lease, job)
            under_way = True
            try:
                await self._ask(connection, request, lease, job)
            except UpstreamBroken as error:
                if error.started or not connection.served:
                    raise
                # It was closed under us before it took the request.
                connection.close()
                connection = None
                connection = await lease.connect(fresh=True)
                await self._ask(connection, request, lease, job)
            while not connection.response.has_head:
                await self._await_head(connection, lease, job)
            if isinstance(lease, Forward):
                await self._take_refusal(connection, lease, job)
            headers = self._own_headers(job, lease, connection.response.headers)
            # For each piece of a stream: nothing between it and the read that isn't needed.
            read = partial(self._read, connection, job) if self._silence_ms else connection.read
            await pass_answer(connection, job, headers, read)
            complete = True
        except PeerRefused:
            complete = True
            raise
        except UpstreamBroken:
            under_way = False
            raise
        finally:
            if connection is not None:
                connection.on_interim = None
            lease.release(connection, complete=complete, working=under_way)
            # What was refused says nothing.
            if job.outcome.first_byte_seconds is not None and job.outcome.status < 400:
                self._learn(lease, job, complete=complete)

    async def _wake(self, lease: Forward, job: Job) -> None:
        """Wait for a sleeping machine. A client that streams hears so now and then."""
        job.inbound.waiting_for = partial("waking node {}".format, lease.node)
        until = trio.current_time() + _WAKE_SECONDS
        while lease.seat.asleep:
            with trio.move_on_at(min(until, job.spoke + self._keepalive if self._comments(job) else until)):
                await lease.seat.wake()
                return
            if trio.current_time() >= until:
                raise UpstreamBroken(
                    f"node {lease.node} didn't wake within {_WAKE_SECONDS:g} s", started=False
                )
            await self._say_what_for(job, job.inbound.waiting_for())

    async def _ask(self, connection: UpstreamConnection, request: bytes, lease: AnyLease, job: Job) -> None:
        parts = job.inbound.body.parts()
        if isinstance(lease, Forward):
            job.inbound.waiting_for = partial("waiting for node {}".format, lease.node)
            connection.on_interim = job.hear_progress
            lease.sent = True
            await connection.send(request, parts)
            job.heard = trio.current_time()
            await self._await_head(connection, lease, job)
            return
        await connection.send(request, parts)
        # No frame more than needed: this is the hot path.
        await (self._read(connection, job) if self._silence_ms else connection.read())

    async def _await_head(self, connection: UpstreamConnection, lease: AnyLease, job: Job) -> None:
        """One read before the answer begins. A client that streams hears what a peer is waiting for."""
        if isinstance(lease, Lease):
            await self._read(connection, job)
            return
        # The peer's silence goes on while we speak.
        silent_at = job.heard + self._peer_silence
        speak_at = job.spoke + self._keepalive if self._comments(job) else math.inf
        with trio.move_on_at(min(silent_at, speak_at)) as scope:
            await connection.read()
            job.heard = trio.current_time()
        if scope.cancelled_caught:
            if trio.current_time() >= silent_at:
                raise UpstreamBroken(f"said nothing for {self._peer_silence:g} s", started=True)
            await self._say_what_for(job, job.inbound.waiting_for())

    async def _take_refusal(self, connection: UpstreamConnection, lease: Forward, job: Job) -> None:
        """Raises PeerRefused when the peer's answer is one after which others are to be asked."""
        response = connection.response
        for name, value in response.headers:
            if name == b"x-llamesh-load":
                lease.seat.hear(value)
        kind = refused(response.status, response.headers)
        if not kind:
            return
        body = response.take()
        with trio.move_on_after(_REFUSAL_SECONDS):
            while not response.complete and len(body) < _REFUSAL_BYTES:
                await connection.read()
                body += response.take()
        if not response.complete:
            raise UpstreamBroken("a refusal without end", started=True)
        raise PeerRefused(lease.node, kind, body, heard_attempts(response.headers))

    async def _read(self, connection: UpstreamConnection, job: Job) -> None:
        if not self._silence_ms:
            await connection.read()
            return
        with trio.move_on_after(self._silence_ms / 1000) as scope:
            await connection.read()
        if scope.cancelled_caught:
            what = f"was silent for upstream_read_timeout_ms ({self._silence_ms} ms)"
            self._too_late(what, job)
            raise UpstreamBroken(what, started=True)

    async def _after_break(self, error: UpstreamBroken, lease: Lease, job: Job) -> None:
        """Return to try again (or, when the answer had begun, to give up). Raises UpstreamError."""
        instance, outcome = lease.instance, job.outcome
        if instance.state is not State.GONE:
            with trio.move_on_after(_REAP_SECONDS):
                await instance.wait_gone()
        why = str(instance.failure or error)
        job.broken += 1
        if instance.end_reason == "given up":
            # It took very long to find out; another instance would hang on it just the same.
            job.broken = _MAX_BROKEN
        outcome.record.note_try(f"{instance.id} broke: {why}")
        log.warning("upstream broke", instance=instance.id, error=why, attempt=outcome.attempts)
        if self._cut(job):
            return
        if job.broken >= _MAX_BROKEN:
            raise UpstreamError(
                f"{job.ask.profile.key} on node {self._node} broke before it answered, twice: {why}",
                param="model",
            ) from error

    def _after_loss(self, error: UpstreamBroken, lease: Forward, job: Job) -> None:
        """The same for a peer."""
        job.lost += lease.sent
        job.outcome.retries += ("lost",)
        job.outcome.record.note_try(f"node {lease.node} was lost: {error}")
        log.warning("peer lost", request_id=job.ask.request_id, peer=lease.node, error=str(error))
        if self._cut(job):
            return
        if job.lost >= _MAX_LOST:
            raise UpstreamError(
                f"{job.ask.profile.key}: {_MAX_LOST} nodes were lost with this request, the last was "
                f"{lease.node}: {error}",
                param="model",
            ) from error
        job.avoid(lease.seat.first_hop, had_it=lease.sent)

    @staticmethod
    def _cut(job: Job) -> bool:
        """Whether the answer had begun; then it ends here, and the client can see that."""
        if job.outcome.first_byte_seconds is None:
            return False
        job.outcome.error = job.outcome.error or "cut"
        job.sink.abort()
        return True

    def _request(self, lease: AnyLease, job: Job) -> bytes:
        inbound, travel = job.inbound, job.ask.travel
        more: Headers = []
        if isinstance(lease, Lease):
            path, authorization = job.route.upstream, lease.instance.authorization
        else:
            path, authorization = inbound.path, b""
            left = None if math.isinf(job.deadline) else (job.deadline - trio.current_time()) * 1000
            travel = replace(
                travel,
                hops=travel.hops + 1,
                via=(*travel.via, self._node),
                attempt=job.broken,
                max_wait_ms=lease.max_wait_ms,
                deadline_ms=left,
                model=lease.seat.model,
                fingerprint=lease.fingerprint,
            )
            more = peer_headers(travel)
        return upstream_request(
            path + b"?" + inbound.query if inbound.query else path,
            inbound.headers,
            host=b"llamesh",
            authorization=authorization,
            length=inbound.body.length,
            id=inbound.request_id,
            key_header=self._key_header,
            to_peer=not isinstance(lease, Lease),
            more=more,
        )

    def _own_headers(self, job: Job, lease: AnyLease | None, theirs: Headers) -> Headers:
        headers = own_headers(self._node_header, job, lease, theirs)
        if job.inbound.told:
            headers += job.inbound.told
        return [*headers, *self.news(job)] if job.ask.travel.origin else headers

    def news(self, job: Job) -> Headers:
        """What a peer is told with an answer: how busy the profile is here, and what broke on its request."""
        router, ask = self._dispatch.router, job.ask
        if router is None:
            return []
        load = encode(router.situation(ask.profile.key, ask.travel.origin))
        return [(b"x-llamesh-load", load), (b"x-llamesh-attempt", b"%d" % job.broken)]

    def _learn(self, lease: AnyLease, job: Job, *, complete: bool) -> None:
        if job.ask.prefix:
            remember(self._dispatch.affinity, lease, job)
        router = self._dispatch.router
        if complete and router is not None and isinstance(lease, Lease):
            seconds = trio.current_time() - lease.since
            router.learn(job.ask, job.outcome.usage, seconds, lease.instance.busy_slots)
