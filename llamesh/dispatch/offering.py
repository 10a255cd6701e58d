"""What this node tells its peers: an offer for each profile, and how busy it is.

Offers are gossiped, so a value that moves all the time is told anew only when it has moved by a
quarter (`core.speeds.told`). The rest goes to whoever probes.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path, PurePath

import trio

from llamesh.config.cookbook import HubFile, ModelPath, Profile, UrlFile
from llamesh.config.current import Current
from llamesh.core.offers import IDLE, OFFER_PREFIX, News, Offer, Situation, encode
from llamesh.core.speeds import Told, steady, told
from llamesh.dispatch.dispatch import Dispatch
from llamesh.dispatch.router import Router
from llamesh.local.pool import Pool
from llamesh.telemetry.learned import LearnedValues

# Where the machine puts the work, and how fast, not what comes out of it.
_WITHOUT_MEANING = {
    "-t": 1, "--threads": 1, "-tb": 1, "--threads-batch": 1, "-ngl": 1, "--gpu-layers": 1,
    "--n-gpu-layers": 1,
    "-np": 1, "--parallel": 1, "-ts": 1, "--tensor-split": 1, "-mg": 1, "--main-gpu": 1, "-sm": 1,
    "--split-mode": 1, "-dev": 1, "--device": 1, "--mlock": 0, "--no-mmap": 0, "--port": 1, "--host": 1,
    "--numa": 1, "--cache-ram": 1, "-cram": 1, "--slots": 0, "--metrics": 0, "--log-file": 1, "-v": 0,
}  # fmt: skip

_MOST_PROFILES = 512

_SIZES_SECONDS = 30.0


class Offering:
    """See the module. `status(profile)`: as in `/v1/models`; `summary()`: the node's own figures."""

    def __init__(
        self,
        current: Current,
        pool: Pool,
        dispatch: Dispatch,
        router: Router,
        learned: LearnedValues,
        *,
        status: Callable[[Profile], str],
        summary: Callable[[], dict[str, object]],
        unwilling: Callable[[], str],
    ) -> None:
        """`unwilling()`: why this node does nothing for peers now, "" when it does."""
        self._current = current
        self._pool = pool
        self._dispatch = dispatch
        self._router = router
        self._learned = learned
        self._status = status
        self._summary = summary
        self._unwilling = unwilling
        self._told: dict[str, tuple[Told, float, float]] = {}
        self._encoded: dict[str, tuple[Offer, bytes]] = {}
        self._sizes: dict[str, int] = {}

    async def run(self) -> None:
        """Look at the sizes of model files now and then, in a thread: they may be on a network."""
        while True:
            paths = [
                p.source.path for p in self._current.cookbook.profiles if isinstance(p.source, ModelPath)
            ]
            self._sizes = await trio.to_thread.run_sync(_sizes, paths, abandon_on_cancel=True)
            await trio.sleep(_SIZES_SECONDS)

    def entries(self) -> dict[str, bytes]:
        """This node's offers as they are to be gossiped now."""
        found = {}
        for profile in self._current.cookbook.profiles:
            offer = self._offer(profile)
            known = self._encoded.get(profile.key)
            if known is None or known[0] != offer:
                known = self._encoded[profile.key] = (offer, encode(offer))
            found[OFFER_PREFIX + profile.key] = known[1]
        return found

    def news(self, asker: str) -> News:
        """The answer to a probe."""
        profiles: dict[str, Situation] = {}
        for profile in self._current.cookbook.profiles[:_MOST_PROFILES]:
            situation = self._router.situation(profile.key, asker)
            if situation != IDLE:
                profiles[profile.key] = situation
        return News(
            node_id=self._current.settings.node_id,
            closed=self._dispatch.closed or self._unwilling(),
            profiles=profiles,
            summary=self._summary(),
        )

    def _offer(self, profile: Profile) -> Offer:
        key = profile.key
        learned = self._learned.of(key)
        before, load_ms, tps = self._told.get(key, (Told(), 0.0, 0.0))
        now = told(before, self._router.speeds(key))
        load_ms, tps = steady(load_ms, learned.load_seconds * 1000), steady(tps, learned.tokens_per_second)
        self._told[key] = (now, load_ms, tps)
        status = self._status(profile)
        return Offer(
            model=profile.model,
            profile=profile.id,
            kind=profile.kind,
            aliases=self._current.cookbook.aliases_of(profile.model)[:64],
            description=profile.model_description[:4096],
            profile_description=profile.description[:4096],
            idle_timeout_seconds=profile.idle_timeout_seconds,
            fingerprint=self.fingerprint(profile),
            runs=profile.max_instances != 0,
            # Queued, loading and unloaded follow each other too fast to be worth telling everybody.
            status=status if status in ("loaded", "failed") else "unloaded",
            n_ctx=learned.n_ctx,
            n_ctx_train=learned.n_ctx_train,
            context_length=learned.context_length,
            n_slots=learned.n_slots,
            max_instances=self._pool.max_instances(profile),
            load_ms=load_ms,
            service_ms=now.service_ms,
            prefill_ms=now.prefill_ms,
            decode_ms=now.decode_ms,
            output_tokens=now.output_tokens,
            sharing=now.sharing,
            requests=_power_of_two(self._router.confirmed(key)),
            tps=tps,
        )

    def fingerprint(self, profile: Profile) -> str:
        """Of what comes out: the name and size of the weights, and the arguments that matter."""
        source = profile.source
        match source:
            case ModelPath(path):
                name = f"{PurePath(path).name} {self._sizes.get(path, '')}"
            case HubFile(repo, file):
                name = f"{repo} {file or ''}"
            case UrlFile(url, sha256):
                name = sha256 or url
            case _:
                name = ""
        words = [profile.kind, name, *sorted(_with_meaning(profile.arguments))]
        return hashlib.sha256("\0".join(words).encode()).hexdigest()[:32]


def _power_of_two(number: float) -> int:
    """The one at or below it, 0 below 1: a number that is told to everybody had better seldom change."""
    return 1 << (int(number).bit_length() - 1) if number >= 1 else 0


def _sizes(paths: list[str]) -> dict[str, int]:
    found = {}
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            found[path] = Path(path).stat().st_size
    return found


def _with_meaning(arguments: tuple[str, ...]) -> list[str]:
    kept, skip = [], 0
    for argument in arguments:
        if skip:
            skip -= 1
            continue
        name, equals, _ = argument.partition("=")
        if name in _WITHOUT_MEANING:
            skip = 0 if equals else _WITHOUT_MEANING[name]
            continue
        kept.append(argument)
    return kept
