"""What nodes tell each other of their keys' use, and what a file keeps: without nodes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest

from llamesh.config.settings import Settings
from llamesh.core.limits import DAY_SECONDS, TALLY_PREFIX, Bucket, Limits, Tally
from llamesh.core.membership.messages import check_key, check_value
from llamesh.errors import Forbidden, NotAuthenticated, RateLimited
from llamesh.net.exchange import Headers
from llamesh.telemetry.stats import Usage
from llamesh.web import quota
from llamesh.web.access import Access
from llamesh.web.answer import Inbound
from llamesh.web.body import Body, Budget
from llamesh.web.caller import ANYBODY, Caller
from llamesh.web.meters import Meters

NOON = 20_000 * DAY_SECONDS + 43_200.0


class Clock:
    """Unix time, set by hand."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> float:
        return self.now


def meters(clock: Clock, **limits: Limits) -> Meters:
    found = Meters(clock)
    found.configure(limits)
    return found


def take(meters: Meters, name: str) -> bool:
    meter = meters.get(name)
    assert meter is not None
    return meter.take(meters.clock()) is None


def test_entries_are_as_gossip_takes_them_and_told_when_something_changed() -> None:
    clock = Clock()
    here = meters(clock, **{"a.b-c_D": Limits(requests_per_minute=9), "idle": Limits(tokens_per_day=1)})
    assert dict(here.entries()) == {}
    assert take(here, "a.b-c_D")
    [(key, value)] = here.entries().items()
    assert key == TALLY_PREFIX + "a.b-c_D"
    check_key(key)
    check_value(value)
    clock.now += 3
    assert here.entries()[key] == value
    assert take(here, "a.b-c_D")
    assert here.entries()[key] != value
    # When all of it is over, what was told may stay: nobody counts it any more.
    clock.now += DAY_SECONDS
    said = here.entries()[key]
    there = meters(clock, **{"a.b-c_D": Limits(requests_per_minute=1)})
    there.hear("x", {key: said})
    meter = there.get("a.b-c_D")
    assert meter is not None
    assert meter.used(clock.now)[:4] == (0, 0, 0, 0)


def test_a_round_tells_a_bounded_number_and_all_have_their_turn() -> None:
    clock = Clock()
    names = [f"k{number}" for number in range(200)]
    here = meters(clock, **{name: Limits(requests_per_day=1000) for name in names})
    seen: dict[str, bytes] = {}
    for step in range(8):
        for name in names:
            assert take(here, name)
        before, seen = seen, dict(here.entries())
        changed = [key for key, value in seen.items() if before.get(key) != value]
        assert len(changed) == 64, step
        clock.now += 5
    counts = [json.loads(value)["day_requests"] for value in seen.values()]
    assert len(counts) == 200
    assert min(counts) >= 4  # none is further behind than a turn of all
    assert sum(map(len, seen.values())) < 200 * 500


def test_other_nodes_add_up_and_what_they_say_is_believed_within_bounds() -> None:
    clock = Clock()
    here = meters(clock, alice=Limits(requests_per_minute=10, max_concurrent_requests=5))
    alice = here.get("alice")
    assert alice is not None
    bucket = int(NOON) // 5
    state: dict[str, bytes] = {
        "k:alice": msgspec.json.encode(Tally((Bucket(bucket, 4, 7),), running=2)),
        "k:bob": b'{"running": 3}',
        "p:m:default": b"{}",
    }
    here.hear("x", state)
    here.hear("y", {"k:alice": b'{"running": -5}'})
    here.hear("z", {"k:alice": b"not JSON"})
    assert alice.used(NOON)[0::4] == (4, 2)
    here.hear("x", {**state, "k:alice": b"{}"})  # a new life, or one that it forgot
    assert alice.used(NOON)[0::4] == (4, 0)
    here.hear("x", state)
    here.hear("x", {})
    assert alice.used(NOON)[0::4] == (4, 0)
    here.hear("x", state)
    here.hear("x", None)
    here.hear("unknown", None)
    assert alice.used(NOON)[0::4] == (4, 0)


def test_a_reload_keeps_what_was_counted_under_a_name() -> None:
    clock = Clock()
    here = meters(clock, alice=Limits(requests_per_minute=1), bob=Limits(requests_per_minute=1))
    here.hear("x", {"k:carol": b'{"running": 3}', "k:bob": b'{"running": 2}'})
    assert take(here, "alice")
    here.entries()
    here.configure({"alice": Limits(requests_per_minute=2), "carol": Limits(max_concurrent_requests=3)})
    assert here.get("bob") is None
    assert take(here, "alice")
    assert not take(here, "alice")
    assert not take(here, "carol"), "what others said of it before it had limits here"
    here.configure({})
    assert dict(here.entries()) == {}


def test_the_file_keeps_windows_and_nothing_that_runs() -> None:
    clock = Clock()
    limits = {"alice": Limits(requests_per_day=3), "idle": Limits(requests_per_day=3)}
    here = meters(clock, **limits)
    assert take(here, "alice")
    assert take(here, "alice")
    kept = json.loads(json.dumps(here.saved()))
    assert list(kept) == ["alice"]
    assert here.entries(), "the file isn't the mesh: it is told all the same"
    clock.now += 60
    again = meters(clock, **limits)
    again.restore(kept)
    alice = again.get("alice")
    assert alice is not None
    assert alice.used(clock.now) == (2, 2, 0, 0, 0)
    assert take(again, "alice")
    assert not take(again, "alice")


@pytest.mark.parametrize(
    "document", [None, [], 5, {"alice": 5}, {"alice": {"minute": [[1]]}, "x": {}}, {"y": 1}]
)
def test_a_file_with_anything_in_it_starts(document: object) -> None:
    here = meters(Clock(), alice=Limits(requests_per_day=3))
    here.restore(document)
    assert take(here, "alice")


# Callers.


def access(auth: Mapping[str, Any]) -> Access:
    return Access(Settings.model_validate({"auth": {"enabled": True, **auth}}))


def key(text: str) -> Headers:
    return [(b"x-api-key", text.encode())]


def test_who_calls() -> None:
    guard = access(
        {
            "allowed_keys": ["one", {"name": "alice", "key": "two", "requests_per_day": 5}, "both"],
            "admin_keys": [{"name": "boss", "key": "three"}, "both"],
        }
    )
    assert [guard.check(key(k)).name for k in ("one", "two", "three", "both")] == [
        "key-1", "alice", "boss", "admin-2",
    ]  # fmt: skip
    assert guard.check(key("one")).meter is None
    assert guard.check(key("two")).meter is guard.meters.get("alice")
    assert guard.check_admin(key("both"), loopback=False).name == "admin-2"
    assert (
        guard.check_admin([(b"authorization", b"Bearer one"), *key("three")], loopback=False).name == "boss"
    )
    with pytest.raises(Forbidden, match="the key alice may not administer"):
        guard.check_admin(key("two"), loopback=True)
    with pytest.raises(NotAuthenticated):
        guard.check(key("alice"))
    assert Access(Settings()).check(key("one")) is ANYBODY


def test_without_admin_keys_those_with_limits_do_not_administer() -> None:
    guard = access({"allowed_keys": ["one", {"name": "alice", "key": "two", "models": ["m"]}]})
    assert guard.check_admin(key("one"), loopback=False).name == "key-1"
    with pytest.raises(Forbidden):
        guard.check_admin(key("two"), loopback=False)


def test_an_alias_is_the_model() -> None:
    guard = access({"allowed_keys": [{"name": "alice", "key": "k", "models": ["best"]}]})
    guard.aliases_of = lambda model, key: ("BEST",) if key == "Tiny:long" else ()
    alice = guard.check(key("k"))
    guard.check_model(alice, "Tiny", "long")
    with pytest.raises(Forbidden, match="the key alice may not use Other:default"):
        guard.check_model(alice, "Other", "default")
    guard.check_model(ANYBODY, "Other", "default")
    assert guard.figures["alice"].refused == {"models": 1}


def test_figures_and_counters_survive_a_reload_that_keeps_the_name() -> None:
    guard = access({"allowed_keys": [{"name": "alice", "key": "k", "requests_per_day": 5}, "gone"]})
    before = guard.check(key("k"))
    assert before.figures is not None
    before.figures.requests = 7
    auth = {"enabled": True, "allowed_keys": [{"name": "alice", "key": "new", "requests_per_day": 9}]}
    guard.configure(Settings.model_validate({"auth": auth}))
    after = guard.check(key("new"))
    assert after.figures is before.figures
    assert after.meter is before.meter
    assert list(guard.figures) == ["alice"]
    guard.configure(Settings())
    assert guard.document()["keys"] == []


# Requests.


def inbound(caller: Caller) -> Inbound:
    with Body(Budget()) as body:
        return Inbound(b"/", b"", [], body, "id", 0.0, caller=caller)


def test_a_request_is_counted_from_its_beginning_to_its_end() -> None:
    guard = access({"allowed_keys": [{"name": "alice", "key": "k", "tokens_per_minute": 10}, "free"]})
    alice = inbound(guard.check(key("k")))
    quota.admit(alice, NOON)
    quota.settle(alice.caller, Usage(prompt_tokens=7, cached_tokens=6, completion_tokens=5), NOON)
    assert alice.told is not None
    assert dict(alice.told)[b"x-ratelimit-reset-tokens"] == b"1m5s"
    with pytest.raises(RateLimited) as refused:
        quota.admit(alice, NOON + 0.5)
    assert refused.value.retry_after == 65
    assert dict(alice.told)[b"x-ratelimit-remaining-tokens"] == b"0"
    figures = guard.figures["alice"]
    assert (figures.requests, figures.running, figures.refused["tokens_per_minute"]) == (1, 0, 1)
    assert (figures.prompt_tokens, figures.cached_tokens, figures.tokens) == (7, 6, 5)
    free = inbound(guard.check(key("free")))
    quota.admit(free, NOON)
    assert free.told is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, b"1s"), (59.0, b"59s"), (60.0, b"1m0s"), (3599.5, b"1h0m0s"), (86_399, b"23h59m59s")],
)
def test_durations_are_written_as_openai_writes_them(seconds: float, text: bytes) -> None:
    assert quota.duration(seconds) == text
