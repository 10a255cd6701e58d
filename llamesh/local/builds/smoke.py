"""Does a build work? Asked before anybody is served by it.

1. `--version` answers.
2. It loads a tiny model, and generates.
3. It keeps conversations apart. Several are led in turns, two at a time, over fewer slots than there are
   conversations, so that each is put away into the cache in host memory and taken back. What it says must be
   what another process says that leads them one after the other with nothing kept. A build that says
   something else is tried without that cache (`--cache-ram 0`), and is used like that if it helps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from llamesh.local.builds.failure import BuildFailed
from llamesh.local.builds.tools import run_tool
from llamesh.local.builds.trial_server import STAGE, TrialServer, top_gap, trial_server

NO_CACHE = ("--cache-ram", "0")

_VERSION_SECONDS = 60.0

_CONVERSATIONS = 5
_TURNS = 3
_SLOTS = 2
_TOKENS = 12
_CONTEXT = 4096

# Another order of the sums (a batch of two, another kernel) may turn a choice between two tokens that are
# this close, in natural logarithms; the rest of such an answer isn't compared.
_TIE = 0.25


@dataclass(frozen=True, slots=True)
class _Turn:
    """One prompt of a conversation, and what is said to it when nothing else goes on."""

    prompt: str
    answer: str
    sure: int  # so many letters of it can't have been otherwise


async def smoke_test(
    binary: Path, model: Path, environ: Mapping[str, str], say: Callable[[str], None]
) -> tuple[str, ...]:
    """Try `binary` with `model`, the tiny one. The arguments that it must always be run with, mostly none.

    Raises BuildFailed for a build that can't be used. `say` is told what goes on.
    """
    await run_tool([str(binary), "--version"], stage=STAGE, environ=environ, limit=_VERSION_SECONDS)
    said = await run_tool([str(binary), "--help"], stage=STAGE, environ=environ, limit=_VERSION_SECONDS)
    common = ["-m", str(model), "-c", str(_CONTEXT)]
    # Only the last 200 lines are kept; asking for it is surer than looking for it there.
    knows = any("--cache-ram" in line for line in said) or await _takes(binary, NO_CACHE, environ)
    no_cache = NO_CACHE if knows else ()
    say("loading a tiny model and generating with it")
    async with trial_server(binary, [*common, "-np", "1", *no_cache], environ) as server:
        conversations = [await _lead_alone(server, number) for number in range(_CONVERSATIONS)]
    say("interleaving conversations and comparing")
    mixed = await _mixed_up(binary, [*common, "-np", str(_SLOTS)], environ, conversations)
    if not mixed:
        return ()
    if no_cache:
        say(f"it mixes up conversations ({mixed}); trying it without the prompt cache in host memory")
        again = await _mixed_up(binary, [*common, "-np", str(_SLOTS), *no_cache], environ, conversations)
        if not again:
            return NO_CACHE
        mixed = again
    even = ", even without the prompt cache in host memory" if no_cache else ""
    raise BuildFailed(
        STAGE, f"it mixes up conversations{even}: {mixed}", command=" ".join([str(binary), *common])
    )


async def _takes(binary: Path, arguments: Sequence[str], environ: Mapping[str, str]) -> bool:
    """Whether it accepts arguments; `--version` ends it before it does anything else."""
    try:
        await run_tool(
            [str(binary), *arguments, "--version"], stage=STAGE, environ=environ, limit=_VERSION_SECONDS
        )
    except BuildFailed:
        return False
    return True


def _opening(number: int) -> str:
    """Conversations begin alike, as those under one system prompt do, and then each has words of its own."""
    first, second = "abcdefghij"[number], "qrstuvwxyz"[number]
    words = " ".join(first * (place % 5 + 2) + second for place in range(30))
    return f"You are a careful helper. {words}\n"


async def _lead_alone(server: TrialServer, number: int) -> list[_Turn]:
    turns: list[_Turn] = []
    prompt = _opening(number)
    for turn in range(_TURNS):
        reply = await server.ask("/completion", _question(prompt, cache=False))
        answer = _content(server, reply)
        turns.append(_Turn(prompt, answer, _sure_letters(reply, answer)))
        prompt += f"{answer}\nuser {number}.{turn}: and then?\n"
    return turns


async def _mixed_up(
    binary: Path,
    arguments: Sequence[str],
    environ: Mapping[str, str],
    conversations: Sequence[Sequence[_Turn]],
) -> str:
    """Which turn was answered otherwise than alone, "" for none."""
    found: list[str] = []
    async with trial_server(binary, arguments, environ) as server:

        async def ask(number: int, turn: int) -> None:
            expected = conversations[number][turn]
            said = _content(server, await server.ask("/completion", _question(expected.prompt, cache=True)))
            if said[: expected.sure] != expected.answer[: expected.sure]:
                found.append(
                    f"turn {turn + 1} of conversation {number + 1}: {said!r} instead of {expected.answer!r}"
                )

        failures: list[BuildFailed] = []
        for turn in range(_TURNS):
            for first in range(0, _CONVERSATIONS, _SLOTS):
                async with trio.open_nursery() as nursery:
                    for number in range(first, min(first + _SLOTS, _CONVERSATIONS)):
                        nursery.start_soon(_collect, ask, number, turn, failures)
                if failures:
                    raise failures[0]
    return found[0] if found else ""


async def _collect(
    ask: Callable[[int, int], Any], number: int, turn: int, failures: list[BuildFailed]
) -> None:
    try:
        await ask(number, turn)
    except BuildFailed as failure:
        failures.append(failure)


def _question(prompt: str, *, cache: bool) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "n_predict": _TOKENS,
        "temperature": 0,
        "seed": 1,
        "n_probs": 2,
        "cache_prompt": cache,
    }


def _content(server: TrialServer, reply: Any) -> str:
    content = reply.get("content") if isinstance(reply, dict) else None
    if not isinstance(content, str) or not content:
        raise server.failed("it loads a tiny model but generates nothing with it")
    return content


def _sure_letters(reply: Mapping[str, Any], answer: str) -> int:
    """How much of an answer is no matter of rounding. Each token of the tiny model is one letter."""
    for place, choice in enumerate(reply.get("completion_probabilities") or ()):
        if isinstance(choice, Mapping) and top_gap(choice) < _TIE:
            return place
    return len(answer)
