"""Price steps on made-up machines, on which one kind of work alone takes time."""

from dataclasses import replace
from pathlib import Path

from megalora.config import LoRAConfig, ParallelConfig
from megalora.planner.cost import step_time
from megalora.planner.hardware import Constant, Estimate, Kind, Machine, Overhead
from megalora.planner.layouts import ParallelLayout
from megalora.planner.models import load_shape
from megalora.planner.weights import PlannedModel
from megalora.planner.workload import Workload

MODELS = Path(__file__).parents[2] / "configs" / "models"
NOTHING = 1e300
"""A rate at which work takes no time."""
ATTENTION = LoRAConfig(rank=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])


class NoTime:
    def seconds(self, kind: Kind, ranks: int, nodes: int, num_bytes: float) -> Estimate:
        return Estimate(0.0, "measured")


class Count:
    """A network on which a byte takes a second, of one kind of collective."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind

    def seconds(self, kind: Kind, ranks: int, nodes: int, num_bytes: float) -> Estimate:
        return Estimate(num_bytes if kind == self.kind else 0.0, "measured")


FREE = Machine(
    name="free", memory_bytes=2**60, ranks_per_node=8, gemm=Constant(NOTHING),
    grouped_gemm=Constant(NOTHING),
    attention=Constant(NOTHING), attention_backward=Constant(NOTHING), memory=Constant(NOTHING),
    network=NoTime(),
    overhead=Overhead(0.0, 0.0, 0.0, hidden=True, basis="assumed"),
)  # fmt: skip
ARITHMETIC = replace(
    FREE,
    gemm=Constant(1e12),
    grouped_gemm=Constant(1e12),
    attention=Constant(1e12),
    attention_backward=Constant(0.5e12),
)
"""One TFLOP/s of everything, backward of attention twice the forward, as the formula has it."""


def model(lora: LoRAConfig) -> PlannedModel:
    """Qwen3-30B-A3B: 48 layers, hidden 2,048, 32 heads and 4 key/value heads of 128, 128 experts of
    768 features, 8 for each token."""
    return PlannedModel.of(load_shape(MODELS / "qwen3_30b_a3b.yaml"), lora)


def seconds(lora: LoRAConfig, machine: Machine, ranks: int = 1, batch: int = 8,
            recompute: str = "off", micro: int = 1, **sizes: int) -> float:  # fmt: skip
    layout = ParallelLayout(
        parallel=ParallelConfig(**sizes),
        num_ranks=ranks,
        recompute=recompute,
        micro_batch_size=micro,
    )  # pyright: ignore
    work = Workload(sequence_length=4096, global_batch_size=batch)
    return step_time(model(lora), layout, work, machine).seconds
