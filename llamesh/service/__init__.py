"""What a service manager (systemd, or what speaks its protocols) gives a node, and what it is told in return.

The two protocols are described in sd_listen_fds(3) and sd_notify(3); both are a few environment variables, so
neither needs a library.
"""

from __future__ import annotations

from llamesh.service.environment import BadHandover
from llamesh.service.notifier import Notifier
from llamesh.service.passed import Passed, take_sockets
from llamesh.service.reload import reload_at_hangup

__all__ = ["BadHandover", "Notifier", "Passed", "reload_at_hangup", "take_sockets"]
