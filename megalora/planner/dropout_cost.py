"""Say in a line what ``lora.dropout`` costs a run, counted with the planner's formulas: no rate of
a machine is in it."""

from dataclasses import replace

from megalora.config import RunConfig
from megalora.lora.spec import Adapted
from megalora.model.shape import ModelShape
from megalora.planner.cost import step_time
from megalora.planner.hardware import Constant, Estimate, Kind, Machine, Overhead
from megalora.planner.layouts import ParallelLayout
from megalora.planner.memory import GIB, fullest_stage
from megalora.planner.weights import PlannedModel
from megalora.planner.workload import Workload

_NO_TIME = 1e300
"""A rate at which work takes no time."""


class _NoNetwork:
    """Collectives that take no time: dropout changes none."""

    def seconds(self, kind: Kind, ranks: int, nodes: int, num_bytes: float) -> Estimate:
        return Estimate(0.0, "measured")


_IDLE = Machine(
    name="counting", memory_bytes=2**60, ranks_per_node=8,
    gemm=Constant(_NO_TIME), grouped_gemm=Constant(_NO_TIME),
    attention=Constant(_NO_TIME), attention_backward=Constant(_NO_TIME),
    memory=Constant(_NO_TIME), network=_NoNetwork(),
    overhead=Overhead(0.0, 0.0, 0.0, hidden=True, basis="assumed"),
)  # fmt: skip
_BYTES = replace(_IDLE, memory=Constant(1.0))
"""A second for each byte that element-wise passes read or write."""
_FLOPS = replace(
    _IDLE,
    gemm=Constant(1.0),
    grouped_gemm=Constant(1.0),
    attention=Constant(1.0),
    # Backward of attention is counted by its forward's formula, and is twice the work.
    attention_backward=Constant(0.5),
)
"""A second for each operation."""


def dropout_cost(
    config: RunConfig, shape: ModelShape, adapted: list[Adapted], num_ranks: int, *, on_cpu: bool
) -> str:
    """One line: bytes kept for backward on the fullest rank, element-wise traffic and FLOPs of a
    step, each as a multiple of those without dropout.

    Args:
        on_cpu: whether masks are as wide as activations.
    """
    # The run's own layout and lengths, on which the ratios depend.
    layout = ParallelLayout.of(config, num_ranks)
    work = Workload(
        sequence_length=config.data.max_length,
        global_batch_size=config.train.global_batch_size,
        dtype=config.model.dtype,
        sequences=config.objective.sequences,
        on_cpu=on_cpu,
    )
    kept: list[int] = []
    traffic: list[float] = []
    flops: list[float] = []
    for has_dropout in (True, False):
        # The same adapters either way, so that only dropout differs.
        model = PlannedModel(shape, tuple(adapted), has_dropout)
        plan = fullest_stage(model, layout, work)
        kept.append(plan["activations"] + plan["loss"])
        traffic.append(step_time(model, layout, work, _BYTES).seconds)
        flops.append(step_time(model, layout, work, _FLOPS).seconds)
    more, less = (num_bytes / GIB for num_bytes in kept)
    # A CPU composes norms, attention and SwiGLU of more passes, beside which dropout's are fewer.
    whose = " of a GPU's kernels" if on_cpu else ""
    return (
        f"lora.dropout={config.lora.dropout:g} costs, counted:"
        f" {kept[0] / kept[1]:.2f} x the bytes kept for backward ({more:.3g} GiB in place of"
        f" {less:.3g}), {traffic[0] / traffic[1]:.2f} x the element-wise memory traffic{whose} and"
        f" {flops[0] / flops[1]:.3f} x the FLOPs of a step; lora.dropout=0 has none of it"
    )
