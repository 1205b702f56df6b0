"""Compare predicted time with counts made elsewhere: FLOPs of the LoRA formula, schedules and waits
by hand."""

from dataclasses import replace

import pytest

from benchmarks.train_case import QWEN3_30B_A3B, flops_per_token
from megalora.config import LoRAConfig, ParallelConfig
from megalora.planner.cost import REFERENCE, step_time
from megalora.planner.gpus import GPUS
from megalora.planner.hardware import Constant, Overhead
from megalora.planner.layouts import ParallelLayout
from megalora.planner.models import load_shape
from megalora.planner.weights import PlannedModel
from megalora.planner.workload import Workload
from tests.planner.priced import ARITHMETIC, ATTENTION, FREE, MODELS, Count, model, seconds


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


@pytest.mark.parametrize(
    ("pp", "vpp", "head_is_adapted"), [(1, 1, False), (1, 1, True), (2, 1, False), (2, 2, False)]
)
def test_a_reference_is_forward_once_more(pp: int, vpp: int, head_is_adapted: bool) -> None:
    """With the head, whose logits have no gradient; on stages with their bubble."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] + ["lm_head"] * head_is_adapted
    planned = model(replace(ATTENTION, target_modules=targets))
    work = Workload(sequence_length=4096, global_batch_size=4, sequences=2)
    # Recomputation does every layer's forward again, by a count of its own; 4 microbatches.
    whole = ParallelLayout(parallel=ParallelConfig(), num_ranks=1)
    alone = step_time(planned, whole, work, ARITHMETIC).seconds
    again = step_time(planned, replace(whole, recompute="full"), work, ARITHMETIC).seconds
    layers = (again - alone) / 4
    head = 2 * 4096 * 2 * 2048 * 151_936 / 1e12
    # A and B of rank 16 over 2,048 features and the vocabulary.
    if head_is_adapted:
        head += 2 * 4096 * 2 * 16 * (2048 + 151_936) / 1e12
    layout = ParallelLayout(parallel=ParallelConfig(pp=pp, vpp=vpp), num_ranks=pp)
    found = step_time(planned, layout, replace(work, references=1), ARITHMETIC)
    without = step_time(planned, layout, work, ARITHMETIC)
    # The last stage is the slowest, four times; the others once more, by turns of their chunks.
    others = (pp - 1) * layers / pp / vpp
    assert found[REFERENCE] == pytest.approx(4 * (layers / pp + head) + others, rel=1e-6)
    assert found.seconds - without.seconds == pytest.approx(found[REFERENCE], rel=1e-9)
    assert without[REFERENCE] == 0


@pytest.mark.parametrize("tp", [1, 2])
def test_a_score_head_is_three_products(tp: int) -> None:
    """Scores, the gradient of the weight and of the input, of a rank's own tokens; the rest of the
    step is that of a model whose vocabulary takes no time. Scores of all tokens travel as
    float32."""
    headless = model(ATTENTION)
    headless = replace(headless, shape=replace(headless.shape, vocab=0))
    scored = replace(headless, shape=replace(headless.shape, num_scores=7))
    work = Workload(sequence_length=4096, global_batch_size=4)
    layout = ParallelLayout(parallel=ParallelConfig(tp=tp), num_ranks=tp)
    products = 3 * 4 * 4096 / tp * 2 * 7 * 2048 / 1e12
    found = step_time(scored, layout, work, ARITHMETIC)
    assert found["head"] == pytest.approx(products, rel=1e-9)
    without = step_time(headless, layout, work, ARITHMETIC)
    assert found.seconds - without.seconds == pytest.approx(products, rel=1e-6)
    gathered = replace(FREE, network=Count("all_gather"))
    grown = step_time(scored, layout, work, gathered)["tensor parallel head"]
    assert grown == 4 * 4096 * 7 * 4 * (tp > 1)


@pytest.mark.parametrize("tp", [1, 2])
def test_what_is_trained_of_the_base_is_multiplied(tp: int) -> None:
    """A router's gradient is one product more of a rank's own tokens; lm_head's is one, and its
    logits are computed again, of all tokens and a part of the vocabulary."""
    saved = model(replace(ATTENTION, modules_to_save=["lm_head", "gate"]))
    work = Workload(sequence_length=4096, global_batch_size=4)
    layout = ParallelLayout(parallel=ParallelConfig(tp=tp), num_ranks=tp)
    head = 2 * 4 * 4096 * 2 * 151_936 // tp * 2048 / 1e12
    routers = 48 * 4 * 4096 // tp * 2 * 128 * 2048 / 1e12
    found = step_time(saved, layout, work, ARITHMETIC)
    without = step_time(model(ATTENTION), layout, work, ARITHMETIC)
    assert found["head"] - without["head"] == pytest.approx(head, rel=1e-9)
    assert found["dispatch"] - without["dispatch"] == pytest.approx(routers, rel=1e-6)


def test_an_embedding_takes_memory_traffic_and_two_stages() -> None:
    """Of each of 4 microbatches: the gradient of the output twice, zeros and the gradient in
    bfloat16, the sum in float32. Both stages of a pipeline add up theirs of a tied one."""
    shape = replace(load_shape(MODELS / "qwen3_30b_a3b.yaml"), tied_embeddings=True)
    rows = 151_936 * 2048
    work = Workload(sequence_length=4096, global_batch_size=4)
    memory = replace(FREE, memory=Constant(1.0))
    embedding = replace(ATTENTION, modules_to_save=["embed_tokens"])
    untied = replace(shape, tied_embeddings=False)
    layout = ParallelLayout(parallel=ParallelConfig(), num_ranks=1)
    found = step_time(PlannedModel.of(untied, embedding), layout, work, memory)
    without = step_time(PlannedModel.of(untied, ATTENTION), layout, work, memory)
    of_step = 4 * (2 * 4096 * 2048 * 2 + rows * (2 + 2 + 4 + 4))
    assert found["other"] - without["other"] == pytest.approx(of_step, rel=1e-9)
    layout = ParallelLayout(parallel=ParallelConfig(pp=2), num_ranks=2)
    summed = replace(FREE, network=Count("all_reduce"))
    found = step_time(PlannedModel.of(shape, embedding), layout, work, summed)
    assert found["reduction"] == 4 * rows


def test_a_pair_is_two_sequences() -> None:
    """As many documents in a row, and attention within each of them alone."""
    layout = ParallelLayout(parallel=ParallelConfig(), num_ranks=1)
    pairs = Workload(sequence_length=4096, global_batch_size=4, sequences=2)
    single = Workload(sequence_length=4096, global_batch_size=8)
    two = replace(layout, micro_batch_size=2)
    found = step_time(model(ATTENTION), layout, pairs, ARITHMETIC)
    assert found == step_time(model(ATTENTION), two, single, ARITHMETIC)
    assert layout.capacity(pairs) == two.capacity(single) == 2 * 4096
    assert layout.num_microbatches(pairs) == two.num_microbatches(single) == 4


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


def test_dropout_pays_for_its_copies() -> None:
    """At a byte a second: of a row's input and SwiGLU's result, of qkv's and o's input, each read,
    written and a mask beside, twice; of experts' A's, which read apart from the base, once more;
    in backward their gradient written, read with the base's and the sum written."""
    machine = replace(FREE, memory=Constant(1.0))
    lora = LoRAConfig()
    grown = seconds(replace(lora, dropout=0.1), machine) - seconds(lora, machine)
    tokens = 8 * 4096
    of_rows = 8 * (2048 + 768)
    passes = 2 * (2 * 2 + 1)
    # Layer 0's qkv has no backward below it, which the planner prices like the others.
    assert grown == 48 * tokens * ((of_rows + 2048 + 4096) * passes + of_rows * (2 + 4 * 2))


def test_dropout_runs_experts_again_as_a_whole() -> None:
    """Selective recomputation: without a node of their own experts compute down as well again."""
    added = []
    for dropout in (0.0, 0.1):
        lora = LoRAConfig(dropout=dropout)
        again = seconds(lora, ARITHMETIC, recompute="selective") - seconds(lora, ARITHMETIC)
        added.append(again)
    tokens = 8 * 4096
    # down: 2,048 outputs of 768 inputs and 16 columns of the adapter; of gate and up half of the 32
    # columns more, as their B's are one matrix.
    products = 2 * tokens * 8 * (2048 * (768 + 16) + 2 * 768 * 16)
    assert added[1] - added[0] == pytest.approx(48 * products / 1e12)
