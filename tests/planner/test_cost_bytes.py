"""Compare the bytes of predicted collectives with those of a real step, and the groups that talk
with the numbering of ranks."""

import math
from dataclasses import replace

import pytest

from megalora.config import LoRAConfig, ParallelConfig
from megalora.model.shape import ModelShape
from megalora.planner.cost import step_time
from megalora.planner.hardware import Estimate, Kind
from megalora.planner.layouts import ParallelLayout
from megalora.planner.weights import PlannedModel
from megalora.planner.workload import Workload
from tests.planner.priced import ATTENTION, FREE, Count, seconds


def test_bytes_of_an_all_to_all() -> None:
    """Four for each layer and microbatch: out and back, forward and backward. A token's H elements
    of two bytes go to each of 5.34 ranks, as 8 of 128 experts lie on 8 ranks; and twice 8 bytes for
    each of its experts."""
    # 1 - 112! 120! / (104! 128!) = 0.6674 of the ranks.
    missed = math.prod((112 - i) / (128 - i) for i in range(8))
    rows = round(4096 * 8 * (1 - missed))
    pairs = 4096 * 8 * 8
    counted = seconds(
        LoRAConfig(), replace(FREE, network=Count("all_to_all")), ranks=8, batch=8, ep=8
    )
    # Forward again adds its two.
    assert counted == 48 * (4 * rows * 2048 * 2 + 2 * pairs)
    again = seconds(
        LoRAConfig(),
        replace(FREE, network=Count("all_to_all")),
        ranks=8,
        batch=8,
        ep=8,
        recompute="full",
    )
    assert again == 48 * (6 * rows * 2048 * 2 + 3 * pairs)


def test_bytes_of_gathered_keys_and_values() -> None:
    """Of a row of 4,096 tokens over two ranks: keys and values of 4 heads of 128 in each of 48
    layers, gathered forward and again where attention is recomputed; their gradients scattered
    once."""
    row = 48 * 4096 * 2 * 4 * 128 * 2
    gathers = replace(FREE, network=Count("all_gather"))
    lora = LoRAConfig(rank=16, target_modules=["q_proj"], layers="0-")
    # Updated parameters are gathered too, over the ranks of cp alone.
    others = 48 * 16 * (2048 + 4096) * 2
    assert seconds(lora, gathers, ranks=2, batch=1, cp=2) == row + others
    for level in ("selective", "full"):
        found = seconds(lora, gathers, ranks=2, batch=1, cp=2, recompute=level)
        assert found == 2 * row + others
    scatters = replace(FREE, network=Count("reduce_scatter"))
    # Gradients are float32.
    assert seconds(lora, scatters, ranks=2, batch=1, cp=2) == row + 2 * others
    assert seconds(lora, gathers, ranks=2, batch=2) == others


def test_bytes_of_pipeline_transfers() -> None:
    """A middle stage has two borders, one at an end one; an exchange for each microbatch and chunk,
    and once through all stages."""
    # [tokens, hidden] in bfloat16.
    hidden = 4096 * 2048 * 2
    send = replace(FREE, network=Count("send"))
    # Eight microbatches at two borders, then once through four stages: 1 + 2 + 1 borders.
    assert seconds(ATTENTION, send, ranks=4, batch=8, pp=4) == (8 * 2 + 1 + 2 + 1) * hidden
    assert seconds(ATTENTION, send, ranks=2, batch=8, pp=2, vpp=2) == (8 * 3 + 3 / 2) * hidden


class Groups:
    """A network that writes down who talks to whom."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, int, int]] = set()

    def seconds(self, kind: Kind, ranks: int, nodes: int, num_bytes: float) -> Estimate:
        self.seen.add((kind, ranks, nodes))
        return Estimate(0.0, "measured")


def test_groups_and_the_nodes_they_span() -> None:
    """16 ranks, 4 in a node: attention is numbered tp, dp, pp, experts etp, ep, edp, pp, the first
    next to each other."""

    def seen(**sizes: int) -> set[tuple[str, int, int]]:
        groups = Groups()
        seconds(
            LoRAConfig(),
            replace(FREE, network=groups, ranks_per_node=4),
            ranks=16,
            batch=16,
            **sizes,
        )
        return groups.seen

    assert seen(tp=2, pp=2, ep=4) == {
        ("all_gather", 2, 1), ("reduce_scatter", 2, 1), ("all_reduce", 2, 1),  # tp
        ("all_gather", 4, 2), ("reduce_scatter", 4, 2),  # dp: ranks 0, 2, 4, 6
        ("all_to_all", 4, 1), ("send", 2, 2),  # ep: 0 to 3; pp: 0, 8. And edp: 0, 4
        ("all_gather", 2, 2), ("reduce_scatter", 2, 2),
    }  # fmt: skip
    assert seen(tp=2, cp=4, ep=16) == {
        ("all_gather", 2, 1), ("reduce_scatter", 2, 1), ("all_reduce", 2, 1),  # tp
        ("all_gather", 4, 2), ("reduce_scatter", 4, 2),  # cp: ranks 0, 2, 4, 6
        ("all_gather", 8, 4), ("reduce_scatter", 8, 4),  # dp with cp: all even ranks
        ("all_to_all", 16, 4),  # ep: all
    }  # fmt: skip
    assert seen(tp=4, ep=4, etp=2) == {
        ("all_gather", 4, 1), ("reduce_scatter", 4, 1), ("all_reduce", 4, 1),  # tp
        ("all_gather", 4, 4), ("reduce_scatter", 4, 4),  # dp: 0, 4, 8, 12
        ("all_gather", 2, 1), ("reduce_scatter", 2, 1), ("all_reduce", 2, 1),  # etp
        ("all_to_all", 4, 2),  # ep: 0, 2, 4, 6
        ("all_gather", 2, 2), ("reduce_scatter", 2, 2),  # edp: 0, 8
    }  # fmt: skip


def test_selective_recomputation_gathers_a_dense_mlp_s_input_again() -> None:
    """In units of T H: qkv and fc1 forward, o and fc2 backward; fc1 once more, and all that a layer
    gathers when it is whole."""
    shape = ModelShape(
        model_type="qwen3", num_layers=3, hidden=512, num_heads=8, num_kv_heads=4, head_dim=64,
        intermediate=1024, vocab=4096,
        tied_embeddings=False,
    )  # fmt: skip
    dense = PlannedModel.of(shape, LoRAConfig(rank=1, target_modules=["q_proj"]))
    counting = replace(FREE, network=Count("all_gather"))
    work = Workload(sequence_length=64, global_batch_size=1)
    # T H elements of two bytes, in each of three layers.
    unit = 64 * 512 * 2 * 3
    found = {}
    for level in ("off", "selective", "full"):
        layout = ParallelLayout(parallel=ParallelConfig(tp=4), num_ranks=4, recompute=level)
        found[level] = step_time(dense, layout, work, counting).seconds / unit
    assert found["selective"] - found["off"] == pytest.approx(1)
    # Both gathers of a layer, and that of the adapter's rank-wide activations: 1 of 512 features.
    assert found["full"] - found["off"] == pytest.approx(2 + 1 / 512)


def test_bytes_of_the_reduction() -> None:
    """float32 gradients to their owners, bfloat16 parameters back: attention's over 8 ranks,
    experts' on one of 8 alone."""
    lora = LoRAConfig(rank=16, target_modules=["o_proj", "down_proj"])
    scatter = seconds(lora, replace(FREE, network=Count("reduce_scatter")), ranks=8, batch=8, ep=8)
    gather = seconds(lora, replace(FREE, network=Count("all_gather")), ranks=8, batch=8, ep=8)
    # A of o is [16, 4096] and its B [2048, 16], in each of 48 layers.
    assert scatter == 48 * 16 * (4096 + 2048) * 4
    assert gather == scatter / 2
