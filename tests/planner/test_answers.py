"""Check what ``megalora plan`` says beside the best layouts: the user's own, other numbers of GPUs,
other LoRA ranks, a larger batch."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megalora.cli.main import main
from megalora.config import ParallelConfig, RunConfig
from megalora.config.file import load_config
from megalora.planner.gpu_counts import fits_from, rented
from megalora.planner.larger_batch import LARGE_BUBBLE, larger_batch_line
from megalora.planner.layout_table import (
    OfCount,
    count_table,
    layout_table,
    short_sizes,
    stages_lines,
)
from megalora.planner.layouts import ParallelLayout, check
from megalora.planner.memory import GIB
from megalora.planner.own_layout import own_layout
from megalora.planner.packing import Packing
from megalora.planner.question import PlanOptions, Question
from megalora.planner.report import own_line
from megalora.planner.search import Plan, evaluate, search
from megalora.planner.training_length import training_length
from megalora.planner.weights import PlannedModel

ROOT = Path(__file__).parents[2]
SMALL = (
    str(ROOT / "configs" / "bench" / "cpu.yaml"),
    f"model.path={ROOT / 'configs' / 'bench' / 'small_moe.yaml'}",
    "model.dtype=bfloat16",
)
"""Four layers, 16 experts, 512 positions: planned in a fraction of a second."""


def config_of(*overrides: str) -> RunConfig:
    path, *always = SMALL
    return load_config(Path(path), [*always, *overrides])


def question_of(*overrides: str, memory_bytes: int | None = None, **options: Any) -> Question:
    """The small model on H100s, of another size where a test needs it."""
    found = Question.of(config_of(*overrides), PlanOptions((1,), "h100", **options))
    if memory_bytes is None:
        return found
    return replace(found, machine=replace(found.machine, memory_bytes=memory_bytes))


def plan_of(question: Question, num_ranks: int) -> Plan:
    config = question.config
    return search(question.shape, config.lora, num_ranks, question.work, question.machine)


def nothing_fits(question: Question) -> Plan:
    """A plan without layouts, where none is needed."""
    return Plan(question.work, question.machine, question.config.lora.rank, [], [])


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """What the command prints for the small model."""
    path, *always = SMALL
    main(["plan", path, *always, *map(str, arguments)])
    return capsys.readouterr().out


def cells(line: str) -> list[str]:
    """Columns of a printed table, which two spaces or more separate."""
    return re.split(r"\s{2,}", line.strip())


# ---- the layout in the file ----------------------------------------------------------------------


def test_the_layout_in_the_file_is_a_row() -> None:
    question = question_of("parallel.tp=2", "parallel.ep=2", "train.recompute=selective")
    plan = plan_of(question, 4)
    own = own_layout(question, 4, 16)
    layout = ParallelLayout.of(question.config, 4)
    model = PlannedModel.of(question.shape, question.config.lora)
    expected = evaluate(model, 16, layout, question.work, question.machine)
    assert own.reason is None and own.planned == expected
    row = cells(layout_table(plan, 1, own).splitlines()[-1])
    low, high = expected.limits
    seconds = f"{low:.3g}-{high:.3g}?"
    assert row[:11] == ["yours", "2", "1", "1", "1", "2", "2", "1", "1", "selective", seconds]
    # What it costs beside the choice is said in words.
    assert re.match(r"yours takes [\d.]+ to [\d.]+ times as long", own_line(own, plan.best()))
    # Of another rank the same layout needs more.
    wider = own_layout(question, 4, 64).planned
    assert wider is not None and wider.lora_rank == 64
    assert wider.memory["adapters"] == 4 * expected.memory["adapters"]


def test_unequal_stages_are_named_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of three GPUs no batch of eight is shared out: four layers lie on three stages."""
    out = tmp_path / "planned.yaml"
    said = run(capsys, "--gpus", 3, "--gpu", "h100", "--out", out, "train.global_batch_size=8")
    assert "not equal: pp 3 vpp 1 1/2/1\n" in said
    config = load_config(out)
    assert (config.parallel.pp, config.parallel.stage_layers) == (3, (1, 2, 1))
    question = question_of("train.global_batch_size=8")
    check(question.shape, ParallelLayout.of(config, 3), question.work)
    # The file's own stages stand beside those of the table.
    own = own_layout(question_of("parallel={pp: 2, stage_layers: [3, 1]}"), 2, 16)
    assert stages_lines(nothing_fits(question), 1, own) == (
        "layers of stages (or chunks, in the order of tokens) not equal: yours 3/1"
    )
    assert stages_lines(nothing_fits(question), 1) is None
    assert short_sizes((5, 6, 6, 6, 6, 5, 5)) == "5/6x4/5/5"


def test_rows_of_tokens_stand_in_the_column_of_the_others() -> None:
    """The file fills rows by tokens, and no lengths are known: others have samples in a row."""
    question = question_of("train.micro_batch_tokens=1026")
    text = layout_table(nothing_fits(question), 1, own_layout(question, 1, 16))
    head, row = text.splitlines()
    assert "row" not in cells(head)
    # The label has no name: a row has one cell more than the head.
    assert cells(row)[cells(head).index("micro") + 1] == "row 1026"


def test_a_layout_of_the_file_that_is_the_choice() -> None:
    question = question_of()
    best = plan_of(question, 2).best()
    p = best.layout.parallel
    sizes = [f"parallel.{name}={getattr(p, name)}" for name in ("tp", "pp", "vpp", "ep", "etp")]
    rows = [f"train.micro_batch_size={best.layout.micro_batch_size}"]
    rows.append(f"train.recompute={best.layout.recompute}")
    own = own_layout(question_of(*sizes, *rows), 2, 16)
    assert own.planned == best and own_line(own, best) == "yours is the choice"


def test_a_layout_of_the_file_that_is_too_big_says_by_how_much() -> None:
    whole = own_layout(question_of(), 1, 16).planned
    assert whole is not None
    # A mebibyte of 2^20 bytes too few.
    limit = whole.memory.peak_bytes - 2**20
    question = question_of(memory_bytes=limit)
    own = own_layout(question, 1, 16)
    assert own.reason is not None and own.planned is not None
    assert own.reason.startswith("does not fit: ")
    assert own.reason.endswith(f"of {limit / GIB:.1f} GiB: {2**20 / GIB:.1f} GiB too many")
    # Memory is shown, time is not: such a step never ends.
    row = cells(layout_table(nothing_fits(question), 1, own).splitlines()[-1])
    assert row[0] == "yours" and row[-4:-2] == ["-", "-"] and row[-1].endswith("% !")
    assert own_line(own, None) == f"yours: {own.reason}"


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        # 3 ranks of experts fill no world of 4.
        (["parallel.ep=3"], "4 ranks cannot hold the expert grid"),
        (["train.micro_batch_size=5"], "train.global_batch_size=16 cannot be divided"),
        (["parallel.pp=4", "parallel.vpp=2"], "parallel.pp * vpp=8 does not divide"),
    ],
)
def test_a_layout_of_the_file_that_is_not_legal_says_why(overrides: list[str], reason: str) -> None:
    # Where lengths are known, the rows of other layouts are made to fit: the file's are not.
    question = question_of(*overrides, mean_length=100)
    own = own_layout(question, 4, 16)
    assert own.planned is None and own.reason is not None
    assert own.reason.startswith("not legal: ") and reason in own.reason
    assert "\n" not in own.reason
    row = cells(layout_table(nothing_fits(question), 2, own).splitlines()[-1])
    assert row[0] == "yours" and row[-4:] == ["-"] * 4


def test_rows_of_a_number_of_samples_are_as_long_as_their_samples() -> None:
    """``train.micro_batch_size`` rows, where lengths are known: two samples in their order, on two
    ranks, as long as the longer row of a round."""
    packing = Packing((10, 50, 20, 20, 5, 5, 30, 40), "test")
    use = packing.use(1000, 2, ParallelConfig(), 2)
    # Rounds: ranks 0 and 1 with 60 and 40 tokens, then 10 and 70.
    assert use.num_rounds == 2
    assert use.row_tokens == (60 + 70) / 2
    assert use.used == pytest.approx(180 / (2 * 60 + 2 * 70))
    # The same samples packed to fill rows of 1,000 are one round.
    assert packing.use(1000, 2, ParallelConfig()).num_rounds == 1
    question = question_of(mean_length=100)
    own = own_layout(question, 1, 16)
    full = own_layout(question_of(), 1, 16)
    assert own.planned is not None and full.planned is not None
    # A row for each of 16 samples, though four would fit one.
    layout = own.planned.layout
    assert layout.num_microbatches(question.work) == 16
    filled = replace(layout, micro_batch_tokens=question.work.sequence_length)
    assert filled.num_microbatches(question.work) < 16
    # A fifth of the tokens: less time, and tokens per second of those alone.
    assert own.planned.time.seconds < full.planned.time.seconds
    speed = own.planned.tokens_per_second(question.work)
    assert speed == pytest.approx(16 * 100 / own.planned.time.seconds)


# ---- numbers of GPUs -----------------------------------------------------------------------------


def test_numbers_of_gpus_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    said = run(capsys, "--gpus", "1,2,3", "--samples", "3200", "train.steps=null", "train.epochs=2")
    # 2 epochs of 3,200 samples, 16 a step.
    assert "GPU-hours for train.epochs=2 of 3,200 samples: 400 steps" in said
    lines = said.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("GPUs"))
    names = cells(lines[head])
    question = question_of()
    for num_gpus in (1, 2):
        row = dict(zip(names, cells(lines[head + num_gpus]), strict=True))
        best = plan_of(question, num_gpus).best()
        low, high = best.limits
        assert row["GPUs"] == str(num_gpus)
        # 16 samples of 513 tokens a step, in thousands.
        slow, fast = (16 * 513 / seconds / 1000 for seconds in (high, low))
        assert slow > 100
        assert row["tokens/s"] == f"{slow:,.0f}k-{fast:,.0f}k?"
        low_hours, high_hours = (400 * seconds / 3600 * num_gpus for seconds in (low, high))
        assert row["GPU-hours"] == f"{low_hours:.3g}-{high_hours:.3g}?"
        assert row["layout"].startswith(f"dp{num_gpus} " if num_gpus > 1 else "micro")
    # 3 divides no batch of 16, and the file's own layout is one that takes any number.
    assert cells(lines[head + 3])[0] == "3"
    assert "fits from 1 GPU\n" in said


def test_numbers_that_are_too_small_have_a_reason_and_the_smallest_is_named() -> None:
    question = question_of(memory_bytes=int(1.55 * GIB))
    counts = []
    for num_gpus in (1, 2):
        own = own_layout(question, num_gpus, 16)
        counts.append(OfCount(num_gpus, plan_of(question, num_gpus), own))
    assert not counts[0].plan.fitting and counts[1].plan.fitting
    rows = count_table(counts, 10).splitlines()
    assert cells(rows[1]) == ["1", *"------", "too big"]
    reason = counts[0].plan.why_nothing_fits()
    assert reason.startswith("1 x H100 SXM 80 GB are too few: the smallest layout is tp=1")


def test_the_smallest_number_is_that_of_a_whole_search() -> None:
    question = question_of()
    needs = {}
    for num_gpus in (1, 2, 4):
        found = search(
            question.shape, question.config.lora, num_gpus, question.work, question.machine,
            micro_batch_sizes=(1, 2), recompute=("selective", "full"),
        )  # fmt: skip
        needs[num_gpus] = min(planned.memory.peak_bytes for planned in found.fitting)
    assert needs[1] > needs[2] > needs[4]
    # Room for each of them, and a byte less.
    for num_gpus, peak in needs.items():
        assert fits_from(question_of(memory_bytes=peak), 16) == num_gpus
        smaller = fits_from(question_of(memory_bytes=peak - 1), 16)
        assert smaller is None or smaller > num_gpus


def test_numbers_that_are_rented() -> None:
    assert list(rented(8))[:12] == [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192]
    # NVL72: powers of two within its domain.
    assert list(rented(72))[:9] == [1, 2, 4, 8, 16, 32, 64, 72, 144]
    assert list(rented(1))[:5] == [1, 2, 3, 4, 6]


def test_nothing_that_fits_names_the_number_that_does(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(capsys, "--gpus", "1", "model.path=Qwen/Qwen3-235B-A22B")
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert re.search(r"1 x H100 SXM 80 GB are too few: .* It fits from 8 GPUs: --gpus 8", said.err)
    # The layout in the file is a row also where it is the only one.
    assert re.search(r"^yours +1 .*\d %", said.out, re.MULTILINE)
    assert "yours: does not fit: " in said.out


def test_the_length_of_training(tmp_path: Path) -> None:
    assert training_length(question_of()).num_steps == 10
    epochs = ("train.steps=null", "train.epochs=1.5")
    # 1.5 * 64 / 16
    assert training_length(question_of(*epochs, samples=64)).num_steps == 6
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "x"}\n' * 160)
    counted = training_length(question_of(*epochs, f"data.train={rows}"))
    assert counted.num_steps == 15 and "160 samples" in counted.what
    # Nothing is known of data that is not here: a billion tokens, in steps of 16 samples.
    unknown = training_length(question_of(*epochs, "data.train=gone.jsonl"))
    assert unknown.num_steps == pytest.approx(1e9 / (16 * 513))
    assert "--samples" in unknown.what


def test_files_are_of_one_number(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for option in ("--out", "--figure", "--rejected"):
        with pytest.raises(SystemExit):
            run(capsys, "--gpus", "1,2", option, tmp_path / "x.png")
        assert f"{option} is of one number of GPUs" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(capsys, "--gpus", "1,2", "--dry-run", "0")
    assert "--dry-run builds a rank of one number" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(capsys, "--gpus", "1", "--samples", "0")
    assert "--samples 0: a data set has at least 1" in capsys.readouterr().err


# ---- ranks, batch --------------------------------------------------------------------------------


def test_a_block_for_each_rank(capsys: pytest.CaptureFixture[str]) -> None:
    said = run(capsys, "--gpus", "1", "--top", "2", "--lora-rank", "8,64")
    blocks = re.split(r"\nLoRA rank (\d+), layouts", said)
    # The file's own rank first.
    assert blocks[1::2] == ["16", "8", "64"]
    for rank, block in zip((16, 8, 64), blocks[2::2], strict=True):
        question = question_of(f"lora.rank={rank}")
        plan = plan_of(question, 1)
        own = own_layout(question, 1, rank)
        assert f"\n{layout_table(plan, 2, own)}\n" in block
    # Memory and time in parts are those of the file's rank.
    assert said.count("memory of the fullest rank") == 1


def test_what_a_larger_batch_gives() -> None:
    question = question_of(
        "parallel.pp=4", "train.global_batch_size=8", "train.recompute=full", mean_length=500
    )
    plan = nothing_fits(question)
    own = own_layout(question, 4, 16).planned
    assert own is not None
    bubble = own.time["bubble"] / own.time.seconds
    assert bubble > LARGE_BUBBLE
    line = larger_batch_line(question, plan, own)
    assert line is not None and f"bubble is {100 * bubble:.0f} % of a step" in line
    # A plan of the same layout that was asked for the larger batch says the same.
    for batch in (16, 32):
        larger = question_of(
            "parallel.pp=4", f"train.global_batch_size={batch}", "train.recompute=full",
            mean_length=500,
        )  # fmt: skip
        found = own_layout(larger, 4, 16).planned
        assert found is not None
        share = found.time["bubble"] / found.time.seconds
        gains = []
        times = [(own.time.seconds, found.time.seconds)]
        times += zip(own.by_scenario, found.by_scenario, strict=True)
        for before, after in times:
            gains.append(100 * (batch / 8 * before / after - 1))
        assert min(gains) > 0
        low, high = f"{min(gains):.0f}", f"{max(gains):.0f}"
        gain = low if low == high else f"{low} to {high}"
        assert (
            f"train.global_batch_size={batch} gives {gain} % more tokens/s (bubble"
            f" {100 * share:.0f} %)"
        ) in line
    # No stages, no bubble, no line.
    alone = own_layout(question_of(), 4, 16).planned
    assert alone is not None and larger_batch_line(question, plan, alone) is None
