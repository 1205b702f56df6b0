"""Resume at another layout and on another number of ranks: the same samples, and the values of the
run that was not interrupted; at the same layout bit for bit."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megalora.config import CheckpointConfig, RunConfig
from megalora.train import loop
from megalora.train.loop import train
from tests.distributed.ranks import run_ranks
from tests.parity.runs import make_config, records
from tests.whole_state import whole_state

STEPS = 4
HALF = 2
LIMIT = 1e-5
"""Of values: parameters are compared as they are, moments by the largest of their tensor."""


@dataclass(frozen=True)
class At:
    """A layout on so many ranks."""

    world: int
    sizes: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, world: int, **sizes: Any) -> "At":
        return cls(world, tuple(sizes.items()))

    def __str__(self) -> str:
        return "-".join([str(self.world), *(f"{name}{value}" for name, value in self.sizes)])


ONE = At.of(1)
TWO = At.of(2)
TWO_EP = At.of(2, ep=2)
TWO_CHUNKS = At.of(2, pp=2, vpp=2)
FOUR = At.of(4, tp=2, ep=2)
FOUR_DP = At.of(4)
FOUR_EP = At.of(4, ep=4)
FOUR_PP = At.of(4, pp=2, ep=2)
FOUR_CP = At.of(4, cp=2, ep=2)
FOUR_WIDE = At.of(4, tp=2, ep=4, etp=1)
EIGHT = At.of(8, tp=2, pp=2, ep=2)
EIGHT_EP = At.of(8, tp=2, ep=4)

PAIRS = [
    (FOUR, ONE), (FOUR, TWO), (FOUR, EIGHT),
    (ONE, FOUR), (TWO_EP, FOUR), (EIGHT, FOUR),
    (FOUR_PP, FOUR_EP), (FOUR_CP, TWO_CHUNKS), (TWO_CHUNKS, FOUR_WIDE),
    (FOUR_WIDE, EIGHT_EP), (FOUR_DP, FOUR_CP), (EIGHT_EP, FOUR_DP),
]  # fmt: skip
SAME = [FOUR, FOUR_CP, FOUR_WIDE, TWO_CHUNKS, EIGHT]
# One of each in every run of the tests; the others show the same.
SHORT = [(TWO_EP, FOUR)]


def _train(config: RunConfig) -> list[tuple[int, list[int]]]:
    """Train; (step, samples) of each step that was taken."""
    seen: list[tuple[int, list[int]]] = []
    step_of = loop._train_step

    def watched(run: Any, step: int, **options: Any) -> Any:
        seen.append((step, [int(sample) for sample in run.batches.samples_of_step(step)]))
        return step_of(run, step, **options)

    loop._train_step = watched
    train(config)
    return seen


@dataclass(frozen=True)
class Runs:
    """Runs that are compared; each is made when it is first asked for."""

    tiny: Path
    chats: Path
    folder: Path
    made: dict[At, Any]

    def config(self, at: At, run: Path) -> RunConfig:
        return make_config(
            self.tiny, self.chats, run, dict(at.sizes), steps=STEPS, schedule="cosine", warmup=1
        )

    def whole(self, at: At) -> tuple[Path, Any]:
        """A run that nobody interrupts, saved half-way: its folder and samples."""
        run = self.folder / str(at)
        if at not in self.made:
            config = self.config(at, run)
            saving = CheckpointConfig(dir=str(run), every=HALF)
            self.made[at] = run_ranks(_train, at.world, replace(config, checkpoint=saving))[0]
        return run, self.made[at]

    def resumed(self, before: Path, at: At) -> tuple[Path, Any]:
        """The second half at this layout, likewise."""
        run = self.folder / f"{before.name} then {at}"
        resume = CheckpointConfig(dir=str(run), resume=str(before / f"step_{HALF:06d}"))
        config = replace(self.config(at, run), checkpoint=resume)
        return run, run_ranks(_train, at.world, config)[0]


@pytest.fixture(scope="module")
def runs(tiny: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tiny, chats, tmp_path_factory.mktemp("resume"), {})


def _named(cases: list[tuple[At, At]]) -> list[Any]:
    found: list[Any] = []
    for one, other in cases:
        mark = pytest.mark.slow if (one, other) in SHORT else pytest.mark.long
        found.append(pytest.param(one, other, marks=mark, id=f"{one} to {other}"))
    return found


@pytest.mark.parametrize(("one", "other"), _named(PAIRS))
def test_another_layout_goes_on_with_the_same_run(one: At, other: At, runs: Runs) -> None:
    before, samples = runs.whole(one)
    after, rest = runs.resumed(before, other)
    assert [step for step, _ in rest] == list(range(HALF, STEPS))
    assert rest == samples[HALF:]
    expected = records(before, "loss")[HALF:]
    assert records(after, "loss") == pytest.approx(expected, rel=LIMIT)
    last = f"step_{STEPS:06d}"
    found = whole_state(after / last)
    there = whole_state(before / last)
    assert found.keys() == there.keys()
    for name, value in there.items():
        scale = 1.0 if name.startswith("param.") else max(value.abs().max().item(), 1e-12)
        distance = (found[name] - value).abs().max().item() / scale
        assert distance < LIMIT, (name, distance)


@pytest.mark.long
@pytest.mark.parametrize("at", SAME, ids=str)
def test_the_same_layout_goes_on_bit_for_bit(at: At, runs: Runs) -> None:
    before, samples = runs.whole(at)
    after, rest = runs.resumed(before, at)
    assert rest == samples[HALF:]
    assert records(after, "loss") == records(before, "loss")[HALF:]
    last = f"step_{STEPS:06d}"
    found = whole_state(after / last)
    for name, value in whole_state(before / last).items():
        assert torch.equal(found[name], value), name
