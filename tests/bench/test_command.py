"""``megalora bench`` around its ranks: what is predicted, which layouts are taken, mistakes, and
the way from a calibrated machine to a table."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megalora.bench.command import fastest, predicted, workload
from megalora.bench.launch import Nodes, processes_of
from megalora.bench.rows import PARTS, load_rows
from megalora.cli.main import main
from megalora.config import ParallelConfig
from megalora.config.file import load_config
from megalora.planner.gpus import GPUS
from megalora.planner.layouts import ParallelLayout
from megalora.planner.memory import CONTEXT, fullest_stage
from megalora.planner.models import load_shape
from megalora.planner.search import search
from megalora.planner.weights import PlannedModel
from tests.planner.test_hardware import calibration
from tests.waiting import PATIENCE_S, wait_until

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "bench" / "cpu.yaml"
# The config trains in float32, and a prediction refuses rates of another dtype.
H100 = replace(GPUS["h100"], dtype="float32")
SHAPE = load_shape(ROOT / "configs" / "bench" / "small_moe.yaml")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """The config names its architecture from there."""
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("sizes", [{"ep": 2}, {"tp": 2, "etp": 2}, {"pp": 2, "vpp": 2}])
def test_a_prediction_is_the_planners_in_the_clocks_names(sizes: dict) -> None:
    config = load_config(CONFIG)
    config = replace(
        config, parallel=ParallelConfig(**sizes), train=replace(config.train, recompute="full")
    )
    found = predicted(config, 2, H100)
    assert tuple(found.parts) == PARTS
    # Parts neither overlap nor leave anything out.
    assert sum(found.parts.values()) == pytest.approx(found.step_seconds)
    model = PlannedModel.of(SHAPE, config.lora)
    work = workload(config, 1.0, H100)
    # 513 tokens make 512 positions with a next token.
    assert work.sequence_length == 512
    layout = ParallelLayout(parallel=config.parallel, num_ranks=2, recompute="full")
    plan = fullest_stage(model, layout, work)
    # What a run measures are tensors: the memory that CUDA and NCCL take themselves is not in it.
    assert found.peak_bytes == plan.peak_bytes - plan[CONTEXT]
    assert plan[CONTEXT] > 0
    assert found.parts["experts"] > 0
    # Only a pipeline waits.
    assert (found.parts["bubble"] > 0) == ("pp" in sizes)


def test_the_layouts_that_the_plan_puts_first() -> None:
    config = load_config(CONFIG)
    plan = search(SHAPE, config.lora, 4, workload(config, 1.0, H100), H100)
    assert fastest(config, 4, 3, H100) == [found.layout for found in plan.layouts()[:3]]
    # 1 MiB holds no layout of any model.
    with pytest.raises(ValueError, match="are too few: the smallest layout"):
        fastest(config, 4, 3, replace(H100, memory_bytes=2**20))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([str(CONFIG), "--nproc", "2", "--layouts", "ep=2"], "bench needs CONFIG and --gpu"),
        (["--gpu", "h100"], "bench needs CONFIG and --gpu"),
        (
            [str(CONFIG), "--gpu", "h100"],
            "give either --layouts, such as tp=2,ep=4 ep=8, or --top K",
        ),
        (
            [str(CONFIG), "--gpu", "h100", "--top", "2", "--layouts", "ep=1"],
            "give either --layouts",
        ),
        ([str(CONFIG), "--gpu", "h100", "--top", "0"], "--top must be at least 1"),
        (
            [str(CONFIG), "--gpu", "h100", "--nproc", "0", "--top", "1"],
            "--nproc must be at least 1",
        ),
        (
            [str(CONFIG), "--gpu", "h100", "--nproc", "2", "--layouts", "epp=2"],
            "unknown key 'epp'; did you mean",
        ),
        (
            [str(CONFIG), "--gpu", "h100", "--top", "1", "--steps", "0"],
            "--steps must be at least 1",
        ),
        (
            [str(CONFIG), "--gpu", "h100", "--top", "1", "--routing", "even"],
            "--routing must be one of balanced, natural",
        ),
        # Not even root can make a folder there.
        (
            [str(CONFIG), "--gpu", "h100", "--top", "1", "--out", "/proc/x"],
            "/proc/x/results.json cannot be written",
        ),
        # Nothing wrong but that the config asks for float32, of which nobody published rates.
        (
            [str(CONFIG), "--gpu", "h100", "--top", "1"],
            "the rates of H100 SXM 80 GB are those of bfloat16",
        ),
        (["--calibrate", "/proc/x/y.json"], "/proc/x/y.json cannot be written"),
        (["--calibrate", "x.json", "--nproc", "0"], "--nproc must be at least 1"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", *arguments])
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_from_a_calibrated_machine_to_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One layout that runs on one rank and one that cannot: the files, and predictions that rest on
    the calibration."""
    machine = tmp_path / "machine.json"
    machine.write_text(json.dumps(calibration()))
    out = tmp_path / "out"
    # Two samples a step: a micro batch of 4 does not divide them.
    small = ["data.max_length=33", "train.global_batch_size=2", "lora.rank=2"]
    with pytest.raises(SystemExit) as ended:
        main(["bench", str(CONFIG), *small, "--gpu", str(machine), "--layouts", "micro=1",
              "micro=4", "--steps", "1", "--out", str(out)])  # fmt: skip
    assert ended.value.code == 0
    said = capsys.readouterr().out
    ok, refused = load_rows(out / "results.json")
    assert ok.measured and ok.predicted
    assert ok.predicted.basis.startswith("CPU, measured 2026-11-24 (machine.json)")
    # Bytes of tensors are the same on every machine, 5 % apart at most on so small a model. Times
    # cannot be compared: the calibration is made up.
    assert abs(ok.predicted.peak_bytes / max(ok.measured.peak_bytes) - 1) < 0.05
    assert refused.status.startswith("refused: ") and "refused" in said
    assert (out / "results.csv").is_file()
    # An empty picture would be smaller.
    assert (out / "layouts.png").stat().st_size > 10_000


def test_a_signal_to_the_driver_ends_its_ranks(tmp_path: Path) -> None:
    # A driver in a process of its own, whose rank is a command that sleeps.
    code = (
        "import os; from pathlib import Path; from megalora.bench.launch import TOKEN,"
        " ended_by_signals, run_to_log\nwith ended_by_signals(): run_to_log(['sleep', '600'],"
        f" {{**os.environ, TOKEN: {str(tmp_path)!r}}}, Path({str(tmp_path)!r}) / 'log', 600)"
    )
    driver = subprocess.Popen([sys.executable, "-c", code])
    wait_until(lambda: processes_of(str(tmp_path)))
    driver.send_signal(signal.SIGTERM)
    # A shell reports a process that a signal ended as 128 and its number.
    assert driver.wait(PATIENCE_S) == 128 + signal.SIGTERM
    assert not processes_of(str(tmp_path))


def test_nodes_as_a_scheduler_names_them() -> None:
    assert Nodes.of({"SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "1"}) == Nodes(2, 1)
    # What is set for us by name counts more than what Slurm sets for everybody.
    assert Nodes.of({"NNODES": "3", "NODE_RANK": "0", "SLURM_NODEID": "1"}) == Nodes(3, 0)
    assert Nodes.of({}) == Nodes(1, 0)
