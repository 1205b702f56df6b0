"""What happens where a completion cannot be judged: the run ends, or goes on without it."""

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

from megalora.wording import shorten

Policy = Literal["stop", "leave_out"]
SHOWN = 5
"""Failures of a reward that are shown one by one; a run may have thousands of the same."""


class Failures:
    """Counts what failed, by its path."""

    def __init__(self, policy: Policy = "stop", say: Callable[[str], None] | None = None) -> None:
        """
        Args:
            policy: ``stop`` raises; ``leave_out`` counts and says it.
            say: takes a line for the log; the standard error by default.
        """
        self.policy = policy
        self.counts: Counter[str] = Counter()
        self._say = say or _to_stderr

    def met(self, option: str, path: str, reason: str, row: dict[str, Any]) -> None:
        """Something could not be judged.

        Args:
            option: the option that names ``path``.
            reason: what went wrong, in one line.
            row: of the data, which is shown.
        Raises:
            ValueError: with all of this, where the policy is ``stop``.
        """
        line = f"{option}: {path}: {reason}; row {shorten(row)}"
        if self.policy == "stop":
            raise ValueError(f"{line}\n  Set rl.reward_failure=leave_out to go on without it.")
        # Beside the log, for whoever asks in the end.
        self.counts[path] += 1
        count = self.counts[path]
        if count <= SHOWN:
            self._say(f"left out: {line}")
        # Then at every power of two, so that a reward that always fails is still seen.
        elif count & (count - 1) == 0:
            self._say(f"left out: {option}: {path}: {count:,} completions so far, last: {reason}")


def _to_stderr(line: str) -> None:
    print(f"megalora: {line}", file=sys.stderr)
