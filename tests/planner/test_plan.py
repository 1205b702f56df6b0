"""Check what ``megalora plan`` ranks, rejects and says of layouts: every legal one, once, with its
reason."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megalora.config import LEVELS, LoRAConfig, ParallelConfig, RecomputeLayers
from megalora.config.file import load_config
from megalora.model.fields import model_shape
from megalora.planner import report
from megalora.planner.cost import step_time
from megalora.planner.gpus import GPUS
from megalora.planner.layout_table import layout_table
from megalora.planner.layouts import ParallelLayout, enumerate_layouts
from megalora.planner.memory import fullest_stage
from megalora.planner.models import active_parameters, find_architecture, load_shape
from megalora.planner.recompute_layers import between_levels
from megalora.planner.search import CLOSE, FULL, Plan, Planned, search, search_ranks
from megalora.planner.weights import PlannedModel
from megalora.planner.workload import Workload

ROOT = Path(__file__).parents[2]
WORK = Workload(sequence_length=4096, global_batch_size=32)
SHAPE = load_shape(ROOT / "configs" / "models" / "qwen3_30b_a3b.yaml")


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Qwen3-30B-A3B on one node of eight H100s, 32 samples of 4,096 tokens a step."""
    return search(SHAPE, LoRAConfig(), 8, WORK, GPUS["h100"])


def at_levels(plan: Plan) -> list[ParallelLayout]:
    """Layouts that fit without those that recompute some layers fully, whose number depends on the
    memory there is."""
    found = []
    for planned in plan.fitting:
        if planned.layout.recompute in LEVELS:
            found.append(planned.layout)
    return found


def test_every_legal_layout_is_ranked_or_rejected_once(plan: Plan) -> None:
    found = enumerate_layouts(SHAPE, 8, WORK)
    layouts = at_levels(plan)
    for rejected in plan.rejected:
        assert rejected.reason
        # None: not even a legal layout.
        if rejected.layout is not None:
            layouts.append(rejected.layout)
    assert len(layouts) == len(found.legal)
    assert set(layouts) == set(found.legal)


def test_a_config_of_pairs_is_planned_with_its_reference() -> None:
    """DPO: two sequences a sample, and a forward pass more; SimPO has none."""
    config = load_config(
        ROOT / "configs/sft/template.yaml", ["data.train=x.jsonl", "objective.name=dpo"]
    )
    work = Workload.of(config)
    assert (work.sequences, work.references) == (2, 1)
    assert f"pairs of sequences of {work.sequence_length:,} tokens a step" in work.in_words
    kto = load_config(
        ROOT / "configs/sft/template.yaml", ["data.train=x.jsonl", "objective.name=kto"]
    )
    # Samples of one sequence; the reference's and the model's passes over mismatched ones beside.
    assert Workload.of(kto) == replace(work, references=3, sequences=1)
    assert "samples of" in Workload.of(kto).in_words
    simpo = load_config(
        ROOT / "configs/sft/template.yaml", ["data.train=x.jsonl", "objective.name=simpo"]
    )
    assert Workload.of(simpo) == replace(work, references=0, asks_base=False)
    model = PlannedModel.of(SHAPE, config.lora)
    layout = ParallelLayout(parallel=ParallelConfig(ep=8), num_ranks=8)
    found = step_time(model, layout, work, GPUS["h100"])
    without = step_time(model, layout, replace(work, references=0), GPUS["h100"])
    # A third of forward and backward, as the base is frozen and nothing is recomputed.
    assert 0.2 < found["reference"] / without.seconds < 0.5
    assert found.seconds == pytest.approx(without.seconds + found["reference"])


def test_the_ranking_is_by_time_and_nothing_in_it_is_too_big(plan: Plan) -> None:
    # Fastest first.
    seconds = [planned.time.seconds for planned in plan.fitting]
    assert seconds == sorted(seconds)
    largest = max(planned.memory.peak_bytes for planned in plan.fitting)
    assert largest <= GPUS["h100"].memory_bytes
    # What stands in the ranking is what memory and cost say when they are asked themselves.
    model = PlannedModel.of(SHAPE, LoRAConfig())
    for found in (plan.fitting[0], plan.fitting[-1]):
        assert found.memory == fullest_stage(model, found.layout, WORK)
        assert found.time == step_time(model, found.layout, WORK, GPUS["h100"])


def test_what_does_not_fit_says_so_and_does_not(plan: Plan) -> None:
    model = PlannedModel.of(SHAPE, LoRAConfig())
    too_big = [rejected for rejected in plan.rejected if rejected.layout is not None]
    # Twenty of them: a plan of each takes a while.
    for rejected in too_big[:: max(1, len(too_big) // 20)]:
        assert rejected.layout is not None and rejected.reason.startswith("does not fit: ")
        assert fullest_stage(model, rejected.layout, WORK).peak_bytes > GPUS["h100"].memory_bytes


def sizes_but_vpp(planned: Planned) -> tuple[int, ...]:
    p = planned.layout.parallel
    return p.tp, p.cp, p.pp, p.ep, p.etp


def test_one_line_for_each_way_to_split(plan: Plan) -> None:
    chosen = plan.layouts()
    ways = [sizes_but_vpp(found) for found in chosen]
    assert len(ways) == len(set(ways))
    for found in chosen:
        # The same split with other chunks, microbatches and recomputation.
        variants = []
        safe = []
        for planned in plan.fitting:
            if sizes_but_vpp(planned) != sizes_but_vpp(found):
                continue
            variants.append(planned)
            if plan.share(planned) <= FULL:
                safe.append(planned)
        # Nearly full layouts are the last resort.
        if plan.share(found) > FULL:
            assert not safe
        # Of variants that are about as fast, the one with more memory left is shown.
        fastest = (safe or variants)[0]
        assert found.time.seconds <= (1 + CLOSE) * fastest.time.seconds
    assert plan.share(plan.best()) <= FULL


def test_what_is_counted_once_holds_for_every_layout() -> None:
    """94 layers on 16 GPUs: equal and unequal stages, within a node and over two. A model that has
    counted nothing before says the same of each layout alone."""
    shape = load_shape(ROOT / "configs" / "models" / "qwen3_235b_a22b.yaml")
    counted = PlannedModel.of(shape, LoRAConfig())
    h100 = GPUS["h100"]
    every = enumerate_layouts(shape, 16, WORK, micro_batch_sizes=(1,), recompute=("off", "full"))
    layouts = every.legal[::25]
    assert {layout.parallel.stage_layers is None for layout in layouts} == {True, False}
    # Eight parts of 12 layers each but two, whose messages cross nodes with two stages alone.
    parts = (11, *[12] * 6, 11)
    alike = []
    for pp, vpp in ((2, 4), (8, 1)):
        parallel = ParallelConfig(pp=pp, vpp=vpp, stage_layers=parts)
        alike.append(ParallelLayout(parallel=parallel, num_ranks=16))
    shared = {}
    for layout in (*alike, *layouts):
        shared[layout] = (
            fullest_stage(counted, layout, WORK),
            step_time(counted, layout, WORK, h100),
        )
    for layout in (*alike, *layouts[::4]):
        alone = PlannedModel.of(shape, LoRAConfig())
        memory, time = shared[layout]
        assert memory == fullest_stage(alone, layout, WORK)
        assert time == step_time(alone, layout, WORK, h100)


def test_what_is_not_asked_changes_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many layers must be recomputed is not asked where even fewer would be too slow to be
    shown. On two GPUs it is what decides."""
    work = Workload(sequence_length=2048, global_batch_size=16, imbalance=1.2)
    lora = LoRAConfig(rank=8)
    quick = search(SHAPE, lora, 2, work, GPUS["h100"])

    def of_all(*arguments: Any) -> Any:
        return between_levels(*arguments[:4])

    monkeypatch.setattr("megalora.planner.search.between_levels", of_all)
    whole = search(SHAPE, lora, 2, work, GPUS["h100"])
    assert quick.layouts() == whole.layouts() and quick.rivals() == whole.rivals()
    assert isinstance(quick.best().layout.recompute, RecomputeLayers)
    assert len(quick.fitting) < len(whole.fitting)


def test_a_bigger_machine_fits_more() -> None:
    small = search(SHAPE, LoRAConfig(), 2, WORK, GPUS["h100"])
    big = search(SHAPE, LoRAConfig(), 2, WORK, GPUS["h200"])
    assert set(at_levels(small)) < set(at_levels(big))


def test_ranks_to_try() -> None:
    plans = search_ranks(
        SHAPE,
        LoRAConfig(expert_rank=None),
        8,
        WORK,
        GPUS["h100"],
        lora_ranks=(8, 64, 16),
        recompute=("full",),
    )
    # The config's own 16 first, then those to try, each once.
    assert list(plans) == [16, 8, 64]
    # By rank; of several plans with EP 8 the fastest.
    with_ep_8 = {}
    for rank, plan in plans.items():
        assert plan.lora_rank == plan.best().lora_rank == rank
        for planned in plan.fitting:
            if planned.layout.parallel == ParallelConfig(ep=8):
                with_ep_8.setdefault(rank, planned)
    # Adapters are proportional to their rank.
    assert with_ep_8[64].memory["adapters"] == 8 * with_ep_8[8].memory["adapters"]


def test_nothing_fits() -> None:
    # One GPU has to hold all 57 GiB of weights, which do not fit into 8.
    tiny = replace(GPUS["h100"], memory_bytes=2**33)
    with pytest.raises(
        ValueError,
        match=r"too few: the smallest layout is tp=.*: does not fit: .* of 8\.0 GiB: .* too many",
    ):
        search(SHAPE, LoRAConfig(), 1, WORK, tiny).best()
    # More stages than layers; 53 divides neither the batch nor any size of the model.
    with pytest.raises(ValueError, match=r"no layout is possible; the first of \d+ reasons"):
        search(SHAPE, LoRAConfig(), 53, WORK, tiny).best()


def test_the_host_s_waits_are_named_where_there_are_any(plan: Plan) -> None:
    # Whether experts are divided -> a layout.
    found = {}
    for planned in plan.fitting:
        found[planned.layout.parallel.ep * planned.layout.parallel.etp > 1] = planned
    divided = found[True]
    text = report.waits(divided)
    assert text is not None
    behind_waits_s = divided.time["host behind waits"]
    assert f"50 % is not assumed hidden: {behind_waits_s:.3g} s of a step" in text
    # Full recomputation dispatches tokens, and so waits, once more.
    assert ("recomputed" in text) == (divided.layout.recompute == "full")
    if False in found:
        assert report.waits(found[False]) is None


def test_the_table_says_how_numbers_are_known_and_what_is_nearly_full(plan: Plan) -> None:
    rows = layout_table(plan, 100).splitlines()
    assert len(rows) == 1 + len(plan.layouts()[:100])
    for row in rows[1:]:
        assert "?" in row, "nobody measured an H100 here"
    # "!" marks layouts that are nearly full.
    assert not rows[1].endswith("!") and report.warning(plan, plan.best()) is None
    # On one H100: 57 GiB of weights, 14 of adapters, 3.5 of logits.
    one = search(SHAPE, LoRAConfig(), 1, WORK, GPUS["h100"])
    text = report.warning(one, one.best())
    assert text and "Above 90 %" in text and layout_table(one, 1).endswith("!")


def test_models_are_found_without_a_download(tiny: Path) -> None:
    written = find_architecture(str(ROOT / "configs" / "models" / "qwen3_30b_a3b.yaml"))
    assert find_architecture("Qwen/Qwen3-30B-A3B") == written
    assert find_architecture("Qwen/Qwen3-Coder-30B-A3B-Instruct") == written
    assert find_architecture("Qwen/Qwen3-30B-A3B-Thinking-2507") == written
    large = find_architecture("Qwen/Qwen3-235B-A22B")
    assert find_architecture("Qwen/Qwen3-235B-A22B-Instruct-2507") == large != written
    coder = load_shape(ROOT / "configs" / "models" / "qwen3_coder_480b_a35b_instruct.yaml")
    assert model_shape(find_architecture("Qwen/Qwen3-Coder-480B-A35B-Instruct")) == coder
    # As its name says: 480 billion parameters, of which a token meets 35.
    assert round(coder.num_parameters() / 1e9) == 480
    assert int(active_parameters(coder) / 1e9) == 35
    # Somebody's fine-tuned copy has the same sizes.
    assert find_architecture("anybody/qwen3-30b-a3b") == written
    assert find_architecture(str(tiny))["model_type"] == "qwen3_moe"


def test_layouts_are_written_as_they_are_read() -> None:
    layout = ParallelLayout(parallel=ParallelConfig(tp=2, ep=4), num_ranks=8, recompute="full")
    assert str(layout).startswith("tp=2 cp=1 pp=1 vpp=1 dp=4 ep=4")
