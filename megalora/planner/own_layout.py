"""Plan the layout that a config itself names, and say why it is out where it is."""

from dataclasses import dataclass

from megalora.config import ParallelConfig, TrainConfig
from megalora.planner.layouts import ParallelLayout, check
from megalora.planner.question import Question
from megalora.planner.search import Planned, evaluate, why_too_big
from megalora.planner.weights import PlannedModel


@dataclass(frozen=True)
class OwnLayout:
    """The user's layout: in, with its prediction, or out, with the reason."""

    parallel: ParallelConfig
    train: TrainConfig
    layout: ParallelLayout | None
    """None: the sizes do not fill the ranks."""
    planned: Planned | None
    """None: the layout is not legal, and there is nothing to predict."""
    reason: str | None
    """Why it is out, on one line; None where it is not."""


def own_layout(question: Question, num_ranks: int, lora_rank: int) -> OwnLayout:
    """The layout of the config on ``num_ranks`` ranks, whether it can run or not."""
    config = question.config
    p = config.parallel
    layout = None
    try:
        # The checks that a run makes: grids and batch first, then what the model can be split by.
        layout = ParallelLayout.of(config, num_ranks)
        config.check_world(num_ranks)
        check(question.shape, layout, question.work)
    except ValueError as error:
        # ``check`` names the layout, as the row does that the reason belongs to.
        reason = " ".join(str(error).split()).removeprefix(f"{layout}: ")
        return OwnLayout(p, config.train, layout, None, f"not legal: {reason}")
    model = PlannedModel.of(question.shape, question.lora_of_rank(lora_rank))
    planned = evaluate(model, lora_rank, layout, question.work, question.machine)
    too_big = why_too_big(planned.memory, question.machine.memory_bytes)
    reason = None if too_big is None else too_big.reason
    return OwnLayout(p, config.train, layout, planned, reason)
