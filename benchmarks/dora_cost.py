"""Count what DoRA adds to LoRA: bytes that a layer keeps, FLOPs of its matrix products, and the
peak of a step, each beside the planner's formula.

    python -m benchmarks.dora_cost

Layers run on the pretended GPU (``tests/pretended``), whose kernels and saved tensors are counted;
steps run on a CPU rank, where every live tensor is (``tests/planner/counted.py``). The exit code is
1 where a layer's count is not the plan's, or a peak is off by more than a hundredth.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import tests.prepare  # noqa: F401  sets up the host before anything from Megatron is imported
from tests.fixtures import write_chats
from tests.planner import counted
from tests.planner.test_counted_layers import NOT_PLANNED, count, planned
from tests.pretended.layer_cases import EVERYTHING, Case

LAYERS = {
    "dense": Case("qwen3", "one rank", EVERYTHING, "off"),
    "MoE": Case("qwen3_moe", "one rank", EVERYTHING, "off"),
    "MoE, selective": Case("qwen3_moe", "one rank", EVERYTHING, "selective"),
    "MoE, tp2 ep2 etp2": Case("qwen3_moe", "tp2 ep2 etp2", EVERYTHING, "off"),
}
"""The second layer of small models, through which backward goes; everything adapted."""
STEPS = {
    "dense": counted.Case(1, {}, model="dense"),
    "MoE": counted.Case(1, {}),
    "MoE, selective": counted.Case(1, {}, recompute="selective"),
}
PLACE = "1"


def layers() -> bool:
    """Print a row for each layer and number; return whether all are as planned."""
    cases = [replace(case, dora=dora) for case in LAYERS.values() for dora in (False, True)]
    found = count(cases)
    print("| layer | | LoRA counted | DoRA counted | more | planned |\n|---|---|--:|--:|--:|--:|")
    right = True
    for title, case in LAYERS.items():
        with_dora = replace(case, dora=True)
        before = found[case.name][PLACE]
        after = found[with_dora.name][PLACE]
        plan_before = planned(case)[PLACE]
        plan_after = planned(with_dora)[PLACE]
        for name, unit in (("kept", "bytes"), ("forward", "FLOPs"), ("backward", "FLOPs")):
            more = after[name] - before[name]
            said = plan_after[name] - plan_before[name]
            right = right and abs(more - said) <= (NOT_PLANNED if name == "kept" else 0)
            print(
                f"| {title} | {name}, {unit} | {before[name]:,} | {after[name]:,} | {more:,} |"
                f" {said:,} |"
            )
    return right


def peaks() -> bool:
    """Print a row for each step; return whether all are within a hundredth of the plan."""
    print("\n| step | | LoRA counted | DoRA counted | more | planned |\n|---|---|--:|--:|--:|--:|")
    right = True
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        chats = write_chats(folder / "chats.jsonl")
        for title, case in STEPS.items():
            (before,) = counted.compare(case, folder, chats)
            (after,) = counted.compare(replace(case, dora=True), folder, chats)
            for name in ("activations", "peak"):
                more = after["found"][name] - before["found"][name]
                said = after["said"][name] - before["said"][name]
                right = right and abs(after["said"][name] / after["found"][name] - 1) < 0.01
                print(
                    f"| {title} | {name}, bytes | {before['found'][name]:,} |"
                    f" {after['found'][name]:,} | {more:,} | {said:,} |"
                )
    return right


if __name__ == "__main__":
    # Both, so that one wrong number does not hide another.
    results = [layers(), peaks()]
    sys.exit(not all(results))
