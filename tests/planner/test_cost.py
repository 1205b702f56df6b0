"""Compare predicted time with counts made elsewhere: FLOPs of the LoRA formula, bytes of
collectives of a real step, schedules by hand."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.train_case import QWEN3_30B_A3B, flops_per_token
from megalora.config import LoRAConfig, ParallelConfig
from megalora.model.shape import ModelShape
from megalora.planner.cost import step_time
from megalora.planner.gpus import GPUS
from megalora.planner.hardware import Constant, Estimate, Kind, Machine, Overhead
from megalora.planner.layouts import ParallelLayout, Workload
from megalora.planner.models import load_shape
from megalora.planner.weights import PlannedModel

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


def test_flops_are_those_of_the_lora_formula() -> None:
    """4 P + 6 A + 6 S h d L for each token, with adapters on attention; the formula stands in
    benchmarks/train_case.py."""
    config = dict(QWEN3_30B_A3B)
    base = flops_per_token(config, 0, 4096) * 8 * 4096 / 1e12
    # An adapter of rank 16 on q, k, v, o: A and B, 6 FLOPs each, in 48 layers.
    adapters = 6 * 48 * 16 * ((2048 + 4096) + 2 * (2048 + 512) + (4096 + 2048)) * 8 * 4096 / 1e12
    found = seconds(ATTENTION, ARITHMETIC)
    # q, k, v share one product with the stacked A's and one with the B's: as blocks of one matrix,
    # each B meets all 48 columns.
    assert found == pytest.approx(base + adapters, rel=0.01)
    assert found > base + 0.9 * adapters


def test_expert_adapters_ride_on_the_base() -> None:
    """Their second products are columns of the base's GEMMs: 2 M (2 I r + H r) forward, for gate
    and up each meet their own rank, 2 M (H 2 r + I r) backward."""
    config = dict(QWEN3_30B_A3B)
    base = flops_per_token(config, 0, 4096) * 8 * 4096 / 1e12
    experts = LoRAConfig(rank=16, target_modules=["gate_proj", "up_proj", "down_proj"])
    # 48 layers, 8 experts of a token: 2 I r + H r, then H 2 r + I r.
    columns = 48 * 8 * (2 * 768 * 16 + 2048 * 16 + 2048 * 32 + 768 * 16)
    expected = base + 2 * columns * 8 * 4096 / 1e12
    assert seconds(experts, ARITHMETIC) == pytest.approx(expected, rel=1e-4)


def test_recomputation_does_forward_again() -> None:
    off = seconds(ATTENTION, ARITHMETIC)
    full = seconds(ATTENTION, ARITHMETIC, recompute="full")
    shape = load_shape(MODELS / "qwen3_30b_a3b.yaml")
    # Weights that a token meets: q, k and v, o, router, three projections of eight experts.
    layer = 2048 * (4096 + 1024) + 4096 * 2048 + 128 * 2048 + 8 * 3 * 2048 * 768
    # Adapters of rank 16: q, k and v as one product each with their A's and their B's, then o's.
    layer += 16 * ((3 * 2048 + 3 * (4096 + 1024)) + 4096 + 2048)
    # Two FLOPs for each weight, and attention's scores and sums over 4096 tokens, half masked.
    forward = 8 * 4096 * shape.num_layers * (2 * layer + 2 * 4096 * 4096) / 1e12
    assert full - off == pytest.approx(forward, rel=1e-6)
    selective = seconds(ATTENTION, ARITHMETIC, recompute="selective")
    # Gate and up of eight experts, and attention.
    again = 8 * 4096 * shape.num_layers * (2 * 8 * 2 * 2048 * 768 + 2 * 4096 * 4096) / 1e12
    assert selective - off == pytest.approx(again, rel=1e-6)


def test_layouts_share_the_arithmetic_out() -> None:
    one = seconds(ATTENTION, ARITHMETIC)
    assert seconds(ATTENTION, ARITHMETIC, ranks=8, ep=8) == pytest.approx(one / 8)
    # Eight times the work on eight ranks.
    assert seconds(ATTENTION, ARITHMETIC, ranks=8, batch=64, ep=8) == pytest.approx(one)
    # Nothing is computed twice under TP: the router and the A's see a rank's own tokens, as
    # sequence parallelism divides them.
    assert seconds(ATTENTION, ARITHMETIC, ranks=4, tp=4, ep=4) == pytest.approx(one / 4)
    assert seconds(ATTENTION, ARITHMETIC, ranks=4, tp=4, etp=4) == pytest.approx(one / 4)
    # One sample on all ranks: the zigzag gives each the same part of attention.
    assert seconds(ATTENTION, ARITHMETIC, ranks=4, cp=4) == pytest.approx(one / 4)
    assert seconds(ATTENTION, ARITHMETIC, ranks=8, cp=4, tp=2, ep=2) == pytest.approx(one / 8)


def test_the_bubble() -> None:
    """Stages of a model whose head takes no time are alike: (m + p - 1) / p of one rank's step,
    chunks divide the bubble."""
    lora = LoRAConfig(rank=16, target_modules=["q_proj"])
    headless = replace(
        model(lora), shape=replace(load_shape(MODELS / "qwen3_30b_a3b.yaml"), vocab=0)
    )
    work = Workload(sequence_length=4096, global_batch_size=8)

    def step(ranks: int, **sizes: int):
        return step_time(
            headless,
            ParallelLayout(parallel=ParallelConfig(**sizes), num_ranks=ranks),
            work,
            ARITHMETIC,
        )

    alone = step(1)
    one = alone["attention"] + alone["experts"] + alone["dispatch"]
    plain = step(4, pp=4)
    chunked = step(4, pp=4, vpp=3)
    # p - 1 = 3 of the m = 8 microbatches' time, on a quarter of the layers.
    assert plain["bubble"] == pytest.approx(3 / 8 * one / 4, rel=1e-6)
    assert chunked["bubble"] == pytest.approx(plain["bubble"] / 3, rel=1e-6)
    assert plain.seconds - plain["bubble"] == pytest.approx(one / 4, rel=1e-6)


def test_a_long_last_stage_is_what_others_wait_for() -> None:
    found = step_time(
        model(ATTENTION), ParallelLayout(parallel=ParallelConfig(pp=4), num_ranks=4),
        Workload(sequence_length=4096, global_batch_size=8),
        ARITHMETIC,
    )  # fmt: skip
    # The head's 152,000 columns are as much work as several layers.
    assert found.stage == 3
    assert found["head"] > 0


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


def test_the_host_counts_where_the_device_is_faster() -> None:
    over = Overhead(1.0, 2.0, 5.0, hidden=True, basis="assumed")
    # Eight microbatches of 48 layers, 1 s forward and 2 s backward, and 5 s for the step.
    assert seconds(ATTENTION, replace(FREE, overhead=over)) == pytest.approx(8 * 48 * 3.0 + 5.0)
    slow = replace(
        ARITHMETIC, overhead=replace(over, layer_forward_s=1e-6, layer_backward_s=1e-6, step_s=0.0)
    )
    assert seconds(ATTENTION, slow) == pytest.approx(seconds(ATTENTION, ARITHMETIC))
    # As on a CPU, where host and device are one.
    both = replace(slow, overhead=replace(slow.overhead, hidden=False))
    assert seconds(ATTENTION, both) == pytest.approx(seconds(ATTENTION, ARITHMETIC) + 8 * 48 * 2e-6)


def test_what_the_host_issues_behind_a_wait_is_not_hidden() -> None:
    """By hand: 48 layers, one microbatch on each of 8 ranks, 2 ms a forward and 3 ms a backward, on
    a device that is slower."""
    over = Overhead(2e-3, 3e-3, 0.0, hidden=True, basis="assumed")

    def host(
        recompute: str = "off", batch: int = 8, machine: Overhead = over, **sizes: int
    ) -> float:
        settings: dict = {"ranks": 8, "batch": batch, "recompute": recompute, **sizes}
        busy = replace(
            ARITHMETIC, gemm=Constant(1e11), grouped_gemm=Constant(1e11), attention=Constant(1e11)
        )
        idle = seconds(ATTENTION, busy, **settings)
        return seconds(ATTENTION, replace(busy, overhead=machine), **settings) - idle

    # Experts whole on every rank: no wait, and the device is slower.
    assert host() == pytest.approx(0)
    assert host(tp=8) == pytest.approx(0)
    # Forward waits for how many tokens each rank gets; backward knows the sizes.
    assert host(ep=8) == pytest.approx(48 * 2e-3)
    # Three microbatches.
    assert host(ep=8, batch=24) == pytest.approx(3 * 48 * 2e-3)
    # Selective recomputation neither routes nor dispatches again; full does.
    assert host("selective", ep=8) == pytest.approx(48 * 2e-3)
    assert host("full", ep=8) == pytest.approx(2 * 48 * 2e-3)
    # ETP gathers unequal numbers of tokens, whose sizes the host has to know.
    assert host("full", tp=8, etp=8, batch=1) == pytest.approx(2 * 48 * 2e-3)
    # A CPU takes turns between issuing and computing: all 2 + 3 ms count, wait or not.
    in_turns = replace(over, hidden=False)
    assert host(ep=8, pp=1, tp=1, machine=in_turns) == pytest.approx(48 * 5e-3)
    # 2 + 3 ms, and forward once more.
    assert host("full", machine=in_turns) == pytest.approx(48 * 7e-3)


def test_only_layers_with_experts_wait() -> None:
    """Two of five layers have experts, and nothing runs backward below the third."""
    shape = replace(
        load_shape(MODELS / "qwen3_30b_a3b.yaml"), num_layers=5, moe_layers=frozenset({1, 3})
    )
    mixed = PlannedModel.of(shape, LoRAConfig(rank=1, target_modules=["q_proj"], layers="2-"))
    work = Workload(sequence_length=4096, global_batch_size=2)
    machine = replace(ARITHMETIC, overhead=Overhead(2e-3, 3e-3, 0.0, hidden=True, basis="assumed"))
    # Layers 1 and 3 forward; layer 3 once more when it is recomputed, layer 1 never is.
    for recompute, passes in (("off", 2), ("full", 3)):
        layout = ParallelLayout(parallel=ParallelConfig(ep=2), num_ranks=2, recompute=recompute)  # pyright: ignore
        found = step_time(mixed, layout, work, machine)
        assert found["host behind waits"] == pytest.approx(passes * 2e-3)


def test_nothing_below_the_first_adapter_runs_backward() -> None:
    top = LoRAConfig(rank=16, target_modules=["q_proj"], layers="24-")
    low = seconds(LoRAConfig(rank=16, target_modules=["q_proj"], layers="0-"), ARITHMETIC)
    high = seconds(top, ARITHMETIC)
    # 24 of 48 layers run forward alone, and forward is about 1 of 2 parts, because no gradient of a
    # frozen weight is computed: (24 + 24 / 2) / 48 = 0.75, and the head in both.
    assert 0.6 < high / low < 0.8


def test_every_number_says_how_it_is_known() -> None:
    found = step_time(
        model(LoRAConfig()),
        ParallelLayout(parallel=ParallelConfig(tp=2, pp=2, ep=2), num_ranks=8, recompute="full"),
        Workload(sequence_length=4096, global_batch_size=8, imbalance=1.2), GPUS["h100"],
    )  # fmt: skip
    # Nobody measured an H100 here: no part may claim more.
    assert {part.basis for part in found.parts} == {"assumed"}
    assert found.basis == "assumed"
    names = {part.name for part in found.parts}
    assert names >= {"attention", "experts", "dispatch", "head", "tensor parallel attention",
                     "recompute attention", "recompute experts", "bubble", "pipeline transfers",
    "reduction", "optimizer", "host", "other"}  # fmt: skip
    assert found.seconds == pytest.approx(sum(part.seconds for part in found.parts))
