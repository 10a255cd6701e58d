"""What the parts of a build raise."""

from __future__ import annotations

from collections.abc import Sequence

FETCH = "fetching the source"


class BuildFailed(Exception):
    """A build, or the look for a newer commit, came to nothing; the engine in use isn't touched.

    `stage`: what was being done. `command`: what was run, "" for none, with passwords hidden; `exit_code`:
    its, None where it didn't run or end; `last_lines`: the end of its output.
    """

    def __init__(
        self,
        stage: str,
        reason: str,
        *,
        command: str = "",
        exit_code: int | None = None,
        last_lines: Sequence[str] = (),
    ) -> None:
        super().__init__(f"{stage}: {reason}")
        self.stage = stage
        self.reason = reason
        self.command = command
        self.exit_code = exit_code
        self.last_lines = tuple(last_lines)

    def report(self) -> str:
        """All of it, for a terminal."""
        lines = [str(self)]
        if self.command:
            lines.append(f"command: {self.command}")
        return "\n".join([*lines, *(f"  | {line}" for line in self.last_lines)])


class TriedBefore(BuildFailed):
    """The newest commit is one that failed already: nothing was done."""
