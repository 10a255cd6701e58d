"""Every wait of a request before an upstream is chosen; where this machine and the mesh meet."""

from llamesh.dispatch.dispatch import Dispatch
from llamesh.dispatch.ticket import Ticket

__all__ = ["Dispatch", "Ticket"]
