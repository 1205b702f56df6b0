"""A row of results that no run measured, and a prediction for it."""

from megalora.bench.rows import PARTS, Predicted
from megalora.config import RunConfig

MEASURED = dict(
    layout="", num_ranks=2, routing="balanced", weights="random", tokens="random",
    sequence_length=100, global_batch_size=8,
    step_seconds=0.5, step_seconds_min=0.4, step_seconds_max=0.7, tokens_per_second_per_gpu=808.0,
    model_tflops=1.5,
    hardware_tflops=2.0, parts=dict.fromkeys(PARTS, 0.06), slowest_stage=0,
    parts_mean=dict.fromkeys(PARTS, 0.06),
    parts_per_rank=[dict.fromkeys(PARTS, 0.06)] * 2, marked_step_seconds=0.54, stages=[0, 0],
    peak_bytes=[2**30, 3 * 2**30],
    reserved_bytes=None, memory_from="live tensors", imbalance=1.25, imbalance_worst=1.5, loss=7.0,
    device="CPU", versions={},
)  # fmt: skip
"""A measured row of two ranks as ``measure`` writes it; nine parts of 0.06 s make the marked step
of 0.54 s."""


def predicted(config: RunConfig, num_ranks: int) -> Predicted | None:
    """Stands in for the planner, which predicts nothing for worlds of other sizes than two."""
    if num_ranks != 2:
        return None
    return Predicted(0.4, 2 * 2**30, {"attention": 0.3, "other": 0.1}, "a guess")
