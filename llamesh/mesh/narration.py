"""What the log says of the mesh's members."""

from __future__ import annotations

from llamesh.core.membership import Contested, Died, Event, Joined, Left, Recovered, Restarted, Suspected
from llamesh.telemetry.logs import get_logger

log = get_logger("mesh")


def narrate(event: Event) -> None:
    """One line of the log for each event that says something."""
    match event:
        case Joined(node) | Restarted(node):
            log.info("peer joined", peer=node)
        case Recovered(node):
            log.info("peer recovered", peer=node)
        case Suspected(node):
            log.info("peer doesn't answer", peer=node)
        case Died(node):
            log.warning("peer lost", peer=node)
        case Left(node):
            log.info("peer left", peer=node)
        case Contested(node, epoch):
            log.warning(
                "another life of this node was heard of; once is a clock that was set back, again and "
                "again is a second node with this node_id",
                node=node,
                epoch=epoch,
            )
