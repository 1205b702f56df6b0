"""Say how many steps a run takes, from which the GPU-hours of a data set follow."""

from dataclasses import dataclass

from megalora.data.sources import locate
from megalora.planner.question import Question
from megalora.train.duration import num_steps

BILLION = 10**9


@dataclass(frozen=True)
class TrainingLength:
    """How long a run is, in optimizer steps."""

    num_steps: float
    """A fraction where a number of tokens is trained on."""
    what: str
    """What is trained on, for the user."""


def training_length(question: Question) -> TrainingLength:
    """Steps of the config's run: ``train.steps``, or its epochs of the samples that are known.
    Where nothing is known of the data, a billion tokens."""
    train = question.config.train
    work = question.work
    if train.steps is not None:
        return TrainingLength(train.steps, f"the {train.steps:,} steps of train.steps")
    samples = _num_samples(question)
    if samples is not None:
        steps = num_steps(train, samples)
        return TrainingLength(
            steps, f"train.epochs={train.epochs:g} of {samples:,} samples: {steps:,} steps"
        )
    length = work.packing.mean if work.packing else work.sample_tokens
    return TrainingLength(
        BILLION / (work.global_batch_size * length),
        "a billion tokens (--samples N says how many samples the data has)",
    )


def _num_samples(question: Question) -> int | None:
    """Samples of the data set: as the user says, as they were tokenised, or rows of files that
    are on this machine; None where data has yet to come here."""
    if question.samples is not None:
        return question.samples
    packing = question.work.packing
    if packing is not None and packing.num_samples is not None:
        return packing.num_samples
    # Late: a plan of one number of GPUs reads no data.
    from megalora.data.rows import open_rows

    total = 0
    for source in question.config.data.sources:
        try:
            found = locate(source.path)
        except ValueError:
            # No such file: the plan is made before the data comes.
            return None
        if found.file is None:
            return None
        total += len(open_rows(source.path))
    return total
