"""`python -m benchmarks.guardrails`: a random client against more models than memory holds.

Twelve profiles that together need four times `max_sysmem_mb` are asked for at random: wholes and streams,
some given up half way. Five times a second the node's own account and the children's real memory are held
against the limit. At the end every request must have been answered, or refused with a 503 in time, the
node's counts must be the client's, and no process may be left. Then two profiles that can't be loaded
together are kept busy at the same time: how often they swapped, and how long requests waited.

The children are the tests' stand-in for llama-server, which really takes the memory that it is said to.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import random
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import trio

from benchmarks.measure import say
from llamesh.local.sensors.processes import ProcessTable
from tests.support.fake import FAKE_LLAMA_SERVER, fake_profile_file
from tests.support.node import Node, running_node

PROFILES = 12
EATEN_MB = 64
# What a child takes beside its ballast: a Python interpreter.
ESTIMATED_MB = EATEN_MB + 32
LIMIT_MB = PROFILES * ESTIMATED_MB // 4

WAIT_MS = 15_000
TENURE_SECONDS = 2.0
# The queue's time stands still while a model loads; beside it there are the loads and the answer itself.
DEADLINE_SECONDS = WAIT_MS / 1000 + 15.0
REQUESTS_PER_SECOND = 10.0
SAMPLE_SECONDS = 0.2
STREAMS, GIVEN_UP = 0.5, 0.15
PATH = "/v1/chat/completions"


@dataclass
class Tally:
    """What the client saw. `waits` are seconds to the end of each answer that was a 200."""

    sent: int = 0
    given_up: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    waits: list[float] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    def blame(self, what: str) -> None:
        """Note a violation; the first hundred are enough."""
        if len(self.violations) < 100:
            self.violations.append(what)


@dataclass
class Samples:
    """The highest values that were seen, in MiB."""

    count: int = 0
    reserved_mb: int = 0
    resident_mb: int = 0
    instances: int = 0
    queued: int = 0


@dataclass(frozen=True)
class Report:
    """One run. `swaps` are instances that left to make room; `p95_seconds` is from sending to the end."""

    name: str
    seconds: float
    requests: int
    answers: Mapping[str, int]
    given_up: int
    starts: int
    swaps: int
    evictions: Mapping[str, int]
    p50_seconds: float | None
    p95_seconds: float | None
    worst_seconds: float | None
    samples: Samples
    limit_mb: int
    violations: list[str]


async def ask(client: httpx.AsyncClient, tally: Tally, model: str, chance: random.Random) -> None:
    """One request, to its end or until this client gives it up."""
    streams, patience = chance.random() < STREAMS, math.inf
    if chance.random() < GIVEN_UP:
        patience = chance.expovariate(5.0)
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": chance.randint(1, 40),
        "stream": streams,
    }
    tally.sent += 1
    began = trio.current_time()
    try:
        with trio.fail_after(DEADLINE_SECONDS), trio.move_on_after(patience) as scope:
            reply = await client.post(PATH, json=body)
            _judge(tally, reply, streams=streams, seconds=trio.current_time() - began)
        if scope.cancelled_caught:
            tally.given_up += 1
    except trio.TooSlowError:
        tally.answers["none"] += 1
        tally.blame(f"{model}: no answer within {DEADLINE_SECONDS:g} s")
    except httpx.HTTPError as error:
        tally.answers["broken"] += 1
        tally.blame(f"{model}: {type(error).__name__}: {error}")


def _judge(tally: Tally, reply: httpx.Response, *, streams: bool, seconds: float) -> None:
    kind = str(reply.status_code)
    if reply.status_code == 200 and streams:
        # A stream may have begun with comments while it waited; then an error is its last event.
        if '"error"' in reply.text:
            kind = "503" if "queue_timeout" in reply.text or "queue_full" in reply.text else "late error"
        elif not reply.text.rstrip().endswith("data: [DONE]"):
            kind = "cut"
    tally.answers[kind] += 1
    if kind == "200":
        tally.waits.append(seconds)
    elif kind != "503":
        tally.blame(f"an answer was {kind}: {reply.text[-300:]}")


async def watch(node: Node, samples: Samples, tally: Tally, limit_mb: int) -> None:
    """Sample for ever; a limit that is exceeded is a violation."""
    table = ProcessTable()
    while True:
        document = (await node.client.get("/metrics/json")).json()
        resources = document["node_resources"]
        samples.count += 1
        samples.reserved_mb = max(samples.reserved_mb, resources["reserved_sysmem_mb"])
        samples.instances = max(
            samples.instances, sum(h["instance_count"] for h in document["hashes"].values())
        )
        samples.queued = max(samples.queued, sum(h["queue_len"] for h in document["hashes"].values()))
        held = table.memory([child.pid for child in node.children()])
        resident = held.private >> 20 if held is not None else 0
        samples.resident_mb = max(samples.resident_mb, resident)
        if resources["max_sysmem_mb"] != limit_mb:
            tally.blame(f"max_sysmem_mb is {resources['max_sysmem_mb']}")
        if resources["reserved_sysmem_mb"] > limit_mb:
            tally.blame(f"{resources['reserved_sysmem_mb']} MiB reserved of {limit_mb}")
        if resident > limit_mb:
            tally.blame(f"children hold {resident} MiB of {limit_mb}")
        await trio.sleep(SAMPLE_SECONDS)


@contextlib.asynccontextmanager
async def node_of(folder: Path, count: int, limit_mb: int) -> AsyncIterator[Node]:
    """A node with `count` models m0, m1, ... of `ESTIMATED_MB` each."""
    models = []
    for number in range(count):
        file = fake_profile_file(folder, f"m{number}", eat_mb=EATEN_MB, slots=2, token_delay=0.005)
        profile = {"id": "default", "model_path": str(file), "estimated_sysmem_mb": ESTIMATED_MB}
        models.append({"name": f"m{number}", "profiles": [profile]})
    settings = {
        "max_sysmem_mb": limit_mb,
        "model_defaults": {"max_wait_in_queue_ms": WAIT_MS, "min_eviction_tenure_secs": TENURE_SECONDS},
    }
    # What a node said is printed at its end, for tests; here it is asked for what matters.
    with contextlib.redirect_stdout(io.StringIO()):
        async with running_node(
            folder / "node", {"models": models}, settings, binary_path=FAKE_LLAMA_SERVER
        ) as node:
            yield node


async def finish(node: Node, name: str, seconds: float, tally: Tally, samples: Samples, limit: int) -> Report:
    """Compare counts, end the node, look for what is left."""
    with trio.move_on_after(DEADLINE_SECONDS):
        while (document := (await node.client.get("/metrics/json")).json())["current_requests"]:
            await trio.sleep(0.05)
    counted, lowest = document["requests_total"], tally.sent - tally.given_up
    # One that was given up at once may never have been sent.
    if not lowest <= counted <= tally.sent:
        tally.blame(f"the node counted {counted} requests, the client {lowest} to {tally.sent}")
    if document["current_requests"]:
        tally.blame(f"{document['current_requests']} requests never ended")
    for key, values in document["hashes"].items():
        if values["queue_len"] or values["current_requests"]:
            tally.blame(
                f"{key} still has {values['queue_len']} waiting, {values['current_requests']} running"
            )
        if values["crashes_total"] or values["start_failures_total"]:
            tally.blame(
                f"{key}: {values['crashes_total']} crashes, {values['start_failures_total']} failed starts"
            )
    children = node.children()
    try:
        code = await node.stop()
    except AssertionError as error:
        tally.blame(str(error)[:300])
    else:
        if code:
            tally.blame(f"the node ended with {code}")
    left = [child.pid for child in children if psutil.pid_exists(child.pid) and child.is_running()]
    if left:
        tally.blame(f"children left: {left}")
    evictions = document["node_resources"]["evictions"]
    waits = sorted(tally.waits)
    return Report(
        name=name,
        seconds=round(seconds, 1),
        requests=tally.sent,
        answers=dict(tally.answers),
        given_up=tally.given_up,
        starts=sum(values["starts_total"] for values in document["hashes"].values()),
        swaps=evictions.get("room", 0),
        evictions=evictions,
        p50_seconds=_at(waits, 0.5),
        p95_seconds=_at(waits, 0.95),
        worst_seconds=_at(waits, 1.0),
        samples=samples,
        limit_mb=limit,
        violations=tally.violations,
    )


def _at(ordered: list[float], share: float) -> float | None:
    return round(ordered[math.ceil(share * len(ordered)) - 1], 3) if ordered else None


async def crowd(folder: Path, seconds: float, seed: int) -> Report:
    """Twelve profiles, a fourth of which fit; requests come at random, some models more often."""
    chance, tally, samples = random.Random(seed), Tally(), Samples()
    names = [f"m{number}" for number in range(PROFILES)]
    weights = [1 / (1 + number) for number in range(PROFILES)]
    began = trio.current_time()
    async with node_of(folder, PROFILES, LIMIT_MB) as node, trio.open_nursery() as nursery:
        nursery.start_soon(watch, node, samples, tally, LIMIT_MB)
        async with _client(node) as client, trio.open_nursery() as requests:
            with trio.move_on_after(seconds):
                while True:
                    await trio.sleep(chance.expovariate(REQUESTS_PER_SECOND))
                    [model] = chance.choices(names, weights)
                    own = random.Random(chance.random())
                    requests.start_soon(ask, client, tally, model, own)
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            return await finish(
                node, "twelve profiles", trio.current_time() - began, tally, samples, LIMIT_MB
            )
    raise AssertionError


async def alternation(folder: Path, seconds: float, seed: int) -> Report:
    """Two profiles of which one fits, each with four clients that ask again and again."""
    tally, samples, limit = Tally(), Samples(), ESTIMATED_MB + ESTIMATED_MB // 2
    began = trio.current_time()
    served: Counter[str] = Counter()

    async def insist(client: httpx.AsyncClient, model: str, number: int) -> None:
        chance = random.Random(seed * 100 + number)
        until = began + seconds
        while trio.current_time() < until:
            before = len(tally.waits)
            await ask(client, tally, model, chance)
            served[model] += len(tally.waits) > before

    async with node_of(folder, 2, limit) as node, trio.open_nursery() as nursery:
        nursery.start_soon(watch, node, samples, tally, limit)
        async with _client(node) as client, trio.open_nursery() as clients:
            for number in range(8):
                clients.start_soon(insist, client, f"m{number % 2}", number)
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            if min(served["m0"], served["m1"]) * 4 < max(served.values(), default=0):
                tally.blame(f"one starves the other: {dict(served)}")
            return await finish(
                node, "two that alternate", trio.current_time() - began, tally, samples, limit
            )
    raise AssertionError


def _client(node: Node) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
    return httpx.AsyncClient(base_url=node.url, trust_env=False, timeout=None, limits=limits)


def table(report: Report) -> str:
    """A report as text."""
    answers = ", ".join(f"{count} x {kind}" for kind, count in sorted(report.answers.items()))
    samples, waits = report.samples, (report.p50_seconds, report.p95_seconds, report.worst_seconds)
    lines = [
        f"{report.name}, {report.seconds:g} s, {report.limit_mb} MiB for all",
        f"  requests   {report.requests}: {answers}; {report.given_up} given up by the client",
        "  answered   in {} s (median), {} s (p95), {} s (worst)".format(*waits),
        f"  instances  {report.starts} starts, {report.swaps} left to make room; at once {samples.instances}",
        f"  memory     reserved {samples.reserved_mb} MiB, resident {samples.resident_mb} MiB at the most,"
        f" in {samples.count} samples",
        f"  queue      {samples.queued} at the longest",
    ]
    lines += [f"  VIOLATION  {violation}" for violation in report.violations]
    return "\n".join([*lines, "  no limit exceeded, nothing lost" if not report.violations else ""])


def main(argv: list[str] | None = None) -> int:
    """Returns 1 when something was violated."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guardrails", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long the random client asks (600)")
    parser.add_argument("--seed", type=int, default=1, help="of the random client (1)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to write the reports as JSON")
    options = parser.parse_args(argv)
    reports = []
    with tempfile.TemporaryDirectory(prefix="llamesh-guard-") as scratch:
        for name, row, seconds in (
            ("crowd", crowd, options.seconds),
            ("alternation", alternation, max(10.0, options.seconds / 4)),
        ):
            folder = Path(scratch, name)
            folder.mkdir()
            say(f"{name}: {seconds:g} s")
            report = trio.run(row, folder, seconds, options.seed)
            print(table(report))
            reports.append(report)
    if options.json:
        documents: list[dict[str, Any]] = [asdict(report) for report in reports]
        options.json.write_text(json.dumps(documents, indent=1) + "\n")
        say(f"written to {options.json}")
    return int(any(report.violations for report in reports))


if __name__ == "__main__":
    sys.exit(main())
