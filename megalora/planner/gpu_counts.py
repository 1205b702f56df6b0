"""Find the smallest number of GPUs on which a model fits."""

from collections.abc import Iterator

from megalora.planner.layouts import enumerate_layouts
from megalora.planner.memory import fullest_stage
from megalora.planner.question import Question
from megalora.planner.weights import PlannedModel

MOST_GPUS = 1024
"""The largest number that is tried for a model that does not fit fewer."""


def fits_from(question: Question, lora_rank: int) -> int | None:
    """The smallest number of GPUs, of those that are rented, on which a layout fits; None where
    none of up to ``MOST_GPUS`` does."""
    model = PlannedModel.of(question.shape, question.lora_of_rank(lora_rank))
    for num_gpus in rented(question.machine.ranks_per_node):
        if _fits(question, model, num_gpus):
            return num_gpus
    return None


def rented(ranks_per_node: int) -> Iterator[int]:
    """Numbers of GPUs to try: powers of two within a node, then whole nodes, each power of two and
    one and a half times as many. With eight in a node 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, ..."""
    size = 1
    while size < ranks_per_node:
        yield size
        size *= 2
    nodes = 1
    while nodes * ranks_per_node <= MOST_GPUS:
        yield nodes * ranks_per_node
        # 2, 3, 4, 6, 8, 12: from a power of two by a half, from between two of them by a third.
        if nodes & (nodes - 1) == 0:
            nodes += max(1, nodes // 2)
        else:
            nodes += nodes // 3


def _fits(question: Question, model: PlannedModel, num_gpus: int) -> bool:
    """Whether any layout fits: one with the smallest microbatch and everything recomputed, which
    needs least."""
    found = enumerate_layouts(
        question.shape, num_gpus, question.work, micro_batch_sizes=(1,), recompute=("full",)
    )
    limit = question.machine.memory_bytes
    for layout in found.legal:
        if fullest_stage(model, layout, question.work).peak_bytes <= limit:
            return True
    return False


def words_of(num_gpus: int) -> str:
    """``1 GPU``, ``8 GPUs``."""
    return "1 GPU" if num_gpus == 1 else f"{num_gpus:,} GPUs"
