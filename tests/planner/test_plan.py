"""Check ``megalora plan`` as a user meets it: the ranking, the reasons, the config that runs, the
picture, mistakes, and how much work it is."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megalora.cli.main import main
from megalora.config import LEVELS, LoRAConfig, ParallelConfig
from megalora.config.file import load_config
from megalora.planner import report
from megalora.planner.command import make_plan
from megalora.planner.cost import step_time
from megalora.planner.gpus import GPUS
from megalora.planner.layout_table import layout_table
from megalora.planner.layouts import ParallelLayout, Workload, enumerate_layouts
from megalora.planner.memory import fullest_stage
from megalora.planner.models import find_architecture, load_shape
from megalora.planner.question import PlanOptions
from megalora.planner.search import CLOSE, FULL, Plan, Planned, search, search_ranks
from megalora.planner.weights import PlannedModel
from megalora.tiny import make_tiny

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "qwen3_30b_a3b_8gpu.yaml"
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
    # 7 divides neither the batch nor any size of the model.
    with pytest.raises(ValueError, match=r"no layout is possible; the first of \d+ reasons"):
        search(SHAPE, LoRAConfig(), 7, WORK, tiny).best()


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """What the command prints."""
    main(["plan", *map(str, arguments)])
    return capsys.readouterr().out


@pytest.mark.slow
def test_the_command_writes_a_config_that_runs_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The best layout of this plan may have no wait; that the sentence is printed is tested here.
    monkeypatch.setattr(report, "waits", lambda best: "where the host waits")
    # The folder does not exist yet.
    out = tmp_path / "deep" / "x.yaml"
    png = tmp_path / "x.png"
    rejected = tmp_path / "rejected.tsv"
    files = ["--out", out, "--figure", png, "--rejected", rejected]
    said = run(capsys, CONFIG, "--gpus", 8, "--gpu", "h100", *files, "lora.rank=8")
    config = load_config(out)
    before = load_config(CONFIG, ["lora.rank=8"])
    # Nothing but the layout, the microbatch and the recomputation is changed.
    planned_train = replace(config.train, micro_batch_size=1, recompute="off")
    assert planned_train == replace(before.train, micro_batch_size=1, recompute="off")
    assert replace(config, parallel=before.parallel, train=before.train) == before
    config.check_world(8)
    plan = make_plan(before, PlanOptions(gpus=(8,), gpu="h100"))
    best = plan.best()
    assert config.parallel == best.layout.parallel
    assert config.train.recompute == best.layout.recompute
    # The file says in comments what was predicted of it.
    comment = [line for line in out.read_text().splitlines() if line.startswith("#")]
    assert f"{best.memory.peak_bytes / 2**30:.1f} GiB" in comment[2]
    assert f"{best.time.seconds:.2f} s" in comment[3]
    # A line for each, which is too much for a terminal.
    assert len(rejected.read_text().splitlines()) == len(plan.rejected)
    from matplotlib.image import imread

    picture = imread(png)
    # Not one colour all over.
    assert picture.shape[0] > 300 and picture.std() > 0.05
    for part in (*best.memory.parts, *best.time.parts):
        line = rf"^ *{re.escape(part.name)}\b.*{re.escape(part.basis)}"
        assert re.search(line, said, re.MULTILINE), part.name
    # Reasons are grouped with "#" for the numbers in which they differ.
    assert "layouts are rejected" in said and "does not fit: # GiB" in said
    assert "where the host waits" in said


def test_the_host_s_waits_are_named_where_there_are_any(plan: Plan) -> None:
    # Whether experts are divided -> a layout.
    found = {}
    for planned in plan.fitting:
        found[planned.layout.parallel.ep * planned.layout.parallel.etp > 1] = planned
    divided = found[True]
    text = report.waits(divided)
    assert text is not None
    behind_waits_s = divided.time["host behind waits"]
    assert f"not assumed hidden: {behind_waits_s:.3g} s of a step" in text
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "at least 1 rank"),
        (["--gpus", "8", "--gpu", "h1"], "--gpu h1 is neither"),
        (["--gpus", "8", "--top", "0"], "--top 0: show at least 1"),
        (["--gpus", "8", "--imbalance", "0.5"], "so at least 1, got 0.5"),
        (["--gpus", "8", "--lora-rank", "0"], "--lora-rank 0: a rank is at least 1"),
        (["--gpus", "8", "--mean-length", "1"], "must lie between 2 and data.max_length=4096"),
        (["--gpus", "8", "--mean-length", "4097"], "--mean-length 4097: must lie between"),
        (["--gpus", "8", "--imbalance", "inf"], "--imbalance inf: must be a finite number"),
        (["--gpus", "8", "--out", "/tmp"], "/tmp is a folder; name the file to write"),
        (["--gpus", "8", "--out", "/proc/x/y.yaml"], "/proc/x/y.yaml cannot be written"),
        (["--gpus", "8", "--figure", "x.foo"], "end it in .png, .pdf or .svg"),
        (
            ["--gpus", "8", "model.dtype=float32"],
            "the rates of H100 SXM 80 GB are those of bfloat16",
        ),
        (["--gpus", "8", "--gpus-per-node", "0"], "a node has at least 1 GPU"),
        (
            ["--gpus", "8", "model.path=nobody/nothing"],
            r"neither a folder with a config\.json nor a model of .*qwen3_30b_a3b\.yaml",
        ),
        (["--gpus", "8", "lora.dropout=0.1"], r"lora\.dropout=0\.1: what dropout keeps"),
        (["--gpus", "8", "lora.rnak=3"], "did you mean lora.rank"),
        (["--gpus", "8", "--dry-run", "8"], "--dry-run 8: ranks of 8 GPUs count from 0 to 7"),
        (["--gpus", "8", "--dry-run", "0", "parallel.ep=3"], "8 ranks cannot hold the expert grid"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(CONFIG), *arguments])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert re.search(message, error), error


def test_rejected_layouts_are_listed_where_nothing_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """235B parameters on one GPU: the command fails, and the file says why each layout does not
    fit."""
    rejected = tmp_path / "rejected.tsv"
    with pytest.raises(SystemExit) as ended:
        run(capsys, CONFIG, "--gpus", 1, "--rejected", rejected, "model.path=Qwen/Qwen3-235B-A22B")
    assert ended.value.code == 2
    assert "It fits from 8 GPUs" in capsys.readouterr().err
    lines = rejected.read_text().splitlines()
    # Four microbatches, each with three levels of recomputation.
    assert len(lines) == 12
    for line in lines:
        assert "\tdoes not fit: " in line


def test_models_are_found_without_a_download(tiny: Path) -> None:
    written = find_architecture(str(ROOT / "configs" / "models" / "qwen3_30b_a3b.yaml"))
    assert find_architecture("Qwen/Qwen3-30B-A3B") == written
    assert find_architecture("Qwen/Qwen3-Coder-30B-A3B-Instruct") == written
    assert find_architecture("Qwen/Qwen3-30B-A3B-Thinking-2507") == written
    large = find_architecture("Qwen/Qwen3-235B-A22B")
    assert find_architecture("Qwen/Qwen3-235B-A22B-Instruct-2507") == large != written
    # Somebody's fine-tuned copy has the same sizes.
    assert find_architecture("anybody/qwen3-30b-a3b") == written
    assert find_architecture(str(tiny))["model_type"] == "qwen3_moe"


def test_a_dry_run_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    layout = ["parallel.pp=2", "parallel.ep=4", "parallel.tp=2"]
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(CONFIG), "--gpus", "16", "--dry-run", "13", *layout])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    # Ranks 8 to 15 are the second stage.
    assert said.startswith("rank 13 of 16, stage 1:")
    # Weights, adapters and buffers.
    assert said.count("the same") == 3 and "DIFFERENT" not in said


def test_a_dry_run_agrees_where_routers_have_buffers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """GLM's correction biases are buffers, not parameters, and must be counted on both sides."""
    base = make_tiny(tmp_path / "glm", arch="glm4_moe")
    layout = [f"model.path={base}", "train.global_batch_size=8", "parallel.ep=2", "parallel.pp=2"]
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(CONFIG), "--gpus", "4", "--dry-run", "2", *layout])
    said = capsys.readouterr().out
    assert ended.value.code == 0, said
    # Layers 2 and 3 of four, with 8 experts each, a bias and a count of 4 bytes for each.
    assert re.search(r"buffers +built +128 bytes +planned +128 +the same", said), said


@pytest.mark.parametrize(
    ("num_gpus", "most_calls"),
    [
        pytest.param(16, 8_000_000, marks=pytest.mark.slow),
        pytest.param(256, 40_000_000, marks=pytest.mark.slow),
    ],
)
def test_235b_is_planned_without_torch(num_gpus: int, most_calls: int) -> None:
    """Work is bounded in calls of Python functions, so that no machine is too slow for it. On
    2026-11-26: 3.9 million for 16 GPUs and 22.9 million for 256, which take 7 s without the
    counter."""
    code = f"""
import sys
from megalora.cli.main import main
calls = 0
def count(frame, event, argument):
    global calls
    calls += event == "call"
sys.setprofile(count)
main(["plan", {str(CONFIG)!r}, "--gpus", "{num_gpus}", "model.path=Qwen/Qwen3-235B-A22B",
      "train.global_batch_size=256"])
sys.setprofile(None)
print("calls", calls, {{"torch", "megatron", "transformers"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    _, calls, imported = done.stdout.splitlines()[-1].split(maxsplit=2)
    assert imported == "set()" and "235B" in done.stdout
    assert int(calls) < most_calls


def test_layouts_are_written_as_they_are_read() -> None:
    layout = ParallelLayout(parallel=ParallelConfig(tp=2, ep=4), num_ranks=8, recompute="full")
    assert str(layout).startswith("tp=2 cp=1 pp=1 vpp=1 dp=4 ep=4")
