"""What the exit code of a command means, the same for all of them."""

from __future__ import annotations

#: Done.
OK = 0
#: Refused, or a file is bad, or something is wrong; the reason is on stderr or in the answer.
FAILED = 1
#: The command line itself can't be understood.
USAGE = 2
#: No node, or no peer, was reached.
UNREACHABLE = 3
#: It didn't come about in the time that was given.
TIMEOUT = 4
