"""Tell from the ranks' beats who is lost, and whether a world hangs. No clock, no store."""

import json
import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

from megalora.json_text import parse_json

SHOWN = 8
"""Number of ranks that a line names."""


@dataclass(frozen=True)
class Beat:
    """What a rank writes every ``PERIOD_S``."""

    count: int
    """Number of beats before it; a rank that lives counts on."""
    host: str
    moves: int = 0
    """Number of phases begun; a rank that works begins another."""
    step: int = 0
    phase: str = "load"
    limit_s: float | None = None
    """Seconds that the phase may take; None where nothing is known."""
    place: str = ""
    """Where the main thread is: file, line and function."""
    waits: bool = False
    """Whether that is a call of torch.distributed, which waits for other ranks."""
    left: bool = False
    """Whether the rank has ended by itself; its last beat."""
    table: str = ""
    """Table of processes that has the rank's, such as that of its host."""
    pid: int = 0
    born: str = ""
    """The rank's process there, see ``process_table.py``."""

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def decode(written: bytes) -> "Beat":
        return Beat(**parse_json(written))


class Verdict(NamedTuple):
    """Why a run ends."""

    lost: list[int]
    """Ranks that cannot speak for themselves."""
    text: str
    """For the user."""
    hangs: bool = False
    """Whether all ranks live: their stacks say more."""

    def encode(self) -> str:
        return json.dumps(self._asdict())

    @staticmethod
    def decode(written: bytes) -> "Verdict":
        return Verdict(**parse_json(written))


class Judge:
    """Remembers when each rank was last heard and when one last moved.

    Args:
        silent_s: seconds without a new beat after which a rank is lost.
        alarmed_s: the same once a back end has reported an error.
        blink_s: gap between two looks above which the judge itself was not running, so that its
            clock says nothing about others.
        sees_all: whether it is shown the beats of all ranks.
    """

    def __init__(
        self, silent_s: float, alarmed_s: float, blink_s: float, *, sees_all: bool = True
    ) -> None:
        self.sees_all = sees_all
        self.silent_s = silent_s
        self.alarmed_s = alarmed_s
        self.blink_s = blink_s
        self._beats: dict[int, Beat] = {}
        self._heard_s: dict[int, float] = {}
        self._moved_s = -math.inf
        self._looked_s = -math.inf
        self.late: set[int] = set()
        """Ranks that were silent for too long at the last look."""

    def look(self, beats: dict[int, Beat], now_s: float, *, alarmed: bool) -> Verdict | None:
        """Take in the latest beat of each rank; returns a verdict once there is one."""
        gap_s = now_s - self._looked_s
        self._looked_s = now_s
        # This process was stopped or starved: the others could not be heard meanwhile.
        if gap_s > self.blink_s:
            for rank in self._heard_s:
                self._heard_s[rank] += gap_s
            self._moved_s += gap_s
        for rank, beat in beats.items():
            before = self._beats.get(rank)
            if before is None or beat.moves != before.moves:
                self._moved_s = now_s
            if before is None or beat.count != before.count:
                self._heard_s[rank] = now_s
            self._beats[rank] = beat
        limit_s = self.alarmed_s if alarmed else self.silent_s
        verdict = self._find_lost(now_s, limit_s)
        # Who sees a part of the ranks cannot tell whether another one moves.
        if verdict is None and self.sees_all:
            verdict = self._find_hanging(now_s)
        return verdict

    def _find_lost(self, now_s: float, limit_s: float) -> Verdict | None:
        late = set()
        for rank, beat in self._beats.items():
            if not beat.left and now_s - self._heard_s[rank] > limit_s:
                late.add(rank)
        # Late twice: a thread that was held up for the limit is heard at the next look.
        lost = sorted(late & self.late)
        self.late = late
        if not lost:
            return None
        silence_s = max(now_s - self._heard_s[rank] for rank in lost)
        seen = _last_seen(self._beats[lost[0]])
        return Verdict(
            lost, f"lost {_named(lost, self._beats)}: silent for {silence_s:.0f} s, {seen}"
        )

    def _find_hanging(self, now_s: float) -> Verdict | None:
        present = {rank: beat for rank, beat in self._beats.items() if not beat.left}
        # Who is silent will soon be lost, which says more.
        overdue = (now_s - self._heard_s[rank] > self.blink_s / 2 for rank in present)
        if not present or any(overdue):
            return None
        limit_s = 0.0
        for beat in present.values():
            limit_s = max(limit_s, math.inf if beat.limit_s is None else beat.limit_s)
        stuck_s = now_s - self._moved_s
        if stuck_s <= limit_s:
            return None
        least = min(beat.moves for beat in present.values())
        behind = [rank for rank, beat in present.items() if beat.moves == least]
        # Of those furthest behind, who waits for nobody holds the others up.
        held_up = [rank for rank in behind if not present[rank].waits] or behind
        first = present[held_up[0]]
        waiting = "" if len(held_up) == len(present) else "; the others wait"
        return Verdict(
            [],
            f"no rank has moved for {stuck_s:.0f} s in step {first.step + 1}:"
            f" {_named(held_up, present)} in {first.phase}{_at(first)}{waiting}",
            hangs=True,
        )


def verdict_on_dead(beats: dict[int, Beat]) -> Verdict | None:
    """A verdict on ranks whose processes have ended, by their last beats; None where all of them
    have left by themselves."""
    dead = {rank: beat for rank, beat in beats.items() if not beat.left}
    if not dead:
        return None
    lost = sorted(dead)
    return Verdict(lost, f"lost {_named(lost, dead)}: ended, {_last_seen(dead[lost[0]])}")


def _named(ranks: list[int], beats: dict[int, Beat]) -> str:
    """``rank 1 on node-b``, ``ranks 4, 5 on node-b, node-c``."""
    names = ", ".join(str(rank) for rank in ranks[:SHOWN])
    if len(ranks) > SHOWN:
        names += f" and {len(ranks) - SHOWN} more"
    hosts = sorted({beats[rank].host for rank in ranks})
    shown = ", ".join(hosts[:SHOWN])
    return f"rank{'s' if len(ranks) > 1 else ''} {names} on {shown}"


def _last_seen(beat: Beat) -> str:
    return f"last seen in step {beat.step + 1} ({beat.phase}{_at(beat)})"


def _at(beat: Beat) -> str:
    return f", {beat.place}" if beat.place else ""
