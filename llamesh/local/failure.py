"""Why an instance ended that nobody had asked to end, in words for its callers."""

from __future__ import annotations

import re
from dataclasses import dataclass

# What llama-server, its allocators and the kernel write when memory is the reason (b11434).
_OUT_OF_MEMORY = re.compile(
    r"out of memory|unable to allocate|failed to allocate|cudaMalloc failed|OutOfDeviceMemory"
    r"|cannot allocate memory|bad_alloc",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Failure:
    """What happened, the exit code if there is one, and the process's own last words."""

    message: str
    exit_code: int | None
    last_words: str

    def __str__(self) -> str:
        if not self.last_words:
            return self.message
        return f"{self.message}; its last words: {self.last_words}"


def is_out_of_memory(failure: Failure) -> bool:
    """Whether a start failed for want of memory. Exit by SIGKILL counts: the kernel's own answer to it."""
    return failure.exit_code == -9 or bool(_OUT_OF_MEMORY.search(failure.last_words))


def ended(code: int) -> str:
    """An exit code in words; negative ones are signals."""
    return f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
