"""Stand-ins for wandb and mlflow that record every call, with the signatures of wandb 0.31 and
mlflow-skinny 3.17."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

Calls = list[tuple[str, dict[str, Any]]]
"""(function, its arguments that were given), in order."""


def given(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments that a caller has not left out; ``locals()`` has the function's own names too."""
    ours = {"self", "calls", "broken"}
    return {name: v for name, v in arguments.items() if v is not None and name not in ours}


class WandbRun:
    def __init__(self, calls: Calls, broken: bool) -> None:
        self._calls = calls
        self._broken = broken

    def define_metric(
        self, name, step_metric=None, step_sync=None, hidden=None, summary=None, overwrite=None
    ):
        arguments = given({"name": name, "step_metric": step_metric})
        self._calls.append(("define_metric", arguments))

    def log(self, data, step=None, commit=None):
        if self._broken:
            raise ConnectionResetError("the service\nhas gone.")
        self._calls.append(("log", given({"data": data, "step": step})))

    def finish(self, exit_code=None):
        self._calls.append(("finish", {"exit_code": exit_code}))


class Table(SimpleNamespace):
    def __init__(
        self, columns=None, data=None, rows=None, dataframe=None, dtype=None, optional=True,
        allow_mixed_types=False, log_mode="IMMUTABLE",
    ) -> None:  # fmt: skip
        super().__init__(columns=columns, data=data)


def make_wandb(calls: Calls, broken: bool) -> ModuleType:
    module = ModuleType("wandb")

    def init(
        entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None,
        config=None, config_exclude_keys=None, config_include_keys=None, allow_val_change=None,
        group=None, job_type=None, mode=None, force=None, reinit=None, resume=None,
        resume_from=None, fork_from=None, save_code=None, tensorboard=None,
        sync_tensorboard=None, monitor_gym=None, settings=None, anonymous=None,
    ):  # fmt: skip
        calls.append(("init", given(locals())))
        return WandbRun(calls, broken)

    module.init, module.Table = init, Table  # type: ignore[attr-defined]
    return module


class MlflowClient:
    def __init__(self, calls: Calls, broken: bool) -> None:
        self._calls = calls
        self._broken = broken

    def create_run(self, experiment_id, start_time=None, tags=None, run_name=None):
        self._calls.append(("create_run", given(locals())))
        number = sum(name == "create_run" for name, _ in self._calls)
        return SimpleNamespace(info=SimpleNamespace(run_id=f"run{number}"))

    def update_run(self, run_id, status=None, name=None):
        self._calls.append(("update_run", given(locals())))

    def log_batch(self, run_id, metrics=(), params=(), tags=(), synchronous=None):
        if self._broken and metrics:
            raise RuntimeError("503 from the server")
        self._calls.append(
            ("log_batch", given({"run_id": run_id} | {"metrics": metrics, "params": params}))
        )

    def log_text(self, run_id, text, artifact_file):
        self._calls.append(("log_text", given(locals())))

    def set_terminated(self, run_id, status=None, end_time=None):
        self._calls.append(("set_terminated", given(locals())))


class Metric(SimpleNamespace):
    def __init__(
        self, key, value, timestamp, step,
        model_id=None, dataset_name=None, dataset_digest=None, run_id=None,
    ) -> None:  # fmt: skip
        super().__init__(key=key, value=value, timestamp=timestamp, step=step)


class Param(SimpleNamespace):
    def __init__(self, key, value) -> None:
        super().__init__(key=key, value=value)


def make_mlflow(calls: Calls, broken: bool) -> ModuleType:
    module = ModuleType("mlflow")
    entities = ModuleType("mlflow.entities")

    def set_experiment(experiment_name=None, experiment_id=None, trace_location=None):
        calls.append(("set_experiment", given(locals())))
        return SimpleNamespace(experiment_id="7")

    entities.Metric, entities.Param = Metric, Param  # type: ignore[attr-defined]
    module.entities = entities  # type: ignore[attr-defined]
    module.set_experiment = set_experiment  # type: ignore[attr-defined]
    module.MlflowClient = lambda: MlflowClient(calls, broken)  # type: ignore[attr-defined]
    return module


MAKERS = {"wandb": make_wandb, "mlflow": make_mlflow}


def install(monkeypatch: pytest.MonkeyPatch, name: str, broken: bool = False) -> Calls:
    """Let ``import NAME`` find the stand-in for the length of a test; returns what will be called.

    Args:
        broken: writing raises, after the run has begun.
    """
    calls: Calls = []
    module = MAKERS[name](calls, broken)
    # How ``find_spec`` answers for a module that is imported already.
    module.__spec__ = ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, name, module)
    if name == "mlflow":
        monkeypatch.setitem(sys.modules, "mlflow.entities", module.entities)
    return calls
