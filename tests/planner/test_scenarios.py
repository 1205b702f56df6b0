"""Check the limits of times on assumed rates against what was measured on an H100, and the choice
among layouts that they cannot tell apart against the rule written anew."""

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.model_plan import RESULTS, beside_measured
from megalora.config import LoRAConfig, ParallelConfig
from megalora.planner.cost import step_time
from megalora.planner.gpus import GPUS, read_machine
from megalora.planner.hardware import Constant, Links, Machine, Overhead, Roofline
from megalora.planner.layout_table import layout_table, seconds_text, speed_text
from megalora.planner.layouts import ParallelLayout
from megalora.planner.models import load_shape
from megalora.planner.own_layout import OwnLayout
from megalora.planner.prices import BEHIND_WAITS
from megalora.planner.report import own_line, rivals_line
from megalora.planner.scenarios import COMPUTE, EXPOSED, HOST, LINKS, scenarios
from megalora.planner.search import CLOSE, FULL, LESS, Plan, Planned, evaluate, search
from megalora.planner.weights import PlannedModel
from megalora.planner.workload import Workload

MODELS = Path(__file__).parents[2] / "configs" / "models"
SHAPE = load_shape(MODELS / "qwen3_30b_a3b.yaml")
WORK = Workload(sequence_length=4096, global_batch_size=64, imbalance=1.2)
SMALL = replace(WORK, global_batch_size=32)
"""Its bubbles are longer, so that pipelines and experts on all ranks are rivals."""
H100 = GPUS["h100"]
CALIBRATION = RESULTS / "gpu_calibration.json"
NO_HOST = Overhead(0.0, 0.0, 0.0, hidden=True, basis="measured")


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Qwen3-30B-A3B on eight H100s; what is recomputed in part takes longest and is left out."""
    return search(SHAPE, LoRAConfig(), 8, SMALL, H100, recompute=("off", "full"))


def planned(recompute: str = "off", machine: Machine = H100, **sizes: int) -> Planned:
    layout = ParallelLayout(parallel=ParallelConfig(**sizes), num_ranks=8, recompute=recompute)  # pyright: ignore
    return evaluate(PlannedModel.of(SHAPE, LoRAConfig()), 16, layout, WORK, machine)


# ---- scenarios -----------------------------------------------------------------------------------


def by_hand(compute: float, links: float, host: int) -> Machine:
    """An H100 with other rates, written down number by number; ``host``: 0 low, 1 high."""
    traffic = 3.0e12 * compute
    times = HOST[host]
    return replace(
        H100,
        gemm=Roofline(790e12 * compute, traffic),
        grouped_gemm=Roofline(637e12 * compute, traffic),
        attention=Constant(420e12 * compute),
        attention_backward=Constant(140e12 * compute),
        memory=Constant(traffic),
        network=Links(340e9 * links, 42e9 * links, 20e-6 / links, 40e-6 / links),
        overhead=Overhead(
            2.6e-3 * times, 1.8e-3 * times, 11.4e-3 * times, True, "assumed", EXPOSED[host]
        ),
    )


def test_a_scenario_is_a_machine_with_all_three_at_a_limit() -> None:
    model = PlannedModel.of(SHAPE, LoRAConfig())
    for found in (planned(ep=8), planned(tp=2, pp=2, vpp=4, ep=2, recompute="full")):
        expected = []
        for compute, links, host in itertools.product(COMPUTE, LINKS, (0, 1)):
            machine = by_hand(compute, links, host)
            expected.append(step_time(model, found.layout, WORK, machine).seconds)
        assert sorted(found.by_scenario) == pytest.approx(sorted(expected))
        assert found.limits == pytest.approx((min(expected), max(expected)))
        assert found.limits[0] < found.time.seconds < found.limits[1]


def test_what_was_measured_has_one_time() -> None:
    measured = read_machine(CALIBRATION)
    # One GPU was calibrated: links to others are those of the table.
    links = {machine.network.beyond.inside_bytes_per_s for machine in scenarios(measured)}  # pyright: ignore
    assert links == {340e9 * factor for factor in LINKS}
    for machine in scenarios(measured):
        assert machine.gemm == measured.gemm and machine.overhead == measured.overhead
    assert scenarios(replace(measured, network=replace(measured.network, beyond=None))) == []  # pyright: ignore
    # Data-parallel ranks talk once a step: nearly all of the time was measured.
    found = planned(machine=replace(measured, ranks_per_node=8))
    assert found.time.basis != "assumed"
    assert re.fullmatch(r"[\d.]+[~^]?", seconds_text(found))


def test_limits_hold_what_was_measured() -> None:
    """Steps measured on an H100, of 8 and 32 layers, lie between the limits of their prediction
    from the table, and so does the device's time by measured rates in 80 layouts."""
    cases = [case for case in beside_measured() if case["rates"] == "table"]
    assert [case["layers"] for case in cases] == [32, 8]
    for case in cases:
        low, high = case["limits_ms"]
        assert low < case["step_ms"]["measured"] < high
    table = replace(H100, overhead=NO_HOST)
    calibrated = read_machine(CALIBRATION)
    measured = replace(calibrated, overhead=NO_HOST, network=H100.network, ranks_per_node=8)
    ratios = []
    for name in ("qwen3_30b_a3b", "qwen3_235b_a22b"):
        model = PlannedModel.of(load_shape(MODELS / f"{name}.yaml"), LoRAConfig())
        sizes = itertools.product((1, 2, 4, 8), (1, 4, 8), (1, 2), (1, 4))
        for tp, ep, etp, micro in sizes:
            if ep * etp > 8:
                continue
            parallel = ParallelConfig(tp=tp, ep=ep, etp=etp)
            layout = ParallelLayout(parallel=parallel, num_ranks=8, micro_batch_size=micro)
            by_rates = []
            for machine in (table, measured):
                found = step_time(model, layout, WORK, machine)
                parts = ("attention", "experts", "head", "other", "optimizer")
                by_rates.append(sum(found[part] for part in parts))
            ratios.append(by_rates[0] / by_rates[1])
    assert len(ratios) == 80
    low, high = COMPUTE
    assert low < min(ratios) < 0.76 and 1.13 < max(ratios) < high


def test_half_of_what_is_behind_waits_is_hidden() -> None:
    """By hand, for 48 layers and 8 microbatches: between all of the host's forward and what is
    slower than the device."""
    parts = {}
    for exposed in (0.0, 0.25, 1.0):
        over = replace(H100.overhead, layer_forward_s=50e-3, exposed=exposed)
        parts[exposed] = planned(machine=replace(H100, overhead=over), ep=8).time[BEHIND_WAITS]
    assert parts[1.0] == pytest.approx(8 * 48 * 50e-3)
    assert 0 < parts[0.0] < parts[1.0]
    assert parts[0.25] == pytest.approx(0.25 * parts[1.0] + 0.75 * parts[0.0])
    # A device that is slower than the host hides all that may be hidden.
    over = replace(H100.overhead, layer_forward_s=1e-6, exposed=0.0)
    assert planned(machine=replace(H100, overhead=over), ep=8).time[BEHIND_WAITS] == 0


# ---- the choice ----------------------------------------------------------------------------------


def test_recomputing_more_is_surely_slower_though_ranges_overlap() -> None:
    off = planned("off", ep=8)
    full = planned("full", ep=8)
    assert full.limits[0] < off.limits[1]
    assert full.is_surely_slower(off) and not off.is_surely_slower(full)
    assert not off.is_surely_slower(off)
    # Experts whole on every rank wait for nobody: whether that pays decides the host.
    pipeline = planned(pp=2, vpp=2)
    experts = planned(ep=2)
    assert pipeline.time.seconds < experts.time.seconds
    assert not experts.is_surely_slower(pipeline)


def test_the_choice_is_that_of_the_rule(plan: Plan) -> None:
    """Fewest parts, then memory, then time, of all that may be the fastest."""
    rows = plan.layouts()
    safe = [found for found in rows if plan.share(found) <= FULL]
    fastest = min(safe, key=lambda found: found.time.seconds)
    beaten = set()
    for found, other in itertools.permutations(safe, 2):
        pairs = zip(found.by_scenario, other.by_scenario, strict=True)
        if min(own / others for own, others in pairs) > 1 + CLOSE:
            beaten.add(id(found))
    rivals = [found for found in safe if id(found) not in beaten]
    # Also of those that are far behind, which the search does not ask.
    assert sorted(map(id, rivals)) == sorted(map(id, plan.rivals()))
    assert len(rivals) > 1
    p = plan.best().layout.parallel
    assert plan.best() is rows[0] and plan.best() is not fastest
    assert (p.tp, p.pp, p.vpp, p.ep) == (1, 1, 1, 2)
    for found in rivals:
        q = found.layout.parallel
        assert p.pp * p.vpp <= q.pp * q.vpp
        if p.pp * p.vpp == q.pp * q.vpp:
            assert plan.share(plan.best()) <= plan.share(found) + LESS
    # Rivals first, then the rest; each of them fastest first.
    assert {id(found) for found in rows[: len(rivals)]} == set(map(id, rivals))
    for part in (rows[1 : len(rivals)], rows[len(rivals) :]):
        assert [f.time.seconds for f in part] == sorted(f.time.seconds for f in part)


def made_up(by_scenario: tuple[float, float], gib: int, **sizes: int) -> Planned:
    """A layout that takes so long in two scenarios, at the middle as long as in the first."""
    found = planned(**sizes)
    part = replace(found.memory.parts[0], num_bytes=gib * 2**30)
    (first, *_) = found.time.parts
    time = replace(found.time, parts=(replace(first, seconds=by_scenario[0]),))
    found = replace(found, memory=replace(found.memory, parts=(part,)), time=time)
    found.__dict__["by_scenario"] = by_scenario
    return found


def test_who_is_beaten_by_any_other_is_no_rival() -> None:
    """Two stages may be faster than the fastest, in the second scenario; but four in two chunks
    each are in both."""
    fastest = made_up((1.0, 3.0), 60, pp=8, vpp=2)
    beaten = made_up((1.4, 2.0), 60, pp=2)
    better = made_up((1.3, 1.9), 60, pp=4, vpp=2)
    plan = Plan(WORK, H100, 16, [fastest, better, beaten], [])
    assert not beaten.is_surely_slower(fastest) and beaten.is_surely_slower(better)
    assert plan.rivals() == [fastest, better]
    assert plan.layouts() == [better, fastest, beaten]


def test_stages_of_many_chunks_count_as_many_parts() -> None:
    """2 x 12 parts send every microbatch more often than 4 x 2, and each of these may be the
    fastest."""
    few = made_up((1.1, 2.0), 60, pp=4, vpp=2)
    many = made_up((1.0, 2.1), 50, pp=2, vpp=12)
    plan = Plan(WORK, H100, 16, [many, few], [])
    assert plan.rivals() == [many, few] and plan.best() is few
    line = rivals_line(plan, 2)
    assert line is not None and "Row 1 is chosen for fewest parts of the model;" in line
    # Variants of one way within 3 %: fewest chunks come before least memory here too.
    less = made_up((1.02, 2.0), 70, pp=2, vpp=3)
    assert Plan(WORK, H100, 16, [many, less], []).layouts() == [less]


def test_less_memory_comes_before_less_time() -> None:
    """Three made-up layouts without stages, of which rates cannot tell the fastest."""
    made = []
    for ep, seconds, gib in ((1, 1.0, 60), (2, 1.01, 40), (4, 1.02, 38)):
        made.append(made_up((seconds, 2 * seconds), gib, ep=ep))
    plan = Plan(WORK, H100, 16, made, [])
    # 38 and 40 of 78 GiB count as the same, and 40 takes less time.
    assert plan.best() is made[1]
    assert plan.rivals() == made
    line = rivals_line(plan, 2)
    assert line is not None and line.startswith("rows 1 to 2 and 1 more cannot be told apart")
    assert "least memory, then least time" in line and "parts" not in line
    # One that is slower in every scenario is no rival, whatever it needs.
    made[1].__dict__["by_scenario"] = (1.2, 2.4)
    made[2].__dict__["by_scenario"] = (1.2, 2.4)
    assert plan.rivals() == made[:1] and plan.best() is made[0]
    alone = rivals_line(plan, 2)
    assert alone is not None and alone.startswith("row 1 is the fastest at both limits")


def test_ranges_are_printed(plan: Plan) -> None:
    best = plan.best()
    low, high = best.limits
    lines = layout_table(plan, 3).splitlines()
    assert f" {low:.3g}-{high:.3g}? " in lines[1]
    slow, fast = best.tokens_per_second(SMALL, high), best.tokens_per_second(SMALL, low)
    assert f" {slow:,.0f}-{fast:,.0f}? " in lines[1]
    assert slow == pytest.approx(32 * 4096 / high / 8)
    assert speed_text(plan, best, "{:.0f}".format, 8) == f"{8 * slow:.0f}-{8 * fast:.0f}?"
    # A terminal of 100 columns.
    assert max(map(len, lines)) <= 100
    line = rivals_line(plan, 10)
    assert line is not None and f"rows 1 to {len(plan.rivals())} cannot" in line
    assert "Row 1 is chosen for fewest parts of the model" in line
    # The file's layout beside the choice: errors are shared, so that the ratio is known better.
    own = plan.rivals()[0]
    ratios = [own.time.seconds / best.time.seconds]
    for ours, theirs in zip(own.by_scenario, best.by_scenario, strict=True):
        ratios.append(ours / theirs)
    parallel = own.layout.parallel
    said = own_line(OwnLayout(parallel, None, own.layout, own, None), best)  # pyright: ignore
    assert f"yours takes {min(ratios):.2f} to {max(ratios):.2f} times as long" in said


def test_the_record_has_the_limits() -> None:
    for case in json.loads((RESULTS / "gpu_planner.json").read_text()):
        low, high = case["limits_ms"]
        assert (low < high) == (case["rates"] == "table")
        assert low <= case["step_ms"]["predicted"] <= high
