"""Which node serves a request: the one where the answer is expected soonest.

`core.cost` says what each candidate costs. The choice among them:

1. Whoever is excluded (by the caller: a breaker is open, it was tried already), whose context is
   shorter than the prompt, or who can't serve at all, is out, with a reason.
2. The lowest total wins.
3. Near-ties stay here: another node must be better by more than the error of the estimate, since a
   forward costs a link that can break, and warms a second cache. What is uncertain is the work; a wait
   is counted in whole requests, and a line that is shorter by one is shorter, so it adds no tolerance.
   (Measured on the model in tests/core/nodes.py, a share of the wait, too, keeps one request too many
   in the line here, which costs all of them another round: p95 1.25 instead of 1.0 x the best split.)
4. Among peers that are as good as equal, the one with the fewest forwards of ours that its news
   doesn't contain yet; among equals in that, the one that has most of the prompt in its cache; then one
   by a hash of its id and the request's number, so that several entry nodes with the same news don't all
   pick the same one.
5. A prompt that is too long for everybody is served here, if at all: the engine's own answer
   to it is better than ours, and the number of tokens was an estimate.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from zlib import crc32

import msgspec

from llamesh.core.cost import UNKNOWN, Features, Outlook, Terms, expected, impossible, typical

# A forward adds about a millisecond, and its estimate is off by a few. The share is small, since it keeps
# as much of the load here: 0.1 makes 8 slots that work for 64 clients 10 % slower at p95 than 0.05 does.
TIE_MS = 5.0
TIE_SHARE = 0.05

# The news on which a choice rests is up to a second old, and turning the request away costs another
# round trip: only a wait that is clearly worse than the second best is worth that.
_MARGIN = 1.5
_LEAST_WAIT_MS = 100.0


class Choice(msgspec.Struct, frozen=True):
    """node: who serves it, "" = here, None = nobody; terms: what that costs, None with nobody;
    considered: everybody's terms, those of who can't be had with the reason in `why_not`.
    """

    node: str | None
    terms: Terms | None
    considered: tuple[Terms, ...]

    @property
    def none(self) -> bool:
        """Whether nobody can serve it."""
        return self.node is None

    def reasons(self) -> str:
        """Why those can't serve it who can't, for an error message; "" when there is nobody at all."""
        return "; ".join(f"{one.node or 'here'}: {one.why_not}" for one in self.considered if one.why_not)

    def text(self) -> str:
        """One line for people: the choice, and what everybody would have cost, the best first."""
        chosen = "nobody" if self.node is None else self.node or "here"
        ranked = sorted(self.considered, key=lambda terms: terms.total)
        return " | ".join([chosen, *(terms.text() for terms in ranked)])


def route(
    here: Outlook | None,
    peers: Sequence[Outlook],
    features: Features,
    *,
    excluded: Collection[str] = (),
    tie_ms: float = TIE_MS,
    tie_share: float = TIE_SHARE,
) -> Choice:
    """Choose. `here`: None when this node doesn't have the profile.

    `excluded`: node ids ("" = here), or a mapping from them to reasons for people. `tie_ms`,
    `tie_share`: how much more than the best peer this node may cost and still be chosen: milliseconds,
    and a share of the peer's cost without its wait, whichever is more; among peers only `tie_ms` counts.
    """
    candidates = peers if here is None else (here, *peers)
    others = UNKNOWN
    for one in candidates:
        # What is 0 is unknown; a load is None where there can't be one.
        knows = one.service_ms and one.prefill_ms_per_token and one.decode_ms_per_token
        if one.trust < 1 or not knows or one.load_ms == 0:
            others = typical(candidates)
            break
    considered = []
    prompt = features.prompt_tokens
    mine: Terms | None = None
    best, tolerance = math.inf, 0.0
    for one in candidates:
        node = one.node
        if node in excluded:
            considered.append(
                impossible(node, excluded[node] if isinstance(excluded, Mapping) else "it was excluded")
            )
            continue
        if 0 < one.n_ctx < prompt:
            considered.append(
                impossible(node, f"its context of {one.n_ctx} tokens is below the prompt's {prompt} or so")
            )
            continue
        terms = expected(one, features, others)
        considered.append(terms)
        if one is here:
            if not terms.why_not:
                mine = terms
        elif terms.total < best:
            best, tolerance = terms.total, (terms.total - terms.wait) * tie_share
    everybody = tuple(considered)
    if mine is not None and mine.total <= best + max(tie_ms, tolerance):
        return Choice("", mine, everybody)
    if best < math.inf:
        terms = _spread(candidates, everybody, best + tie_ms, features)
        return Choice(terms.node, terms, everybody)
    if here is not None and 0 < here.n_ctx < prompt and "" not in excluded:
        terms = expected(here, features, others)
        if not terms.why_not:
            return Choice("", terms, (terms, *everybody[1:]))
    return Choice(None, None, everybody)


def _spread(
    candidates: Sequence[Outlook], considered: Sequence[Terms], most: float, features: Features
) -> Terms:
    """Of the peers that cost `most` at the most, the one whose turn it is."""
    number, cached = features.number, features.cached
    equals = [
        (one.sent, terms)
        for one, terms in zip(candidates, considered, strict=True)
        if terms.total <= most and one.node
    ]
    if len(equals) == 1:
        return equals[0][1]
    # Not str's own hash: it differs from process to process.
    return min(
        equals,
        key=lambda e: (
            e[0],
            -cached.get(e[1].node, 0),
            hash((crc32(e[1].node.encode()), number)),
            e[1].node,
        ),
    )[1]


def max_wait_ms(choice: Choice) -> int | None:
    """How long the chosen node may let the request wait for a slot, in milliseconds, until somebody
    else would have been the better choice; None when there is nobody else.
    """
    chosen = choice.terms
    if chosen is None:
        return None
    second = math.inf
    for terms in choice.considered:
        if terms is not chosen and terms.total < second:
            second = terms.total
    if second == math.inf:
        return None
    # What isn't waiting costs the same, however long the wait is.
    rest = chosen.total - chosen.wait
    return math.ceil(max(second * _MARGIN - rest, chosen.wait * _MARGIN, _LEAST_WAIT_MS))
