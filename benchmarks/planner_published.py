"""Compare published figures of LoRA on Qwen3-30B-A3B with what the planner predicts for the same
set-up, as far as it is stated.

None of them was measured with megalora: adapters, kernels and optimizers are others. So a
prediction below a published memory, or above a published speed, proves no error. For Unsloth the
prediction is above the published 63 GB: these leave 2 GB beside 61 GB of bfloat16 weights, which is
too little for all-linear r16 with float32 gradients and Adam (843 million parameters, 18 bytes
each); that run trained less or kept less. What a source leaves open is filled in here, and marked
so. Left out are pre-training and full training (another optimizer, another backward) and gpt-oss
(no architecture here).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalora.config import LoRAConfig, ParallelConfig
from megalora.planner.cost import step_time
from megalora.planner.gpus import GPUS
from megalora.planner.layouts import ParallelLayout, Recompute, check
from megalora.planner.memory import fullest_stage
from megalora.planner.models import load_shape
from megalora.planner.weights import PlannedModel
from megalora.planner.workload import Workload

MODEL = Path("configs/models/qwen3_30b_a3b.yaml")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclass(frozen=True)
class Published:
    """One source's set-up and its figures; whatever is not in ``stated`` is assumed."""

    who: str
    stated: str
    assumed: str
    num_ranks: int
    parallel: dict[str, int]
    lora: dict[str, Any]
    sequence_length: int
    global_batch_size: int
    micro_batch_size: int = 1
    recompute: Recompute = "off"
    gib: float | None = None
    tokens_per_second: float | None = None
    """Rate of one GPU."""

    def plan(self) -> tuple[PlannedModel, ParallelLayout, Workload]:
        """The planner's question for this set-up; raises ``ValueError`` where it is not legal."""
        model = PlannedModel.of(load_shape(MODEL), LoRAConfig(**self.lora))
        work = Workload(
            sequence_length=self.sequence_length, global_batch_size=self.global_batch_size
        )
        layout = ParallelLayout(
            parallel=ParallelConfig(**self.parallel), num_ranks=self.num_ranks,
            micro_batch_size=self.micro_batch_size, recompute=self.recompute,
        )  # fmt: skip
        check(model.shape, layout, work)
        return model, layout, work


# 5.10 s/it at no more than 3,200 tokens/s on each of 2 GPUs are 16 samples of 2048 tokens.
_SWIFT = {
    "who": "ms-swift", "stated": "r8 all-linear, 2 GPUs, EP2, 5.10 s/it", "num_ranks": 2,
    "parallel": {"ep": 2}, "lora": {"rank": 8},
    "sequence_length": 2048, "global_batch_size": 16, "gib": 62.0, "tokens_per_second": 3200.0,
}  # fmt: skip
# ms-swift stands here twice, with two usual settings: its source states neither the microbatch nor
# whether activations were recomputed.
PUBLISHED = [
    Published(
        who="Megatron-Bridge",
        stated="r8 attention only, 4 H100, TP4 EP4, 2048 packed, natural routing",
        assumed="16 samples a step, microbatch 1, no recomputation, even routing",
        num_ranks=4,
        parallel={"tp": 4, "ep": 4},
        lora={"rank": 8, "target_modules": ATTENTION},
        sequence_length=2048,
        global_batch_size=16,
        tokens_per_second=733.0,
    ),
    Published(**_SWIFT, assumed="H100, 16 samples of 2048, microbatch 1, no recomputation"),
    Published(
        **_SWIFT,
        assumed="H100, 16 samples of 2048, microbatch 8, full recomputation",
        micro_batch_size=8,
        recompute="full",
    ),
    Published(
        who="Unsloth",
        stated="1 GPU",
        assumed=(
            "r16 all-linear, 2048, microbatch 1, full recomputation; float32 Adam; its 63 GB are"
            " 58.7 GiB"
        ),
        num_ranks=1,
        parallel={},
        lora={"rank": 16},
        sequence_length=2048,
        global_batch_size=8,
        recompute="full",
        gib=63e9 / 2**30,
    ),
    Published(
        who="verl (RL)",
        stated="r128, 8 H100",
        num_ranks=8,
        parallel={"ep": 8},
        lora={"rank": 128},
        sequence_length=4096,
        assumed=(
            "all-linear, EP8, 4096, microbatch 1, full recomputation, no offloading; its 239.5 s"
            " are mostly generation"
        ),
        global_batch_size=64,
        recompute="full",
        gib=33.4,
    ),
]


def predicted_tokens_per_second(published: Published, machine: str = "h100") -> float:
    """Predicted rate of one GPU, by ``step_time``."""
    model, layout, work = published.plan()
    seconds = step_time(model, layout, work, GPUS[machine]).seconds
    return work.global_batch_size * work.sequence_length / seconds / layout.num_ranks


def rows() -> list[dict[str, Any]]:
    """Published and predicted figures of every source."""
    found = []
    for published in PUBLISHED:
        model, layout, work = published.plan()
        found.append({
            "who": published.who, "stated": published.stated, "assumed": published.assumed,
            "layout": str(layout),
            "published_gib": published.gib,
            "predicted_gib": fullest_stage(model, layout, work).peak_bytes / 2**30,
            "published_tokens_per_second": published.tokens_per_second,
            "predicted_tokens_per_second": predicted_tokens_per_second(published),
        })  # fmt: skip
    return found


def table(found: list[dict[str, Any]]) -> str:
    """A table in Markdown, with a note on what it can show."""
    lines = [
        (
            "| who | stated | assumed by us | GiB published | predicted | tokens/s/GPU published |"
            " predicted |"
        ),
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        gib = row["published_gib"]
        speed = row["published_tokens_per_second"]
        lines.append(
            f"| {row['who']} | {row['stated']} | {row['assumed']} |"
            f" {'-' if gib is None else f'{gib:.1f}'} | {row['predicted_gib']:.1f} |"
            f" {'-' if speed is None else f'{speed:,.0f}'} |"
            f" {row['predicted_tokens_per_second']:,.0f} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            "Not megalora's runs: see benchmarks/planner_published.py for what can be concluded.",
        ]
    )
