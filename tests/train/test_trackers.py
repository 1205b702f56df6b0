"""Check what W&B and MLflow are told, with stand-ins that have their signatures.

Where the packages are installed, the signatures are compared with theirs.
"""

import importlib.util
import inspect
import json
import threading
from pathlib import Path

import pytest

from megalora.config import LogConfig
from megalora.config.file import save_config
from megalora.preflight import check_run
from megalora.train import metrics, run_logs
from megalora.train.metrics import Metrics
from megalora.train.run_logs import InBackground, ShownAnswer
from megalora.train.trackers import check_installed
from tests.parity.runs import make_config
from tests.train.tracker_packages import (
    MAKERS,
    Calls,
    Metric,
    MlflowClient,
    Param,
    WandbRun,
    install,
)

OPTIONS = {"train.lr": 0.5, "lora.layers": None}


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing the loss curve takes half a second."""
    monkeypatch.setattr(metrics, "plot_losses", lambda folder: None)


def run(folder: Path, name: str, start: int, steps: int, fails: bool = False) -> None:
    """Report steps from ``start`` on with the tracker ``name``."""
    config = LogConfig(tensorboard=False, progress=False, **{name: "chats"})
    with Metrics(folder, config, 9, start, active=True, options=OPTIONS) as report:
        for step in range(start + 1, start + steps + 1):
            report.train_step(
                step, loss=1 / step, lr=0.25, grad_norm=2.0, num_tokens=8, use_of_slots={}
            )
        report.evaluation(start + steps, 0.75, 3)
        report.answers(start + steps, [ShownAnswer("6 * 7?", "42", "41", [1, 2], True)])
        if fails:
            raise RuntimeError("a run that ends badly")


def named(calls: Calls, name: str) -> list[dict]:
    return [arguments for called, arguments in calls if called == name]


def test_wandb_is_told_the_run_and_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = install(monkeypatch, "wandb")
    run(tmp_path / "mine", "wandb", 0, 2)
    [begun] = named(calls, "init")
    identity = begun.pop("id")
    assert begun == {
        "project": "chats", "name": "mine", "dir": str(tmp_path / "mine"), "config": OPTIONS,
        "resume": "allow", "settings": {"silent": True},
    }  # fmt: skip
    # Steps are an axis of their own: W&B's counter drops what goes back.
    assert named(calls, "define_metric") == [
        {"name": "step"}, {"name": "*", "step_metric": "step"},
    ]  # fmt: skip
    logged = named(calls, "log")
    assert [row["data"]["step"] for row in logged] == [1, 2, 2, 2]
    assert all("step" not in row for row in logged)
    assert logged[1]["data"]["loss"] == 0.5 and logged[2]["data"]["eval_loss"] == 0.75
    table = logged[3]["data"]["answers"]
    assert (table.columns, table.data) == (
        ["asked", "expected", "answer"],
        [["6 * 7?", "42", "41"]],
    )
    assert named(calls, "finish") == [{"exit_code": 0}]

    # A resumed run is the same run there, one that begins anew is another.
    run(tmp_path / "mine", "wandb", 1, 1)
    assert named(calls, "init")[1]["id"] == identity
    run(tmp_path / "mine", "wandb", 0, 1)
    assert named(calls, "init")[2]["id"] != identity


def test_mlflow_is_told_the_run_and_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = install(monkeypatch, "mlflow")
    run(tmp_path / "mine", "mlflow", 0, 2)
    assert named(calls, "set_experiment") == [{"experiment_name": "chats"}]
    assert named(calls, "create_run") == [{"experiment_id": "7", "run_name": "mine"}]
    batches = named(calls, "log_batch")
    assert {batch["run_id"] for batch in batches} == {"run1"}
    assert batches[0]["params"] == [Param("train.lr", "0.5"), Param("lora.layers", "None")]
    points = [(m.key, m.value, m.step) for batch in batches[1:] for m in batch["metrics"]]
    assert {("loss", 1.0, 1), ("loss", 0.5, 2), ("lr", 0.25, 2), ("eval_loss", 0.75, 2)} <= set(
        points
    )
    # Milliseconds, of this century.
    assert all(1e12 < m.timestamp < 4e12 for m in batches[1]["metrics"])
    assert named(calls, "log_text") == [
        {
            "run_id": "run1", "artifact_file": "answers/step_000002.txt",
            "text": "asked:    6 * 7?\nexpected: 42\nanswer:   41",
        }
    ]  # fmt: skip
    assert named(calls, "set_terminated") == [{"run_id": "run1", "status": "FINISHED"}]

    # MLflow keeps a run's parameters, so that a resumed run sends none.
    begun = len(calls)
    run(tmp_path / "mine", "mlflow", 2, 1)
    resumed = calls[begun:]
    assert named(resumed, "update_run") == [{"run_id": "run1", "status": "RUNNING"}]
    assert not named(resumed, "create_run")
    assert not any(batch["params"] for batch in named(resumed, "log_batch"))


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("wandb", ("finish", {"exit_code": 1})),
        ("mlflow", ("set_terminated", {"run_id": "run1", "status": "FAILED"})),
    ],
)
def test_a_run_that_failed_is_shown_as_failed(
    name: str, last: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = install(monkeypatch, name)
    with pytest.raises(RuntimeError, match="ends badly"):
        run(tmp_path, name, 0, 1, fails=True)
    assert calls[-1] == last


@pytest.mark.parametrize("name", MAKERS)
def test_an_outage_ends_the_log_and_not_the_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, name, broken=True)
    run(tmp_path, name, 0, 3)
    reason = {"wandb": "the service has gone", "mlflow": "503 from the server"}[name]
    said = f"log.{name}: {reason}. The run goes on without this log; metrics.jsonl has"
    assert capsys.readouterr().out.count(said) == 1
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 3]


def test_a_log_that_hangs_holds_up_neither_step_nor_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_logs, "CLOSING_S", 0.05)
    may_end = threading.Event()

    class Hangs:
        def write(self, step, values):
            may_end.wait()

        def close(self, failed):
            raise AssertionError("it was written to meanwhile")

    said: list[str] = []
    log = InBackground(Hangs(), "wandb", said.append)
    for step in range(100):
        log.write(step, {"loss": 1.0})
    log.close(False)
    assert said == [
        "log.wandb: not everything was sent within 0 s; the rest is in metrics.jsonl alone"
    ]
    may_end.set()


@pytest.mark.parametrize(("name", "package"), [("wandb", "wandb"), ("mlflow", "mlflow-skinny")])
def test_a_missing_package_is_one_line(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_installed(LogConfig())
    with pytest.raises(ValueError) as refused:
        check_installed(LogConfig(**{name: "chats"}))
    assert str(refused.value) == (
        f"log.{name}=chats needs the package {package}, which is not installed here: pip install"
        f" {package} (the extra megalora[{name}]), or leave log.{name} out"
    )


def test_a_tracker_that_cannot_begin_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "wandb")

    def init(**_):
        raise RuntimeError("No API key configured.\n  Use `wandb login` to log in.")

    import wandb  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(ValueError) as refused:
        run(tmp_path, "wandb", 0, 1)
    assert str(refused.value) == (
        "log.wandb=chats: No API key configured. Use `wandb login` to log in. Mend it, or leave"
        " log.wandb out."
    )


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_the_stand_in_for_wandb_has_its_signatures() -> None:
    wandb = pytest.importorskip("wandb")
    ours = MAKERS["wandb"]([], False)
    assert parameters(ours.init) == parameters(wandb.init)
    for name in ("define_metric", "log", "finish"):
        assert parameters(getattr(WandbRun, name)) == parameters(getattr(wandb.Run, name)), name


def test_the_stand_in_for_mlflow_has_its_signatures() -> None:
    mlflow = pytest.importorskip("mlflow")
    ours = MAKERS["mlflow"]([], False)
    assert parameters(ours.set_experiment) == parameters(mlflow.set_experiment)
    for name in ("create_run", "update_run", "log_batch", "set_terminated"):
        real = parameters(getattr(mlflow.MlflowClient, name))
        assert parameters(getattr(MlflowClient, name)) == real, name
    assert parameters(Metric) == parameters(mlflow.entities.Metric)
    assert parameters(Param) == parameters(mlflow.entities.Param)


def test_a_missing_package_is_said_before_ranks_start(
    tiny: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    path = tmp_path / "run.yaml"
    save_config(make_config(tiny, chats, tmp_path / "run", {}), path)
    check_run(path, [], 1)
    with pytest.raises(ValueError, match="log.wandb=chats needs the package wandb"):
        check_run(path, ["log.wandb=chats"], 1)
    with pytest.raises(ValueError, match="log.mlflow is empty"):
        check_run(path, ["log.mlflow=''"], 1)
