"""Say what a larger global batch would give where the pipeline's bubble is large."""

from dataclasses import replace

from megalora.planner.question import Question
from megalora.planner.report import range_words
from megalora.planner.search import FULL, Plan, Planned, evaluate
from megalora.planner.weights import PlannedModel
from megalora.planner.workload import Workload

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
    lines = []
    for times in TIMES:
        work = _with_batch(plan.work, times)
        larger = evaluate(model, found.lora_rank, found.layout, work, plan.machine)
        # The rows of a whole step are on the device: a larger step has more of them.
        if plan.share(larger) > FULL:
            continue
        share = larger.time["bubble"] / larger.time.seconds
        # As many times the tokens in the longer step, whatever the rates.
        gains = [100 * (times * found.time.seconds / larger.time.seconds - 1)]
        for before, after in zip(found.by_scenario, larger.by_scenario, strict=True):
            gains.append(100 * (times * before / after - 1))
        lines.append(
            f"train.global_batch_size={work.global_batch_size:,} gives {range_words(gains, '.0f')}"
            f" % more tokens/s (bubble {100 * share:.0f} %)"
        )
    if not lines:
        return None
    return (
        f"the pipeline's bubble is {100 * bubble:.0f} % of a step; the same layout with"
        f" {', with '.join(lines)}"
    )


def _with_batch(work: Workload, times: int) -> Workload:
    """The same training with several times the samples in a step."""
    packing = work.packing.times(times) if work.packing else None
    return replace(work, global_batch_size=times * work.global_batch_size, packing=packing)
