"""Send a run's numbers to Weights & Biases (``log.wandb``) and MLflow (``log.mlflow``).

Neither package is installed with megalora. Both take credentials, servers and modes from their own
environment variables (WANDB_API_KEY, WANDB_ENTITY, WANDB_MODE, MLFLOW_TRACKING_URI, ...).

This module imports neither torch nor the packages until a log is opened.
"""

import importlib.util
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalora.config import LogConfig
from megalora.hf.json_file import read_json_object
from megalora.train.run_logs import RunLog, ShownAnswer, as_text, one_line

KEPT = ".trackers.json"
"""File in the run folder with each tracker's id of the run, by which a resumed run finds it."""
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}
"""Option of the ``log`` section -> the package to install; the module has the option's name."""


def check_installed(config: LogConfig) -> None:
    """Raise ``ValueError`` where a tracker is asked for whose package is missing; imports none."""
    for name, package in PACKAGES.items():
        value = getattr(config, name)
        if value is not None and importlib.util.find_spec(name) is None:
            raise ValueError(
                f"log.{name}={value} needs the package {package}, which is not installed here:"
                f" pip install {package} (the extra megalora[{name}]), or leave log.{name} out"
            )


@dataclass(frozen=True)
class Described:
    """What a tracker is told of a run when it is opened."""

    folder: Path
    """The run folder; its name is the run's name."""
    start_step: int
    """Finished steps; above 0 the run goes on."""
    options: Mapping[str, Any]
    """The config by ``section.key``."""


class Wandb:
    """A run of Weights & Biases.

    Steps are a metric of their own: W&B's counter never goes back, and would drop the steps that a
    resumed run does again.
    """

    def __init__(self, project: str, run: Described, run_id: str | None) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self.id = run_id or uuid.uuid4().hex[:12]
        # Silent, it asks for no key on the terminal, where ranks would wait for an answer: without
        # one it raises. ``allow``: a run of this id goes on, otherwise a new one begins.
        self.run = wandb.init(
            project=project,
            id=self.id,
            name=run.folder.name,
            dir=str(run.folder),
            config=dict(run.options),
            resume="allow",
            settings={"silent": True},
        )
        self.table = wandb.Table
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({"step": step, **values})

    def write_answers(self, step: int, answers: Sequence[ShownAnswer]) -> None:
        rows = [[answer.asked, answer.expected, answer.answer] for answer in answers]
        table = self.table(columns=["asked", "expected", "answer"], data=rows)
        self.run.log({"step": step, "answers": table})

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class Mlflow:
    """A run of MLflow, through its client: the functions beside it keep an active run for each
    thread."""

    def __init__(self, experiment: str, run: Described, run_id: str | None) -> None:
        import mlflow  # pyright: ignore[reportMissingImports]
        from mlflow import entities  # pyright: ignore[reportMissingImports]

        self.metric = entities.Metric
        self.client = mlflow.MlflowClient()
        if run_id is not None:
            self.id = run_id
            self.client.update_run(run_id, status="RUNNING")
            return
        # Makes the experiment where there is none of this name.
        found = mlflow.set_experiment(experiment)
        made = self.client.create_run(found.experiment_id, run_name=run.folder.name)
        self.id = made.info.run_id
        # A parameter of MLflow is a text and never changes: a resumed run keeps the first ones.
        params = [entities.Param(key, str(value)) for key, value in run.options.items()]
        self.client.log_batch(self.id, params=params)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        now_ms = int(1000 * time.time())
        metrics = [self.metric(name, value, now_ms, step) for name, value in values.items()]
        self.client.log_batch(self.id, metrics=metrics)

    def write_answers(self, step: int, answers: Sequence[ShownAnswer]) -> None:
        text = "\n\n".join(as_text(answer) for answer in answers)
        # A metric is a number there; a text is a file.
        self.client.log_text(self.id, text, f"answers/step_{step:06d}.txt")

    def close(self, failed: bool) -> None:
        self.client.set_terminated(self.id, status="FAILED" if failed else "FINISHED")


def open_trackers(config: LogConfig, run: Described) -> dict[str, RunLog]:
    """The trackers that the config asks for, by option; on the first rank alone.

    Raises:
        ValueError: a package is missing, or cannot begin the run: no key, no server.
    """
    check_installed(config)
    kept = run.folder / KEPT
    # A run that begins anew in an old folder is a new run there, too.
    ids: dict[str, str] = {}
    if run.start_step and kept.is_file():
        ids = read_json_object(kept)
    opened: dict[str, RunLog] = {}
    for name, kind in (("wandb", Wandb), ("mlflow", Mlflow)):
        where = getattr(config, name)
        if where is None:
            continue
        try:
            tracker = kind(where, run, ids.get(name))
        # Errors of networks, files and credentials have types of the packages' own.
        except Exception as error:
            raise ValueError(
                f"log.{name}={where}: {one_line(error)}. Mend it, or leave log.{name} out."
            ) from error
        ids[name] = tracker.id
        opened[name] = tracker
    if opened:
        kept.write_text(json.dumps(ids) + "\n")
    return opened
