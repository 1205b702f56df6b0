"""Add up seconds by part of a step, each part with how it is known."""

from dataclasses import dataclass, field

from megalora.planner.hardware import BASES, Basis, weakest


@dataclass(frozen=True)
class Time:
    """One part of a step."""

    name: str
    seconds: float
    basis: Basis


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the stage that works longest; the other stages wait for it."""

    stage: int
    parts: tuple[Time, ...]

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts)

    def by_part(self) -> dict[str, float]:
        """Name of each part -> its seconds."""
        return {part.name: part.seconds for part in self.parts}

    @property
    def basis(self) -> Basis:
        """How the whole is known: as its least known parts are, a tenth of the time or more taken
        together."""
        by_basis = dict.fromkeys(BASES, 0.0)
        for part in self.parts:
            by_basis[part.basis] += part.seconds
        # From the least known: an assumed hundredth does not make a measured step assumed.
        so_far = 0.0
        for basis in reversed(BASES):
            so_far += by_basis[basis]
            if so_far >= 0.1 * self.seconds:
                return basis
        return "measured"

    def __getitem__(self, name: str) -> float:
        """Seconds of the part of that name; 0 where a layout has none."""
        return self.by_part().get(name, 0.0)


@dataclass
class Ledger:
    """Adds up seconds by part."""

    seconds: dict[str, float] = field(default_factory=dict)
    bases: dict[str, Basis] = field(default_factory=dict)
    hidden_flops: float = 0.0
    """FLOPs of products inside passes that wait for memory: they take no time of their own."""

    def add(self, name: str, seconds: float, basis: Basis) -> None:
        """Add to a part, which from then on is known no better than what was added."""
        if seconds <= 0:
            return
        # The comparison first: nearly always the basis is the same, and a search adds often.
        before = self.bases.get(name)
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        if before is None:
            self.bases[name] = basis
        elif before != basis:
            self.bases[name] = weakest((before, basis))

    def take(self, other: "Ledger", times: float = 1.0, before: str = "") -> None:
        """Add another's parts, ``before`` in front of their names."""
        self.hidden_flops += times * other.hidden_flops
        for part, seconds in other.seconds.items():
            self.add(before + part, times * seconds, other.bases[part])

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def parts(self) -> tuple[Time, ...]:
        """The parts in the order in which they were first added to."""
        # A dict keeps the order in which its keys came.
        parts = []
        for name, seconds in self.seconds.items():
            parts.append(Time(name, seconds, self.bases[name]))
        return tuple(parts)
