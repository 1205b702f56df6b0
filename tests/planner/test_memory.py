"""Compare planned bytes of gradients and optimizer with the live tensors of a training step, and
check what a plan says of itself."""

import itertools
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import nn

from megalora import host
from megalora.config import (
    LoRAConfig,
    ParallelConfig,
    RunConfig,
)
from megalora.hf.json_file import read_hf_config
from megalora.lora.spec import expected_tensors
from megalora.model.fields import model_shape
from megalora.planner import activations
from megalora.planner.adapter_count import AdapterCount, adapter_parameters, shared_elements
from megalora.planner.layouts import ParallelLayout, enumerate_layouts
from megalora.planner.memory import MemoryPlan, fullest_stage, memory_of, memory_of_model
from megalora.planner.microbatch import Microbatch, ranks_per_token
from megalora.planner.mlp_activations import PlannedMLP, experts_bytes
from megalora.planner.models import load_shape
from megalora.planner.save_bytes import checkpoint_bytes, generator_bytes, snapshot_bytes
from megalora.planner.state_bytes import buffers, owned_elements
from megalora.planner.weights import PlannedModel, chunks_of
from megalora.planner.workload import Workload
from megalora.train.checkpoint.pieces import OwnedPieces
from megalora.train.checkpoint.snapshot import Snapshot
from megalora.train.optim import clip_and_step
from tests.distributed.ranks import run_ranks
from tests.parity.built import built
from tests.parity.everything import LORA
from tests.parity.runs import make_config
from tests.planner.count_step import num_bytes, tensors_of

MODELS = Path(__file__).parents[2] / "configs" / "models"


def live_bytes(config: RunConfig) -> dict[str, int]:
    """Frozen weights, parameter and gradient buffers, and the optimizer's tensors after one
    step."""
    with built(config) as run:
        run.stepper.train(run.batches.of_step(0), run.optimizer)
        clip_and_step(run.optimizer)
        found = {name: num_bytes(tensors) for name, tensors in tensors_of(run).items()}
        pieces = OwnedPieces(run.model, run.optimizer)
        values = run.model.values()
        average = {parameter: value.float() for parameter, value in values.items()}
        for name, blocks in (
            ("snapshot", pieces.blocks()),
            ("with start and average", pieces.blocks(values, average)),
        ):
            snapshot = Snapshot()
            snapshot.take(blocks, host.rng_state())
            found[name] = snapshot.num_bytes
        return found


# (model, ranks, sizes, adapter): alone; with the optimizer's state shared out over data parallel;
# with experts in a buffer of their own; over TP, in chunks; a model with every kind of layer.
CASES = [
    ("tiny", 1, {}, None),
    ("tiny", 2, {}, None),
    ("tiny", 2, {"ep": 2}, None),
    ("tiny", 4, {"tp": 2, "ep": 2}, None),
    pytest.param("tiny", 4, {"pp": 2, "vpp": 2}, None, marks=pytest.mark.slow),
    ("tiny", 4, {"cp": 2, "ep": 2}, None),
    ("everything", 4, {"tp": 2, "pp": 2}, LORA),
    pytest.param("everything", 4, {"tp": 4, "etp": 2}, LORA, marks=pytest.mark.slow),
    ("tiny_dense", 2, {}, None),
]


# bfloat16 steps take four times as long on a CPU.
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "world", "sizes", "lora"), CASES)
def test_weights_gradients_and_optimizer(
    name, world, sizes, lora, dtype, chats, tmp_path, request: pytest.FixtureRequest
) -> None:
    """Weights and buffers to the byte. Optimizer state: to the byte where nothing is shared out and
    over all ranks together; where it is, no rank has more than planned, and each nearly that."""
    base: Path = request.getfixturevalue(name)
    config = make_config(
        base, chats, tmp_path / "run", sizes, lora=lora or LoRAConfig(rank=4), dtype=dtype
    )
    shape = model_shape(read_hf_config(base))
    layout = ParallelLayout(
        parallel=config.parallel, num_ranks=world, micro_batch_size=config.train.micro_batch_size
    )
    model = PlannedModel.of(shape, config.lora)
    work = replace(Workload.of(config), on_cpu=True)
    generators = generator_bytes(on_cpu=True)
    saved = 0
    live_total = 0
    total = Fraction(0)
    for rank, live in enumerate(run_ranks(live_bytes, world, config)):
        stage = rank // (world // config.parallel.pp)
        plan = memory_of(shape, config.lora, layout, Workload.of(config), stage)
        assert live["weights"] == plan["weights"]
        assert live["adapters"] == plan["adapters"] + plan["buffer padding"]
        assert live["gradients"] == plan["gradients"]
        # Megatron shares out a flat buffer, whose parts differ by its padding.
        assert 0.95 * plan["optimizer"] < live["optimizer"] <= plan["optimizer"]
        assert live["optimizer"] == plan["optimizer"] or layout.dp_cp * layout.edp > 1
        # Of replicas the first one saves.
        for name, of in (
            ("snapshot", work),
            ("with start and average", replace(work, holds_start=True, averaged=True)),
        ):
            planned = snapshot_bytes(model, layout, of, stage)
            assert live[name] <= planned
            if rank == stage * (world // config.parallel.pp):
                assert live[name] == planned or layout.dp_cp * layout.edp > 1
                assert live[name] > 0.95 * planned
        saved += live["snapshot"] - generators
        live_total += live["optimizer"]
        for chunk in chunks_of(shape, config.parallel, stage):
            count = adapter_parameters(model, config.parallel, chunk)
            # Each replica holds its part of the state; experts have replicas of their own.
            total += Fraction(count.dense, layout.dp_cp) + Fraction(count.expert, layout.edp)
    # Two moments in float32, and a master of a parameter in bfloat16: 12 bytes each, or 8.
    assert live_total == total * (12 if dtype == "bfloat16" else 8)
    # Every element once; what is not trained has no moments. The rest is the adapter's file.
    shapes = expected_tensors(list(model.adapted)).values()
    elements = sum(math.prod(shape) for shape in shapes)
    assert saved == 12 * elements
    assert saved == checkpoint_bytes(model, work) - elements * work.element_bytes


def plan_of(
    model: PlannedModel,
    stage: int = 0,
    ranks: int = 8,
    recompute: Any = "off",
    tokens: int = 4096,
    **sizes: int,
) -> MemoryPlan:
    layout = ParallelLayout(parallel=ParallelConfig(**sizes), num_ranks=ranks, recompute=recompute)
    return memory_of_model(
        model, layout, Workload(sequence_length=tokens, global_batch_size=64), stage
    )


def test_an_expert_layer_keeps_what_the_kernels_readme_says(model: PlannedModel) -> None:
    """47,497 bytes a token with EP 8 at rank 16, indexes and probabilities of routing outside the
    node left out."""
    p = ParallelConfig(ep=8)
    layout = ParallelLayout(parallel=p, num_ranks=8)
    work = Workload(sequence_length=4096, global_batch_size=8)
    batch = Microbatch.of(model, layout, work)
    mlp = PlannedMLP(model, layout, batch, model.modules_of(0), live=True, selective=False)
    found = experts_bytes(mlp, live=True) / batch.tokens
    # 5.34 received rows of a token in bfloat16; for each of its 8 experts gate and up, S of three
    # ranks of 16.
    received = ranks_per_token(128, 8, 8)
    assert abs(received - 5.339) < 0.001
    wide = (received * 2048 + 8 * (2 * 768 + 48)) * 2
    # A probability (2) and an index (4) for each expert, 8 slots for each received row; as many
    # tokens sent and slots of this rank's tokens.
    narrow = 8 * (2 + 4) + received * 8 * 4 + 2 * 8 * 4
    assert abs(found - wide - narrow) < 2


@pytest.mark.parametrize(("experts", "top_k", "ep"), [(6, 3, 3), (8, 2, 2), (8, 5, 4), (5, 5, 5)])
def test_ranks_of_a_token_are_those_of_every_choice_there_is(experts, top_k, ep) -> None:
    choices = list(itertools.combinations(range(experts), top_k))
    hit = [len({e // (experts // ep) for e in choice}) for choice in choices]
    assert ranks_per_token(experts, top_k, ep) == pytest.approx(sum(hit) / len(hit))


def test_the_peak_is_the_largest_of_loss_layer_and_step(model: PlannedModel) -> None:
    one = plan_of(model, ep=8)
    full = plan_of(model, ep=8, recompute="full")
    short = plan_of(model, ep=8, recompute="full", tokens=1024)
    for plan in (one, full, short):
        # Loss, a layer's backward and the step come one after the other; what a pass keeps is
        # there during the first two.
        always = plan.sum_of("always")
        in_pass = plan.sum_of("pass") + max(plan.sum_of("loss"), plan.sum_of("layer"))
        assert plan.peak_bytes == always + max(in_pass, plan.sum_of("step"))
        assert {part.basis for part in plan.parts} == {"measured", "assumed"}
        assert {part.when for part in plan.parts} == {"always", "pass", "loss", "layer", "step"}
        assert plan.table().splitlines()[-1].startswith("peak")
    # A layer grows with the tokens; logits, 152,000 of a token at 6 bytes each, up to 512 MiB.
    assert short.sum_of("loss") > short.sum_of("layer")
    assert full.sum_of("loss") < full.sum_of("layer")


def test_what_a_layout_changes(model: PlannedModel) -> None:
    one = plan_of(model, ep=8)
    full = plan_of(model, ep=8, recompute="full")
    # Every layer's input in bfloat16, and rotary angles in float32.
    assert full["activations"] == 48 * 4096 * 2048 * 2 + 4096 * 128 * 4
    assert full["recomputed"] > one["recomputed"] == 0
    assert full.peak_bytes < one.peak_bytes
    # A layer that runs again needs what it needed before.
    assert full["workspace"] == one["workspace"]
    first = plan_of(model, stage=0, pp=4, ep=2)
    last = plan_of(model, stage=3, pp=4, ep=2)
    # 1F1B: the first of four stages holds four microbatches, the last one.
    assert first["activations"] > 3 * last["activations"]
    assert first["loss"] == first["logits"] == 0 < last["loss"]
    # 4,096 tokens of each of ep ranks, 8 experts each, over 128 experts: 2,048 rows for an expert
    # with EP 8, 512 with EP 2. Room pays from 1,024 on.
    assert one["room for adapters"] > 0 == plan_of(model, ep=2)["room for adapters"]
    # Tokens times hidden size in bfloat16: the first stage receives nothing.
    assert first["pipeline"] == 0 and last["pipeline"] == 4096 * 2048 * 2
    # Without expert parallelism no token leaves its rank.
    assert plan_of(model)["all-to-all"] == 0 < one["all-to-all"]


def test_imbalance_fills_experts_alone(model: PlannedModel) -> None:
    layout = ParallelLayout(parallel=ParallelConfig(ep=8), num_ranks=8)
    work = Workload(sequence_length=4096, global_batch_size=8, imbalance=1.0)
    even = memory_of_model(model, layout, work)
    skewed = memory_of_model(model, layout, replace(work, imbalance=1.5))
    # 4,096 tokens with 8 rows each, and half as many again.
    rows = 4096 * 8 // 2
    # Kept of a row in bfloat16: gate and up, three ranks of 16, a probability; and two indexes.
    per_row = (2 * 768 + 48 + 1) * 2 + 2 * 4
    # A received row: x, and 8 slots.
    received = round(4096 * ranks_per_token(128, 8, 8))
    # Half as many again would be more than all tokens of 8 ranks, and a rank gets none twice.
    more = min(math.ceil(received * 1.5), 4096 * 8) - received
    per_received = 2048 * 2 + 8 * 4
    grown = skewed["activations"] - even["activations"]
    assert grown == 48 * (rows * per_row + more * per_received)
    assert skewed["weights"] == even["weights"]


def test_the_fullest_stage_decides(model: PlannedModel) -> None:
    work = Workload(sequence_length=4096, global_batch_size=64)
    layout = ParallelLayout(parallel=ParallelConfig(pp=4, ep=2), num_ranks=8)
    # The first holds most microbatches, the last has the loss: either may be it.
    peaks = [memory_of_model(model, layout, work, stage).peak_bytes for stage in range(4)]
    found = fullest_stage(model, layout, work)
    assert (found.peak_bytes, found.stage) == (max(peaks), peaks.index(max(peaks)))


def test_a_score_head_is_summed_over_tp() -> None:
    """Each rank scores its own tokens, and so has a part of the gradient of all of it."""
    plain = PlannedModel.of(load_shape(MODELS / "qwen3_30b_a3b.yaml"), LoRAConfig(rank=4))
    scored = replace(plain, shape=replace(plain.shape, num_scores=3))
    (chunk,) = chunks_of(scored.shape, ParallelConfig(), 0)
    for tp in (1, 2):
        p = ParallelConfig(tp=tp)
        without, _ = shared_elements(plain, p, chunk)
        assert shared_elements(scored, p, chunk)[0] - without == 3 * 2048 * (tp > 1)


@pytest.mark.parametrize("first", [False, True])
def test_a_tied_embedding_has_a_bucket_as_megatron_makes_it(first: bool) -> None:
    """On the first stage it is the first parameter, on the last one the last."""
    sizes = [100, 70]
    sizes.insert(0 if first else 2, 1000)
    parameters = [nn.Parameter(torch.empty(size, device="meta")) for size in sizes]
    marked: Any = parameters[0 if first else 2]
    marked.shared_embedding = True
    made = DistributedOptimizer._compute_per_buffer_param_layout(
        parameters, None, 3, DistributedDataParallelConfig()
    )
    layout = ParallelLayout(parallel=ParallelConfig(pp=2), num_ranks=6)
    count = AdapterCount(dense=170, dense_padded=256, tied=1000)
    assert buffers(count, layout) == (made.bucket_indices[-1][1], 0)
    # Each rank updates its third of each bucket.
    assert owned_elements(count, layout) == (128 + 384, 0)


def test_layers_with_the_same_adapters_may_train_other_weights() -> None:
    """Of 48 layers with q's adapters the norm of one."""
    lora = LoRAConfig(target_modules=["q_proj"])
    shape = load_shape(MODELS / "qwen3_30b_a3b.yaml")
    (chunk,) = chunks_of(shape, ParallelConfig(), 0)
    saved = replace(lora, modules_to_save=[r"model\.layers\.3\.input_layernorm"])
    found = []
    for each in (lora, saved):
        count = adapter_parameters(PlannedModel.of(shape, each), ParallelConfig(), chunk)
        found.append(count.dense)
    assert found[1] - found[0] == 2048


def test_only_what_ranks_hold_whole_is_summed_over_tp() -> None:
    """A router and norms are, and trained rows; an embedding is cut."""
    lora = LoRAConfig(target_modules=["q_proj"])
    shape = load_shape(MODELS / "qwen3_30b_a3b.yaml")
    plain = PlannedModel.of(shape, lora)
    (chunk,) = chunks_of(shape, ParallelConfig(), 0)
    p = ParallelConfig(tp=2)
    without, _ = shared_elements(plain, p, chunk)
    saved = replace(lora, modules_to_save=["embed_tokens", "lm_head", "gate", "norm"])
    found, _ = shared_elements(PlannedModel.of(shape, saved), p, chunk)
    assert found - without == 48 * 128 * 2048 + 2048
    rows = replace(lora, trainable_token_indices=[5, 9])
    found, _ = shared_elements(PlannedModel.of(shape, rows), p, chunk)
    assert found - without == 2 * 2048


def test_factors_that_ranks_share_are_summed_in_tables() -> None:
    """TP 8 on 4 key/value heads, rank 2: A of q, k, v and B of o whole on each rank, B of k and v
    in 4 parts for 8 ranks."""
    lora = LoRAConfig(rank=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], layers="0")
    layout = ParallelLayout(parallel=ParallelConfig(tp=8, ep=8), num_ranks=8)
    shape = load_shape(MODELS / "qwen3_30b_a3b.yaml")
    work = Workload(sequence_length=64, global_batch_size=8)
    # Rank 2 times: A of q, k and v, B of o, B of k and v with 4 heads of 128.
    elements = 2 * (3 * 2048 + 2048 + 2 * 512)
    # A table and its bucket in float32: 8 bytes an element.
    assert memory_of(shape, lora, layout, work)["optimizer step"] == 8 * elements


def test_an_adapter_on_o_keeps_what_selective_recomputation_would_free() -> None:
    """Attention's result stays, T q: what is freed of attention is its log-sum-exp alone."""
    shape = load_shape(MODELS / "qwen3_30b_a3b.yaml")
    work = Workload(sequence_length=64, global_batch_size=8)
    layout = ParallelLayout(parallel=ParallelConfig(), num_ranks=1)
    freed = []
    for targets in (["q_proj", "o_proj"], ["q_proj"]):
        model = PlannedModel.of(shape, LoRAConfig(target_modules=targets))
        batch = Microbatch.of(model, layout, work)
        kept = []
        for selective in (False, True):
            kept.append(activations.kept(model, layout, batch, 0, True, selective=selective))
        freed.append(kept[0].attention - kept[1].attention)
    # 64 tokens: 32 heads' log-sum-exp in float32, and 4096 features of the result in bfloat16.
    assert freed == [64 * 32 * 4, 64 * 32 * 4 + 64 * 4096 * 2]


def test_the_optimizer_s_step_needs_tables_alone(model: PlannedModel) -> None:
    """What ranks share over TP, in a table and in a bucket; without it nothing, for Adam is
    fused."""
    assert plan_of(model, ep=8)["optimizer step"] == 0
    p = ParallelConfig(tp=2, ep=8)
    dense, expert = shared_elements(model, p, chunks_of(model.shape, p, 0)[0])
    assert dense > expert
    assert plan_of(model, tp=2, ep=8)["optimizer step"] == 8 * dense


def test_a_stage_that_is_none(model: PlannedModel) -> None:
    with pytest.raises(ValueError, match=r"no pipeline stage 2: parallel\.pp=2"):
        plan_of(model, stage=2, pp=2)
    with pytest.raises(KeyError, match="no part 'everything'"):
        plan_of(model)["everything"]


def test_dropout_keeps_a_copy_and_a_mask_of_each_input(model: PlannedModel) -> None:
    """One rank of Qwen3-30B-A3B, beside what is kept anyway: copies in bfloat16 and masks of a
    byte."""
    dropped = plan_of(PlannedModel.of(model.shape, LoRAConfig(dropout=0.1)), ranks=1)
    plain = plan_of(model, ranks=1)
    tokens = 4096
    # Of each row's input and of SwiGLU's result, in the place of no other copy; every other input
    # of an A (attention's, the result that o reads) was kept before as it was.
    copies = 8 * (2048 + 768) * 3
    # o reads attention's result, which attention keeps, too; qkv's input was the norm's output.
    dense = 4096 * 3 + 2048 * 1
    # The norm's output was kept for the experts, of which each row now has a copy.
    norm = 2048 * 2
    # Scaled B's of 128 experts as one matrix: gate and up 2 x 768 by 32, down 2,048 by 16.
    matrices = 128 * (2 * 768 * 32 + 2048 * 16) * 2
    grown = dropped["activations"] - plain["activations"]
    # Nothing below the first layer needs a gradient: there qkv's input has no mask.
    assert grown == 48 * (tokens * (copies + dense - norm) + matrices) - tokens * 2048
    assert dropped["weights"] == plain["weights"] and dropped["gradients"] == plain["gradients"]


def test_every_layout_of_64_ranks_has_a_plan(model: PlannedModel) -> None:
    work = Workload(sequence_length=4096, global_batch_size=64)
    # There are thousands; every twentieth has all kinds of them.
    for layout in enumerate_layouts(model.shape, 64, work).legal[::20]:
        for stage in {0, layout.parallel.pp - 1}:
            plan = memory_of_model(model, layout, work, stage)
            assert min(part.num_bytes for part in plan.parts) >= 0
