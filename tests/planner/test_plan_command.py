"""Check ``megalora plan`` as a user meets it: the config that runs, the picture, mistakes, dry
runs, and how much work a plan is."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megalora.cli.main import main
from megalora.config.file import load_config
from megalora.planner import report
from megalora.planner.models import load_shape
from megalora.planner.question import PlanOptions, Question
from megalora.planner.search import search
from megalora.planner.workload import Workload
from megalora.tiny import make_tiny

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "sft" / "qwen3_30b_a3b_8xh100_4k.yaml"
WORK = Workload(sequence_length=4096, global_batch_size=32)
SHAPE = load_shape(ROOT / "configs" / "models" / "qwen3_30b_a3b.yaml")


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
    assert said.count("host memory of a rank for checkpoints: ") == 1
    config = load_config(out)
    before = load_config(CONFIG, ["lora.rank=8"])
    # Nothing but the layout, the microbatch and the recomputation is changed.
    planned_train = replace(config.train, micro_batch_size=1, recompute="off")
    assert planned_train == replace(before.train, micro_batch_size=1, recompute="off")
    assert replace(config, parallel=before.parallel, train=before.train) == before
    config.check_world(8)
    question = Question.of(before, PlanOptions(gpus=(8,), gpu="h100"))
    plan = search(question.shape, before.lora, 8, question.work, question.machine)
    best = plan.best()
    assert config.parallel == best.layout.parallel
    assert config.train.recompute == best.layout.recompute
    # The file says in comments what was predicted of it.
    comment = [line for line in out.read_text().splitlines() if line.startswith("#")]
    assert f"{best.memory.peak_bytes / 2**30:.1f} GiB" in comment[2]
    low, high = best.limits
    assert f"a step {low:.3g}-{high:.3g}? s" in comment[3]
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


def test_a_dry_run_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    layout = ["parallel.pp=2", "parallel.ep=4", "parallel.tp=2", "train.recompute=off"]
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(CONFIG), "--gpus", "16", "--dry-run", "13", *layout])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    # Ranks 8 to 15 are the second stage.
    assert said.startswith("rank 13 of 16, stage 1:")
    # Weights, adapters and buffers.
    assert said.count("the same") == 3 and "DIFFERENT" not in said


@pytest.mark.slow
def test_a_score_head_is_planned_and_built(capsys: pytest.CaptureFixture[str]) -> None:
    scored = ["objective.name=classify", "objective.num_labels=5", "parallel.ep=4"]
    # The loss of every token is gone; the head takes no time that two digits show.
    said = run(capsys, CONFIG, "--gpus", 4, *scored)
    assert re.search(r"^ *head +0\.0 %", said, re.MULTILINE), said
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(CONFIG), "--gpus", "4", "--dry-run", "3", *scored])
    said = capsys.readouterr().out
    assert ended.value.code == 0, said
    assert said.count("the same") == 3 and "DIFFERENT" not in said


@pytest.mark.slow
def test_what_is_trained_whole_is_planned_and_built(capsys: pytest.CaptureFixture[str]) -> None:
    saved = ["lora.modules_to_save=[lm_head,gate,norm]", "lora.trainable_token_indices=[7,151000]"]
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(CONFIG), "--gpus", "4", "--dry-run", "3", "parallel.ep=4", *saved])
    said = capsys.readouterr().out
    assert ended.value.code == 0, said
    assert said.count("the same") == 3 and "DIFFERENT" not in said
    # Gradient, master and two moments of lm_head are more than the rest of a stage's: the same
    # layout takes more memory on its fullest rank.
    sizes = []
    for options in ([], saved):
        text = run(capsys, CONFIG, "--gpus", 4, "parallel.ep=4", "train.recompute=full", *options)
        (yours,) = re.findall(r"^yours.*?(\d+\.\d) +\d+ %", text, re.MULTILINE)
        sizes.append(float(yours))
    assert sizes[1] - sizes[0] > 2, sizes


def test_a_dry_run_agrees_on_rows_of_a_tied_head(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Token ids are buffers: all beside the embedding; beside the head of the second of two ranks
    two of three and their columns, 8 bytes each."""
    base = make_tiny(tmp_path / "tied", arch="qwen3", tie_word_embeddings=True, vocab_size=512)
    rows = [
        f"model.path={base}",
        "train.recompute=off",
        "parallel.tp=2",
        "lora.trainable_token_indices=[3,300,500]",
    ]
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(CONFIG), "--gpus", "2", "--dry-run", "1", *rows])
    said = capsys.readouterr().out
    assert ended.value.code == 0, said
    assert re.search(r"buffers +built +56 bytes +planned +56 +the same", said), said


def test_a_dry_run_agrees_where_routers_have_buffers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """GLM's correction biases are buffers, not parameters, and must be counted on both sides."""
    base = make_tiny(tmp_path / "glm", arch="glm4_moe")
    layout = [
        f"model.path={base}",
        "train.global_batch_size=8",
        "parallel.ep=2",
        "parallel.pp=2",
        "train.recompute=off",
    ]
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(CONFIG), "--gpus", "4", "--dry-run", "2", *layout])
    said = capsys.readouterr().out
    assert ended.value.code == 0, said
    # Layers 2 and 3 of four, with 8 experts each, a bias and a count of 4 bytes for each.
    assert re.search(r"buffers +built +128 bytes +planned +128 +the same", said), said


@pytest.mark.parametrize(
    ("num_gpus", "most_calls"),
    [
        pytest.param(16, 10_000_000, marks=pytest.mark.slow),
        pytest.param(256, 60_000_000, marks=pytest.mark.long),
    ],
)
def test_235b_is_planned_without_torch(num_gpus: int, most_calls: int) -> None:
    """Work is bounded in calls of Python functions, so that no machine is too slow for it. On
    2026-11-27, with unequal stages: 7.4 million for 16 GPUs and 48.0 million for 256."""
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
