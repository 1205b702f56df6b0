"""Seconds by part, each part with how it is known."""

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
    """A step of the stage that works longest, which the others wait for."""

    stage: int
    parts: tuple[Time, ...]

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts)

    @property
    def basis(self) -> Basis:
        """Of the whole: the least known of which, with what is known less, it has a tenth or
        more."""
        total = self.seconds
        less_known = 0.0
        for basis in reversed(BASES):
            less_known += sum(part.seconds for part in self.parts if part.basis == basis)
            if less_known >= 0.1 * total:
                return basis
        return "measured"

    def __getitem__(self, name: str) -> float:
        return sum(part.seconds for part in self.parts if part.name == name)


@dataclass
class Ledger:
    """Adds up seconds by part."""

    seconds: dict[str, float] = field(default_factory=dict)
    bases: dict[str, Basis] = field(default_factory=dict)
    hidden_flops: float = 0.0
    """Of products inside passes that wait for memory: they take no time of their own."""

    def add(self, name: str, seconds: float, basis: Basis) -> None:
        if seconds > 0:
            before = self.bases.get(name)
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            if before is None or before != basis:
                self.bases[name] = basis if before is None else weakest((before, basis))

    def take(self, other: "Ledger", times: float = 1.0, before: str = "") -> None:
        """Add another's parts, ``before`` in front of their names."""
        self.hidden_flops += times * other.hidden_flops
        for part, seconds in other.seconds.items():
            self.add(before + part, times * seconds, other.bases[part])

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def parts(self) -> tuple[Time, ...]:
        return tuple(
            Time(name, seconds, self.bases[name]) for name, seconds in self.seconds.items()
        )
