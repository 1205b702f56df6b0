"""Check the arithmetic of the GPU benchmarks on a CPU: FLOPs by hand, arms against float32, and
that no wrong arm gets a speed."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bench_grouped_lora, goals
from benchmarks.arms import Arm, composed, our_arms, split_linear, their_arms
from benchmarks.compare import Row, compare, derive, faster, show
from benchmarks.expert_case import (
    ROUTINGS,
    SIZES,
    Case,
    Sizes,
    Spec,
    experts_of_tokens,
    make_case,
    make_routing,
    reference,
    relative_errors,
    rows_per_expert,
    sweep,
    with_rows,
)
from benchmarks.gpu_timing import Budget, Stats, measure, table
from benchmarks.linear_case import (
    PEFT_CASE,
    LinearSpec,
    linear_reference,
    make_linear,
    our_linear_arms,
    their_linear_arms,
)
from benchmarks.train_case import (
    QWEN3_30B_A3B,
    adapter_parameters,
    flops_per_token,
    frozen_met,
    layers_that_fit,
)
from megalora.model.fields import model_shape
from tests.arms_to_time import without_triton

CPU = torch.device("cpu")
TINY = Sizes("tiny", hidden=48, inner=40, num_experts=8, top_k=3)


def compared(case: Case, ours: dict, theirs: dict) -> list[Row]:
    """Rows of arms that compute one layer's experts."""

    def want() -> dict:
        return {"adapted": reference(case, True), "base": reference(case, False)}

    return compare(
        "tiny", ours, theirs, want, case.spec.base_flops(), CPU, torch.float32, repeats=2
    )


def test_base_flops_by_hand():
    # 8,192 tokens go to 8 experts each: 65,536 rows. gate and up are 2 * 768 = 1,536 outputs.
    gate_up = 2 * 65536 * 1536 * 2048
    down = 2 * 65536 * 2048 * 768
    balanced = Spec(SIZES["30b"], 8192, 128, 16, "balanced")
    assert balanced.base_flops() == gate_up + down == 618_475_290_624
    # Other experts, another rank and another routing: the base has as many rows.
    zipf = Spec(SIZES["30b"], 8192, 16, 64, "zipf")
    assert zipf.base_flops() == gate_up + down
    assert PEFT_CASE.base_flops() == 2 * 4096 * 768 * 2048


def test_training_flops_by_hand():
    # q, k and v, o; then the router and, of 128 experts, the 8 that a token meets.
    attention = 2048 * 4096 + 2 * 2048 * 512 + 4096 * 2048
    layer = attention + 128 * 2048 + 8 * 3 * 2048 * 768
    assert frozen_met(QWEN3_30B_A3B) == 48 * layer + 151936 * 2048 == 3_041_656_832, "the 3B of A3B"
    # A [16, in] and B [out, 16] of each linear: 16 * (in + out). q and o, k and v; gate, up, down.
    on_attention = 16 * (2 * (2048 + 4096) + 2 * (2048 + 512))
    on_expert = 16 * 3 * (2048 + 768)
    separate = 48 * (on_attention + 128 * on_expert)
    assert adapter_parameters(QWEN3_30B_A3B, 16) == separate == 843_841_536
    # Where gate and up are one linear they share an A of 16 x 2,048.
    joined = adapter_parameters(QWEN3_30B_A3B, 16, True)
    assert joined == separate - 48 * 128 * 16 * 2048
    # 4 P + 6 A + 6 S h d L, as in megalora/bench/flops.py: a token meets 8 of the experts'
    # adapters.
    scores = 4096 * 32 * 128 * 48
    expected = 4 * 3_041_656_832 + 6 * 48 * (on_attention + 8 * on_expert) + 6 * scores
    assert flops_per_token(QWEN3_30B_A3B, 16, 4096) == expected
    # The count of the published Qwen3-30B-A3B: the config is its own.
    assert model_shape(QWEN3_30B_A3B).num_parameters() == 30_532_122_624


def test_layers_that_fit():
    most = [layers_that_fit(QWEN3_30B_A3B, 16, 4096, gib * 2**30) for gib in (4, 40, 80, 140, 1000)]
    assert most == sorted(most)
    # Not one layer of 1.25 GB beside embeddings and head in 4 GiB; never more than the model has.
    assert most[0] == 0 and most[-1] == 48
    assert 8 < most[2] < 40


@pytest.mark.parametrize("kind", ROUTINGS)
def test_routing(kind):
    g = torch.Generator().manual_seed(0)
    counts = rows_per_expert(kind, 1000, 16, g)
    # "empty" leaves a tenth of the experts without rows, rounded: 2 of 16.
    num_empty = 2 if kind == "empty" else 0
    assert sum(counts) == 1000 and counts.count(0) == num_empty
    chosen_TK = experts_of_tokens(Spec(SIZES["30b"], 256, 128, 16, kind), g)
    for experts in chosen_TK.tolist():
        assert len(set(experts)) == 8, "a token goes to eight different experts"
    per_expert = torch.bincount(chosen_TK.reshape(-1), minlength=128)
    # A few experts get most rows under Zipf; else all that get any get equally many, or one more.
    if kind == "zipf":
        assert per_expert[0] > 4 * per_expert[20:].float().mean()
    else:
        used = per_expert[per_expert > 0]
        # A tenth of 128 is 12.8: 13 get none.
        assert used.numel() == (115 if kind == "empty" else 128)
        assert used.max() - used.min() <= 1
    for experts in (8, 4):
        routing = make_routing(Spec(TINY, 50, experts, 8, kind), CPU)
        # 50 tokens of top 3, each row in a slot of its own; 4 of 8 experts stand for a share of
        # them.
        assert routing.bounds[-1] == 150 and routing.num_experts == experts
        assert routing.slots_TK is not None
        assert sorted(routing.slots_TK.reshape(-1).tolist()) == list(range(150))


def test_sweep_begins_with_the_usual():
    specs = sweep(SIZES["30b"], [4096, 8192], [128, 16], [8, 16], ROUTINGS)
    # 2 numbers of tokens, 2 of experts, 2 ranks and 3 routings.
    assert len(ROUTINGS) == 3
    assert len(specs) == len(set(specs)) == 24
    first, second = specs[:2]
    assert (first.tokens, first.experts, first.rank, first.routing) == (8192, 128, 16, "balanced")
    assert second == replace(first, experts=16)
    assert with_rows(specs[1], 512).num_rows == 512 * 16


@pytest.mark.parametrize(
    "spec", [Spec(TINY, 64, 8, 8, "zipf"), Spec(TINY, 64, 4, 8, "empty")], ids=lambda s: s.label
)
def test_every_arm_computes_the_same_layer(spec):
    case = make_case(spec, CPU, torch.float32)
    rows = compared(case, without_triton(our_arms(case)), their_arms(case, compiled=False))
    quack = [row for row in rows if row.arm.startswith("quack")]
    assert [row.status for row in quack] == ["not installed: nvidia_cutlass_dsl"] * 2
    assert not quack[0].failed, "what is not installed is no failure"
    ratios_of_bases = []
    for row in rows:
        if row in quack:
            continue
        assert (row.status, row.failed) == ("ok", False), row.arm
        assert row.forward and row.train
        if row.kind == "base":
            ratios_of_bases.append(row.ratio_train)
    assert len(rows) - len(quack) == 14
    # Ratios are over the fastest base.
    assert min(ratios_of_bases) == 1
    # torch.compile takes a minute for each shape: its arm is left out unless asked for.
    compiled = set(their_arms(case, compiled=True)) - set(their_arms(case, compiled=False))
    assert compiled == {"split compiled"}


def test_every_arm_computes_the_same_linear():
    spec = LinearSpec("tiny", 192, 8, 40, 48, 8, "zipf")
    case = make_linear(spec, CPU, torch.float32)
    want = {"adapted": linear_reference(case, True), "base": linear_reference(case, False)}
    rows = compare(
        "tiny", without_triton(our_linear_arms(case)), their_linear_arms(case), lambda: want,
        spec.base_flops(),
        CPU, torch.float32, 2,
    )  # fmt: skip
    assert len(rows) == 14
    for row in rows:
        assert row.status == "ok" or row.arm.startswith("quack"), row.arm


def test_an_arm_that_is_wrong_gets_no_speed():
    """Arms that are right but for one thing: a gradient, NaN everywhere, other bits each time."""
    case = make_case(Spec(TINY, 64, 8, 8, "balanced"), CPU, torch.float32)
    right = composed(case, split_linear)
    flips = itertools.count()

    def doubled() -> Arm:
        def train() -> dict[str, Tensor]:
            gradients = right.train()
            gradients["b1"] = 2 * gradients["b1"]
            return gradients

        return replace(right, train=train)

    def changed(change: Callable[[Tensor], Tensor], kind: Any = right.kind) -> Arm:
        def train() -> dict[str, Tensor]:
            return {name: change(tensor) for name, tensor in right.train().items()}

        return replace(right, kind=kind, train=train)

    def not_a_number() -> Arm:
        return changed(lambda tensor: tensor * float("nan"))

    def unsteady() -> Arm:
        # Far below any tolerance, but a kernel of ours must give the same bits again.
        return changed(lambda tensor: tensor + 1e-7 * next(flips), kind="ours")

    def broken() -> Arm:
        raise RuntimeError("no such kernel\nand more")

    rows = compared(
        case,
        {"unsteady": unsteady, "ours": broken},
        {"2x": doubled, "nan": not_a_number, "theirs": broken},
    )
    found = {row.arm: row for row in rows}
    # Twice a gradient is off by all of it.
    assert found["2x"].status == "wrong: b1 is off by 1.0e+00"
    assert found["nan"].status.startswith("wrong: x is off by nan")
    assert found["unsteady"].status.startswith("wrong: other bits in a second run of ")
    assert found["ours"].status == "cannot run: RuntimeError: no such kernel"
    failed = [row.arm for row in rows if row.failed]
    assert failed == ["unsteady", "ours", "2x", "nan"], "theirs may be unable to run"
    for row in rows:
        assert row.forward is None and row.train is None, "a wrong arm has no speed"
    # JSON knows no NaN: it may stand in the arm's name and its status, never as a number.
    written = json.dumps(bench_grouped_lora.as_json(rows)).lower()
    assert "nan" not in written.replace('"nan"', "").replace("by nan", "")


def test_an_error_in_one_expert_is_not_overlooked():
    case = make_case(Spec(TINY, 64, 8, 8, "balanced"), CPU, torch.float32)
    want = reference(case, True)
    got = {name: t.clone() for name, t in want.items()}
    # One of eight experts' gradients is gone: 1/sqrt(8) = 0.35 of the norm if all are alike.
    got["a2"][3] = 0
    assert relative_errors(got, want)["a2"] > 0.2


def timed(arm: str, kind: str, forward_ms: float, train_ms: float) -> Row:
    """A row of an arm without noise."""
    forward = Stats(forward_ms, forward_ms, forward_ms, forward_ms)
    train = Stats(train_ms, train_ms, train_ms, train_ms)
    return Row("case", arm, kind, forward=forward, train=train)


def test_ratios_rates_and_goals():
    spec = Spec(SIZES["30b"], 8192, 128, 16, "balanced")
    # One base is the faster forward, the other in training: each is the measure of its column.
    rows = [
        timed("base triton", "base", 1.0, 2.5),
        timed("base grouped_mm", "base", 1.25, 2.0),
        timed("ours auto", "ours", 1.1, 2.4),
        timed("ours triton", "ours", 1.1, 2.0),
        timed("split eager", "theirs", 3, 4.8),
        timed("ours loop", "ours", 9, 9.6),
    ]
    derive(rows, spec.base_flops())
    assert rows[2].ratio_forward == pytest.approx(1.1) and rows[2].ratio_train == pytest.approx(1.2)
    # The 618 GFLOP of ``test_base_flops_by_hand``.
    assert rows[1].tflops_forward == pytest.approx(618.475 / 1.25, rel=1e-4)
    assert rows[1].tflops_train == pytest.approx(618.475, rel=1e-4), "twice the work in 2 ms"
    of_separate = {}
    of_joined = {}
    for verdict in goals.of_layer(spec, rows):
        kind = of_joined if verdict.case.endswith("gate+up") else of_separate
        kind[verdict.goal] = verdict
    assert of_separate[goals.FORWARD.name].verdict == "pass"
    assert of_separate[goals.TRAIN.name].verdict == "pass"
    assert of_separate[goals.SPLIT.name].verdict == "good", "4.8 over 2.4"
    assert of_separate[goals.LOOP.name].verdict == "miss", "4 times"
    # The arm that chooses by itself against the best choice, 2.4 over 2.0.
    assert of_separate[goals.CHOICE.name].value == pytest.approx(1.2)
    # No arm has gate and up joined: a goal that nothing was measured for is missed.
    assert of_joined[goals.TRAIN.name].value is None
    assert of_joined[goals.TRAIN.name].verdict == "miss"
    # Goals are set for rank 16.
    assert goals.of_layer(replace(spec, rank=8), rows) == []
    assert faster(rows, "nothing", "split eager") is None
    assert "2.00" in show(rows)
    assert "miss" in goals.show_verdicts([*of_separate.values(), *of_joined.values()])


def test_crossing():
    def point(rows: int, triton: float, vendor: float | None) -> goals.Crossing:
        """Microseconds of both back ends with so many rows for each of 16 experts."""
        return goals.Crossing(16, rows, triton, vendor)

    points = [
        point(64, 1, 2),
        point(256, 2, 1.9),
        point(512, 3, 3.5),
        point(1024, 5, 4),
        point(2048, 9, 7),
    ]
    assert goals.vendor_rows(points) == 1024, "at 256 it was faster by chance"
    # It must be the faster from there on at every size, and could not run at the largest.
    assert goals.vendor_rows([*points, point(4096, 9, None)]) is None
    assert "16 experts: 1024" in goals.show_crossing(points)


def test_times_budget_and_table():
    order: list[str] = []
    stats = measure(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, CPU, repeats=4, warmup=1
    )
    # One warm-up and four rounds; every other round in the other order, so that neither call always
    # finds the other's cache.
    assert "".join(order) == "abbaabbaab"
    assert stats["a"].p10_ms <= stats["a"].median_ms <= stats["a"].p90_ms
    # Median, 10th and 90th percentile between the values: 1 + 0.2 * 1 and 2 + 0.8 * 8; then the
    # median of the host's own times.
    found = Stats.of([1.0, 2.0, 10.0], [0.5, 0.5, 3.0])
    assert (found.median_ms, found.host_ms) == (2.0, 0.5)
    assert (found.p10_ms, found.p90_ms) == pytest.approx((1.2, 8.4))
    assert Budget(None).left() == float("inf") and Budget(0).left() <= 0
    assert table(("a", "bb"), [("ccc", 1)]) == "a    bb\nccc   1"
