"""What the exit code of a command says, the same for all of them."""

OK = 0
"""It is done."""

FAILED = 1
"""It isn't done: refused, or a bad file. stderr has the reason."""

USAGE = 2
"""A wrong word on the command line."""

UNREACHABLE = 3
"""No node answers there."""

TIMEOUT = 4
"""It isn't done within the time."""

STOPPED = 130
"""Ctrl-C, as the shell counts it: 128 and the signal's number."""
