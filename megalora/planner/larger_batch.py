"""Say what a larger global batch would give where the pipeline's bubble is large."""

from dataclasses import replace

from megalora.planner.layouts import Workload
from megalora.planner.question import Question
from megalora.planner.search import FULL, Plan, Planned, evaluate
from megalora.planner.weights import PlannedModel

LARGE_BUBBLE = 0.1
"""Share of a step from which on the bubble is worth a line."""
TIMES = (2, 4)
"""Multiples of the global batch that are tried."""


def larger_batch_line(question: Question, plan: Plan, found: Planned) -> str | None:
    """What the same layout does with more microbatches a step: a bubble is as long for many as for
    few. None where the bubble is small, or more rows do not fit."""
    bubble = found.time["bubble"] / found.time.seconds
    if bubble < LARGE_BUBBLE:
        return None
    model = PlannedModel.of(question.shape, question.lora_of_rank(found.lora_rank))
    speed = found.tokens_per_second(plan.work)
    gains = []
    for times in TIMES:
        work = _with_batch(plan.work, times)
        larger = evaluate(model, found.lora_rank, found.layout, work, plan.machine)
        # The rows of a whole step are on the device: a larger step has more of them.
        if plan.share(larger) > FULL:
            continue
        gain = larger.tokens_per_second(work) / speed - 1
        share = larger.time["bubble"] / larger.time.seconds
        gains.append(
            f"train.global_batch_size={work.global_batch_size:,} gives {100 * gain:.0f} % more"
            f" tokens/s (bubble {100 * share:.0f} %)"
        )
    if not gains:
        return None
    return (
        f"the pipeline's bubble is {100 * bubble:.0f} % of a step; the same layout with"
        f" {', with '.join(gains)}"
    )


def _with_batch(work: Workload, times: int) -> Workload:
    """The same training with several times the samples in a step."""
    packing = work.packing.times(times) if work.packing else None
    return replace(work, global_batch_size=times * work.global_batch_size, packing=packing)
