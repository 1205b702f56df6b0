"""Say how far a rank is, and for how long it may stay there."""

import math
import time

FACTOR = 5.0
"""Times the longest one so far that a step or an evaluation may take."""
UNLIMITED = frozenset({"load", "merge", "save", "rollout", "close"})
"""Phases whose length nothing bounds: weights come from a slow disk, a save waits there for those
before it and the last one for its own files, and a rollout waits for servers, with limits of its
own."""


class Pulse:
    """Where this rank's main thread is in its run.

    A phase has no limit before its first end: the first step may compile kernels, and what is
    unknown is left to ``train.timeout_minutes``.
    """

    def __init__(self, floor_s: float = math.inf) -> None:
        """``floor_s``: seconds that every phase may take, however short it has been."""
        self.floor_s = floor_s
        self.step = 0
        self.phase = "load"
        self.moves = 0
        """Number of phases begun."""
        self._longest_s: dict[str, float] = {}
        self._began = time.monotonic()

    def at(self, step: int, phase: str) -> None:
        """The rank begins a phase of the step behind ``step`` finished ones."""
        now = time.monotonic()
        longest_s = self._longest_s.get(self.phase, 0.0)
        self._longest_s[self.phase] = max(longest_s, now - self._began)
        self._began = now
        self.step = step
        self.phase = phase
        # Last: the watch takes a higher number for a sign of life.
        self.moves += 1

    @property
    def limit_s(self) -> float | None:
        """Seconds that the present phase may take; None where nothing is known."""
        longest_s = self._longest_s.get(self.phase)
        if longest_s is None or self.phase in UNLIMITED:
            return None
        return max(self.floor_s, FACTOR * longest_s)
