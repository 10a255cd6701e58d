"""The one path of an inference request, whichever lane it came by.

A lane brings an `Inbound` and a `Sink`; everything that decides about the request, answers its
errors, counts and logs it is here, so that both lanes give the same answers.
"""

from __future__ import annotations

import time
from dataclasses import replace

import trio

from llamesh.config.cookbook import Elsewhere
from llamesh.config.current import Current
from llamesh.config.settings import Settings
from llamesh.core.prefixes import NOTHING
from llamesh.dispatch import Dispatch
from llamesh.dispatch.affinity import COLD
from llamesh.dispatch.lease import Ask
from llamesh.errors import InternalError, InvalidRequest, LlameshError, ModelNotFound
from llamesh.net.exchange import Headers
from llamesh.telemetry.audit import Audit
from llamesh.telemetry.log_lines import Shown
from llamesh.telemetry.logs import get_logger
from llamesh.telemetry.recorder import Record, Recorder
from llamesh.telemetry.stats import NodeStats, ProfileStats
from llamesh.web import quota
from llamesh.web.access import Access
from llamesh.web.answer import ClientGone, Inbound, Job, Outcome, finish_with_event
from llamesh.web.body import Budget
from llamesh.web.caller import ANYBODY, Caller
from llamesh.web.headers import NONE
from llamesh.web.openai import (
    ROUTES,
    SESSION_HEADERS,
    Route,
    choose_profile,
    read_features,
    read_prefix,
    read_wish,
)
from llamesh.web.relay import Relay
from llamesh.web.sink import Sink

log = get_logger("request")


class Gateway:
    """Everything that a lane needs to answer inference requests."""

    def __init__(
        self, current: Current, dispatch: Dispatch, stats: NodeStats, audit: Audit | None = None
    ) -> None:
        """`audit`: the file that says who asked for what, None where it is off."""
        self._current = current
        self.access = Access(current.settings)
        self.access.aliases_of = dispatch.aliases_of
        self.budget = Budget()
        self.stats = stats
        self.audit = audit
        self.recorder = Recorder()
        self._dispatch = dispatch
        self._relay = Relay(current.settings, dispatch)
        self._number = 0

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        return self._current.settings

    def apply_settings(self) -> None:
        """The settings have changed: take over what is kept ready for the hot path."""
        self.access.configure(self.settings)
        self._relay.configure(self.settings)

    def admit(self, headers: Headers, *, peer: bool = False) -> Caller:
        """What can be refused before the body is read; who asks. Raises LlameshError. A `peer` has proven
        who it is, and checked its client's key itself.
        """
        caller = ANYBODY if peer else self.access.check(headers)
        for name, value in headers:
            if name == b"x-llama-mesh-hops":
                self._check_hops(value)
            elif name == b"origin" and not peer:
                self.access.check_posted(headers)
        return caller

    async def infer(self, inbound: Inbound, route: Route, sink: Sink) -> None:
        """Answer one admitted request: with the upstream's answer, or with an error. Never raises
        but for cancellation; afterwards the sink is finished or aborted.
        """
        record = self.recorder.begin(inbound.request_id, inbound.path, inbound.started, inbound, sink)
        outcome = Outcome(record)
        job: Job | None = None
        profile_stats: ProfileStats | None = None
        key, origin = "", inbound.travel.origin
        caller, counted = inbound.caller, False
        try:
            if caller.figures is not None:
                record.key = caller.name
                quota.admit(inbound, time.time())
                counted = True
            ask = self._understand(inbound, route, record)
            key = record.model = ask.profile.key
            profile_stats = self.stats.profiles.get(key)
            if profile_stats is None:
                profile_stats = self.stats.profile(key, ours=not isinstance(ask.profile.source, Elsewhere))
            profile_stats.current_requests += 1
            if origin:
                self._dispatch.count_origin(origin, key, 1)
            job = Job(
                inbound, ask, route, sink, outcome, broken=inbound.travel.attempt, spoke=inbound.started
            )
            await self._relay.run(job)
        except LlameshError as error:
            outcome.status = outcome.status or error.status
            outcome.error, record.message = error.type, error.message[:1000]
            more = self._relay.news(job) if origin and job is not None else inbound.told or NONE
            await self.refuse(error, inbound.request_id, sink, route, more)
        except ClientGone:
            outcome.error = "cancelled"
            sink.abort()
        except trio.Cancelled:
            outcome.error = record.error or "cancelled"  # by an operator, who left a reason, or by the client
            raise
        except Exception:
            log.exception("defect", request_id=inbound.request_id, profile=key)
            outcome.status, outcome.error = 500, "internal_error"
            await self.refuse(_defect(inbound.request_id), inbound.request_id, sink, route)
        finally:
            if profile_stats is not None:
                profile_stats.current_requests -= 1
                if origin:
                    self._dispatch.count_origin(origin, key, -1)
            if inbound.answers > 1:
                outcome.usage.multiply(inbound.answers)
            if counted:
                quota.settle(caller, outcome.usage, time.time())
            self._account(inbound, key, profile_stats, outcome)

    def count_refused(
        self,
        error: LlameshError,
        id: str,  # noqa: A002
        path: bytes,
        headers: Headers,
        address: str,
        origin: str = "",
    ) -> None:
        """A request wasn't admitted, or its body didn't come. `address`: of the connection's other end;
        `origin`: the peer that sent it.
        """
        self.stats.rejected[error.type] += 1
        if self.audit is not None and path in ROUTES:
            key = "" if origin else self.access.who(headers).name
            self.audit.refused(id, key, address, origin, path, (error.status, error.type, error.message))

    async def refuse(
        self,
        error: LlameshError,
        id: str,  # noqa: A002
        sink: Sink,
        route: Route | None = None,
        more: Headers = NONE,
    ) -> None:
        """Answer with an error: as a response, or as an event where the answer has begun."""
        try:
            if sink.started:
                if route is None:
                    sink.abort()
                else:
                    await finish_with_event(sink, route, error.document())
                return
            body = error.body()
            sink.start(error.status, [*self.error_headers(error, id), *more], length=len(body))
            await sink.finish(body)
        except (OSError, ClientGone):
            sink.abort()

    def error_headers(self, error: LlameshError, id: str) -> Headers:  # noqa: A002
        """The headers of an error response."""
        headers: Headers = [
            (b"content-type", b"application/json"),
            (b"x-request-id", id.encode()),
            (b"x-llamesh-node", self.settings.node_id.encode()),
            (b"x-llamesh-error", error.type.encode()),
        ]
        if error.retry_after is not None:
            headers.append((b"retry-after", b"%d" % error.retry_after))
        if error.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        return headers

    def _understand(self, inbound: Inbound, route: Route, record: Record) -> Ask:
        content_type = session = b""
        for name, value in inbound.headers:
            if name == b"content-type":
                content_type = content_type or value
            elif name in SESSION_HEADERS:
                session = session or value
        wish = read_wish(content_type, inbound.query, inbound.body.view())
        inbound.answers, travel = wish.answers, inbound.travel
        if travel.model:
            wish = replace(wish, model=travel.model)
        profile = choose_profile(
            self._dispatch.find, wish, route, self.settings.default_model, self.settings.node_id
        )
        if inbound.caller.models is not None:
            self.access.check_model(inbound.caller, profile.model, profile.id)
        # Only text streams; elsewhere llama-server ignores the wish, and so must the keep-alives.
        streams = record.streams = wish.streams and route.needs == "text"
        prefix = read_prefix(wish, route, profile.key, session)
        warmth = self._dispatch.affinity.find(profile.key, prefix) if prefix is not NOTHING else COLD
        if self._dispatch.router is None:
            return Ask(profile, inbound.request_id, streams, prefix=prefix, warmth=warmth)
        record.origin, record.via = travel.origin, travel.via
        if travel.fingerprint and self._dispatch.router.differs(profile, travel):
            raise ModelNotFound(
                f"node {self.settings.node_id} has {profile.key} with other weights or settings",
                param="model",
            )
        self._number += 1
        features = read_features(wish, route, inbound.body, self._number, warmth.nodes)
        ask = Ask(profile, inbound.request_id, streams, travel, features, record=record)
        return replace(ask, prefix=prefix, warmth=warmth) if prefix else ask

    def _check_hops(self, value: bytes) -> None:
        limit = self.settings.max_hops
        if not value.isdigit() or len(value) > 9 or int(value) > limit:
            shown = value[:20].decode("ascii", "replace")
            raise InvalidRequest(f"Too many hops: X-Llama-Mesh-Hops is {shown!r}, the limit is {limit}")

    def _account(self, inbound: Inbound, key: str, stats: ProfileStats | None, outcome: Outcome) -> None:
        seconds = trio.current_time() - inbound.started
        usage = outcome.usage
        failed = (bool(outcome.error) and outcome.error != "cancelled") or outcome.status >= 400
        served = self.stats.count_served(outcome.node) if outcome.node and not failed else ""
        if outcome.retries:
            self.stats.forward_retries.update(outcome.retries)
        if stats is None:
            self.stats.rejected[outcome.error or "cancelled"] += 1
        else:
            stats.requests_total += 1
            stats.errors_total += failed
            result = outcome.error or ("ok" if outcome.status < 400 else "upstream_status")
            stats.outcomes[result, served, "peer" if inbound.travel.origin else "client"] += 1
            stats.add_usage(usage, here=bool(outcome.record.instance))
            stats.duration_seconds.observe(seconds)
            stats.queue_seconds.observe(outcome.queued_seconds)
            if outcome.first_byte_seconds is not None:
                stats.first_byte_seconds.observe(outcome.first_byte_seconds)
            scan = outcome.scan
            if scan is not None and scan.first_token is not None:
                stats.first_token_seconds.observe(scan.first_token)
                scan.add_times(stats.inter_token_seconds)
        self._close(outcome, seconds)
        if self.audit is not None:
            self.audit.request(outcome.record, inbound.address)
        log.info(
            "request",
            request_id=inbound.request_id,
            path=inbound.path.decode("ascii", "replace"),
            profile=key,
            instance=outcome.instance,
            **({"origin": inbound.travel.origin} if inbound.travel.origin else {}),
            **({"key": Shown(inbound.caller.name)} if inbound.caller.name else {}),
            status=outcome.status,
            error=outcome.error,
            ms=round(seconds * 1000, 1),
            queue_ms=round(outcome.queued_seconds * 1000, 1),
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            tokens=usage.completion_tokens,
        )

    def _close(self, outcome: Outcome, seconds: float) -> None:
        """The record has all that is known now."""
        record, usage = outcome.record, outcome.usage
        record.status, record.error, record.node = outcome.status, outcome.error, outcome.node
        record.ms, record.queue_ms = seconds * 1000, outcome.queued_seconds * 1000
        record.prompt_tokens, record.cached_tokens = usage.prompt_tokens, usage.cached_tokens
        record.tokens = usage.completion_tokens
        self.recorder.end(record)


def _defect(id: str) -> InternalError:  # noqa: A002
    return InternalError(f"an internal error; the node's log has it under request id {id}")
