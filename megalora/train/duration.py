"""Count the steps of a run, and say where they are not the epochs that were asked for."""

import math

from megalora.config import TrainConfig


def num_steps(options: TrainConfig, num_samples: int) -> int:
    """Optimizer steps of a run on ``num_samples`` samples: epochs in whole steps, at least one.

    Raises:
        ValueError: the warm-up is longer than that, or a trace ends later.
    """
    if options.steps is not None:
        return options.steps
    # TrainConfig has one of the two at least.
    assert options.epochs is not None
    steps = max(1, round(options.epochs * num_samples / options.global_batch_size))
    unit = "step" if steps == 1 else "steps"
    options.check_within(steps, f"the {steps} {unit} of train.epochs={options.epochs:g}")
    return steps


def note(options: TrainConfig, num_samples: int) -> str | None:
    """A line for the user where the steps of the run take more or fewer samples than the epochs
    asked for."""
    if options.epochs is None:
        return None
    # The user may have left the epochs of a shared file in place, or may have forgotten them.
    if options.steps is not None:
        return (
            f"train.steps={options.steps} decides how long the run is; train.epochs="
            f"{options.epochs:g} is not used"
        )
    batch = options.global_batch_size
    wanted = options.epochs * num_samples
    taken = num_steps(options, num_samples) * batch
    if math.isclose(wanted, taken):
        return None
    exact = (
        f"train.epochs={options.epochs:g} of {num_samples:,} samples is {wanted / batch:,.2f} steps"
        f" of {batch}"
    )
    if taken < wanted:
        difference = f"{math.ceil(wanted - taken):,} are left out"
    else:
        difference = f"{math.ceil(taken - wanted):,} more than asked for"
    steps = taken // batch
    return f"{exact}: a run of {steps:,} trains on {taken:,} samples, {difference}"
