"""A clock for tests of what measures time, so that no result depends on the machine."""

from megalora import host


class MadeUpClock:
    """Replaces the clock that ``host.Stopwatch`` reads, until the end of this forked process.

    Args:
        tick: seconds that pass between two looks at it; other time passes only by ``pass_time``.
    """

    def __init__(self, tick: float) -> None:
        self.now = 0.0
        self.tick = tick
        host.Stopwatch.mark = self.look  # type: ignore[method-assign]

    def look(self) -> float:
        self.now += self.tick
        return self.now

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
