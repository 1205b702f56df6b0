"""Set the planner's choice beside the layout of every published run of LoRA or training that is
known for Qwen3-30B-A3B and gpt-oss, with the reason for each difference.

python -m docs.scripts.published            print the table of docs/planner.md
python -m docs.scripts.published --write    write it there

A reason is written by hand, for one choice: where the planner comes to another, this program stops
and asks for a new reason.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.planner_published import ATTENTION, MODEL
from docs.scripts.sections import fill
from megalora.config import LoRAConfig, ParallelConfig
from megalora.planner.crossings import crossings_of
from megalora.planner.gpus import GPUS
from megalora.planner.layout_table import short_name
from megalora.planner.layouts import ParallelLayout, Recompute
from megalora.planner.memory import GIB
from megalora.planner.models import load_shape
from megalora.planner.report import range_words
from megalora.planner.search import Planned, evaluate, search, why_too_big
from megalora.planner.weights import PlannedModel
from megalora.planner.workload import Workload

PAGE = Path(__file__).parents[1] / "planner.md"
H100 = GPUS["h100"]


@dataclass(frozen=True)
class Case:
    """A published run of Qwen3-30B-A3B, and what the planner is asked instead."""

    who: str
    set_up: str
    """As published."""
    num_gpus: int
    lora: dict[str, Any]
    sequence_length: int
    global_batch_size: int
    theirs: dict[str, int] | None
    """Sizes of their layout; None: not published."""
    choice: str
    """The planner's choice that ``why`` speaks of."""
    why: str
    recompute: Recompute = "off"

    def work(self) -> Workload:
        return Workload(
            sequence_length=self.sequence_length,
            global_batch_size=self.global_batch_size,
            imbalance=1.2,
            crossings=crossings_of(H100.name),
        )

    def chosen(self) -> Planned:
        """The planner's choice; raises ``ValueError`` where it is another than the reason's."""
        plan = search(load_shape(MODEL), LoRAConfig(**self.lora), self.num_gpus, self.work(), H100)
        best = plan.best()
        if short_name(best.layout) != self.choice:
            raise ValueError(
                f"{self.who}: the planner chooses {short_name(best.layout)}, and the reason in"
                f" docs/scripts/published.py is written for {self.choice}: write a new one"
            )
        return best

    def beside(self, chosen: Planned) -> str:
        """What the planner says of their layout: how long it takes, or why it is out."""
        if self.theirs is None:
            return "-"
        layout = ParallelLayout(
            parallel=ParallelConfig(**self.theirs),
            num_ranks=self.num_gpus,
            recompute=self.recompute,
        )
        if layout == chosen.layout:
            return "the same"
        model = PlannedModel.of(load_shape(MODEL), LoRAConfig(**self.lora))
        found = evaluate(model, chosen.lora_rank, layout, self.work(), H100)
        gib = f"{found.memory.peak_bytes / GIB:.1f} GiB"
        if why_too_big(found.memory, H100.memory_bytes):
            return f"does not fit ({gib})"
        pairs = zip(found.by_scenario, chosen.by_scenario, strict=True)
        return f"{range_words([own / best for own, best in pairs], '.2f')} times, {gib}"


CASES = (
    Case(
        "Megatron-Bridge", "LoRA r8, attention only, 4 x H100, 2,048 packed, 733 tokens/s/GPU",
        4, {"rank": 8, "target_modules": ATTENTION}, 2048, 16, {"tp": 4, "ep": 4},
        "dp4 ep2 micro4",
        "TP 4 sends all activations in every layer and leaves a GPU 512 tokens, fewer than the host"
        " can issue work for; halving the experts is all that is needed to fit",
    ),
    Case(
        "ms-swift", "LoRA r8 all-linear, 2 GPUs, 62 GiB", 2, {"rank": 8}, 2048, 16, {"ep": 2},
        "dp2 micro8 full",
        "the rates cannot tell them apart; two whole copies fit where layers are recomputed, and"
        " nobody waits for an all-to-all",
    ),
    Case(
        "Unsloth", "LoRA, 1 GPU, 63 GB", 1, {"rank": 16}, 2048, 8, {}, "micro4 full",
        "four samples in a row share the host's time, for as many bytes at the peak",
        recompute="full",
    ),
    Case(
        "verl (RL)", "LoRA r128, 8 x H100, 33.4 GiB", 8, {"rank": 128}, 4096, 64, None,
        "pp4 vpp4 dp2 micro2 full1+off",
        "6.7 billion adapter parameters with gradients and optimizer: stages share them out, and"
        " nobody waits for an all-to-all; RL leaves room for the sampler, which is not planned",
    ),
    Case(
        "NeMo Automodel", "full training, 8 x H100, 4,096, 12,040 tokens/s/GPU", 8, {"rank": 16},
        4096, 64, {"ep": 8}, "dp8 micro4 full47+off",
        "full training needs EP 8 for the experts' gradients and optimizer; LoRA has none of the"
        " base: a whole copy fits where layers are recomputed, and nobody waits for an all-to-all",
    ),
    Case(
        "Megatron-Bridge", "pre-training, 16 x H100, 4,096, 13,011 tokens/s/GPU", 16,
        {"rank": 16}, 4096, 256, {"ep": 16}, "dp16 ep2 micro2",
        "as before; EP 2 sends a fifth of the bytes, and EP 16 crosses nodes",
    ),
)  # fmt: skip


def table() -> str:
    """The table in Markdown."""
    lines = [
        "| published | their layout | the planner's, for LoRA | theirs, by the planner | why |",
        "|---|---|---|---|---|",
    ]
    for case in CASES:
        chosen = case.chosen()
        theirs = " ".join(f"{name}{size}" for name, size in (case.theirs or {}).items())
        lines.append(
            f"| {case.who}: {case.set_up} | {theirs or '-'} | {short_name(chosen.layout)},"
            f" {chosen.memory.peak_bytes / GIB:.1f} GiB | {case.beside(chosen)} | {case.why} |"
        )
    return "\n".join([*lines, GPT_OSS])


GPT_OSS = (
    "| Megatron-Bridge: gpt-oss-20b, r32, one GPU | - | - | - | not planned: megalora does not"
    " compute gpt-oss |"
)


def page() -> str:
    """docs/planner.md with the table of today."""
    return fill(PAGE.read_text(), {"published": table})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write docs/planner.md")
    if parser.parse_args(arguments).write:
        PAGE.write_text(page())
    else:
        print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
