"""The text of a scrape, put together without holding up the node.

A mesh with hundreds of models is tens of thousands of lines, which take some tenths of a second to write. So
families come in parts, and between two parts everybody else has their turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import trio
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

_END = b"# EOF\n"


class _One(Collector):
    """A registry with one family in it: all that the library's encoders ask for."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterator[Metric]:
        yield self._metric


async def exposition(families: Iterable[Metric], accept: str = "") -> tuple[str, bytes]:
    """Content type and text, in the format that `Accept` asks for: OpenMetrics, or Prometheus' own.

    `families`: those of one name come one after the other, as parts of one. Each is made and written without
    a checkpoint.
    """
    encode, content_type = _encoder(accept)
    pieces, before, ended = [], "", False
    for family in families:
        text = encode(_One(family))
        if text.endswith(_END):
            ended, text = True, text[: -len(_END)]
        pieces.append(_without_heading(text) if family.name == before else text)
        before = family.name
        await trio.lowlevel.checkpoint()
    if ended:
        pieces.append(_END)
    return content_type, b"".join(pieces)


def _encoder(accept: str) -> tuple[Callable[[Collector], bytes], str]:
    try:
        return choose_encoder(accept)
    except (ValueError, TypeError):  # a version or an escaping that is none
        return choose_encoder("")


def _without_heading(text: bytes) -> bytes:
    while text.startswith(b"# "):
        text = text[text.index(b"\n") + 1 :]
    return text
