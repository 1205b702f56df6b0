"""Compare the length of a run with arithmetic by hand, and check what is said where whole steps do
not fit."""

import pytest

from megalora.config import TrainConfig
from megalora.train.duration import note, num_steps
from megalora.train.optim import learning_rate


# Steps are rounded to the nearest whole one, and at least one: 1.25 to 1, 0.01 to 1, 1.75 to 2.
@pytest.mark.parametrize(
    ("epochs", "samples", "batch", "steps", "line"),
    [
        (
            1.0,
            20,
            16,
            1,
            (
                "train.epochs=1 of 20 samples is 1.25 steps of 16: a run of 1 trains on 16 samples,"
                " 4 are left out"
            ),
        ),
        (
            0.01,
            20,
            16,
            1,
            (
                "train.epochs=0.01 of 20 samples is 0.01 steps of 16: a run of 1 trains on 16"
                " samples, 16 more than"
            ),
        ),
        (
            1.0,
            28,
            16,
            2,
            "is 1.75 steps of 16: a run of 2 trains on 32 samples, 4 more than asked for",
        ),
        (
            2.5,
            1000,
            16,
            156,
            "is 156.25 steps of 16: a run of 156 trains on 2,496 samples, 4 are left out",
        ),
        # Whole steps: nothing to say.
        (2.0, 32, 16, 4, None),
        (0.5, 64, 16, 2, None),
    ],
)
def test_epochs(epochs: float, samples: int, batch: int, steps: int, line: str | None) -> None:
    options = TrainConfig(epochs=epochs, global_batch_size=batch)
    assert num_steps(options, samples) == steps
    said = note(options, samples)
    if line is None:
        assert said is None
    else:
        assert line in str(said)


def test_steps_are_steps() -> None:
    options = TrainConfig(steps=7, global_batch_size=16)
    assert (num_steps(options, 20), note(options, 20)) == (7, None)


def test_steps_win_over_epochs_and_that_is_said() -> None:
    options = TrainConfig(steps=7, epochs=2.0, global_batch_size=16)
    assert num_steps(options, 1000) == 7
    said = "train.steps=7 decides how long the run is; train.epochs=2 is not used"
    assert note(options, 1000) == said


# The rate grows by 1 / warmup a step, so it ends at steps / warmup of what was asked for.
@pytest.mark.parametrize(
    ("steps", "warmup", "share"), [(10, 50, "20%"), (3, 50, "6%"), (10, 11, "91%")]
)
def test_a_warmup_that_never_ends_is_refused(steps: int, warmup: int, share: str) -> None:
    message = (
        f"train.warmup={warmup} is longer than train.steps={steps}: the learning rate would end at"
        f" {share} of train.lr"
    )
    with pytest.raises(ValueError, match=message):
        TrainConfig(steps=steps, warmup=warmup)
    # The steps of an epoch are known only when the samples are counted.
    by_epochs = TrainConfig(epochs=1.0, warmup=warmup, global_batch_size=1)
    message = f"is longer than the {steps} steps of train.epochs=1: .* at {share} of"
    with pytest.raises(ValueError, match=message):
        num_steps(by_epochs, steps)


def test_a_warmup_as_long_as_the_run_reaches_the_rate() -> None:
    # The last of ten steps, counted from 0.
    options = TrainConfig(steps=10, warmup=10, lr=1e-3)
    assert learning_rate(options, 9, 10) == 1e-3
