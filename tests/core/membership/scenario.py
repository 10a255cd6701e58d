"""A small language for what happens to a mesh, a line each. Names are node ids; `all` is everybody up.

    start a b c             start these, introduced to whoever was there first
    a sets KEY=JSON         write an own entry; `a deletes KEY`
    run N                   let N rounds pass
    settle [N]              until all that are up agree, within N rounds (30)
    settle a b              until these agree
    cut a b | c d           no message between the groups
    a can't reach b         one way only
    heal                    end all cuts
    crash a                 kill -9; `restart a` starts a new life, `restart a at EPOCH` with that epoch
    freeze a                SIGSTOP; `thaw a`
    a leaves                says it and ends
    clock a +N              set a's clock, which may go back
    weather loss P double P delay LOW HIGH      what happens to messages, in any order; `calm` ends it
    a sees b STATUS         alive, suspect, dead, left, unknown; `a b see c d STATUS` for each pair
    a sees b.KEY=JSON       one entry of b as a sees it; JSON `nothing` if there is none
    a reaches b             directly; `a doesn't reach b` but others do
    a heard EVENT b         since the last `forget`; `a never heard EVENT b`
    forget                  all events so far

Anything after # is a comment.
"""

from __future__ import annotations

import json
import re

from llamesh.core.membership import Options
from tests.core.membership.world import LATENCY, Weather, World


def play(script: str, *, seed: int = 1, options: Options | None = None, world: World | None = None) -> World:
    """Carry out a script; a line that doesn't hold fails with that line and everybody's view."""
    world = world or World(seed, options)
    for number, raw in enumerate(script.splitlines(), 1):
        line = raw.partition("#")[0].strip()
        if line:
            try:
                _step(world, line)
            except AssertionError as error:
                raise AssertionError(f"line {number}: {line}\n{error}\n{world}") from None
    return world


def _step(world: World, line: str) -> None:
    for pattern, act in _VERBS:
        if found := re.fullmatch(pattern, line):
            act(world, *found.groups())
            return
    raise ValueError(f"no such line in the language: {line}")


def _names(world: World, text: str) -> list[str]:
    return [node.id for node in world.up] if text.strip() == "all" else text.split()


def _start(world: World, names: str) -> None:
    ids = names.split()
    there = [node.id for node in world.up]
    for one in ids:
        world.start(one)
    world.introduce([there[0], *ids] if there else ids)


def _restart(world: World, name: str, epoch: str | None) -> None:
    world.crash(name)
    world.start(name, None if epoch is None else int(epoch))
    others = [node.id for node in world.up if node.id != name]
    for one in others[:2]:
        world.nodes[name].membership.introduce(one)


def _settle(world: World, rest: str | None) -> None:
    words = (rest or "").split()
    limit = float(words.pop()) if words and words[-1].isdigit() else 30.0
    world.run_until(lambda: world.agreed(words or None), limit)


def _weather(world: World, text: str) -> None:
    words, weather = text.split(), Weather()
    while words:
        match words:
            case ["loss", share, *words]:
                weather.loss = float(share)
            case ["double", share, *words]:
                weather.double = float(share)
            case ["delay", low, high, *words]:
                weather.delay = (float(low), float(high))
            case _:
                raise ValueError(f"no such weather: {text}")
    world.weather = weather


def _sees(world: World, names: str, whom: str, status: str) -> None:
    for here in _names(world, names):
        for there in _names(world, whom):
            if here != there:
                seen = world.status(here, there)
                assert seen == status, f"{here} sees {there} {seen}"


def _entry(world: World, names: str, owner: str, key: str, value: str) -> None:
    for here in _names(world, names):
        state = world.nodes[here].membership.members()[owner].state
        if value == "nothing":
            assert key not in state, f"{here} sees {owner}.{key} = {state[key]!r}"
        else:
            assert json.loads(state.get(key, b'"nothing"')) == json.loads(value), (
                f"{here}: {state.get(key)!r}"
            )


def _heard(world: World, names: str, never: str | None, event: str, whom: str) -> None:
    for here in _names(world, names):
        kinds = {(type(one).__name__, one.id) for one in world.events(here)}
        for there in _names(world, whom):
            if here != there:
                assert ((event, there) in kinds) is not bool(never), f"{here} heard {sorted(kinds)}"


def _reaches(world: World, here: str, reaches: str, there: str) -> None:
    assert world.nodes[here].membership.members()[there].direct is (reaches == "reaches")


def _forget(world: World) -> None:
    for node in world.nodes:
        world.events(node).clear()


def _calm(world: World) -> None:
    world.weather = Weather(delay=LATENCY)


def _clock(world: World, name: str, by: str) -> None:
    world.nodes[name].skew += float(by)


_N = r"([\w -]+?)"
_VERBS = [
    (r"start (.+)", _start),
    (r"(\S+) sets ([^=]+)=(.+)", lambda w, a, k, v: w.nodes[a].membership.set(k, v.encode())),
    (r"(\S+) deletes (\S+)", lambda w, a, k: w.nodes[a].membership.set(k, None)),
    (r"run (\S+)", lambda w, n: w.run(float(n))),
    (r"settle(?: (.+))?", _settle),
    (r"cut (.+)", lambda w, text: w.cut(*(part.split() for part in text.split("|")))),
    (r"(\S+) can't reach (\S+)", lambda w, a, b: w.blocked.add((a, b))),
    (r"heal", lambda w: w.heal()),
    (r"crash (\S+)", lambda w, a: w.crash(a)),
    (r"restart (\S+)(?: at (\d+))?", _restart),
    (r"freeze (\S+)", lambda w, a: w.freeze(a)),
    (r"thaw (\S+)", lambda w, a: w.thaw(a)),
    (r"(\S+) leaves", lambda w, a: w.leave(a)),
    (r"clock (\S+) ([+-]\S+)", _clock),
    (r"weather (.+)", _weather),
    (r"calm", _calm),
    (rf"{_N} sees? (\w+)\.([^=]+)=(.+)", _entry),
    (rf"{_N} sees? {_N} (alive|suspect|dead|left|unknown)", _sees),
    (r"(\S+) (reaches|doesn't reach) (\S+)", _reaches),
    (rf"{_N} (never )?heard (\w+) {_N}", _heard),
    (r"forget", _forget),
]
