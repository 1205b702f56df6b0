"""Read what a run folder says of its run, whatever part of it is there."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megalora.adapters.files import WEIGHTS
from megalora.adapters.latest import checkpoints, read_latest
from megalora.config.yaml_limits import check_yaml
from megalora.hf.json_file import read_json_object
from megalora.json_text import is_number
from megalora.train.expert_tokens import FILE, Recorded, read_expert_tokens
from megalora.train.run_files import CONFIG, ENVIRONMENT, MANIFEST, SAMPLES
from megalora.train.run_logs import ANSWERS_FILE, METRICS_FILE, record_of


@dataclass(frozen=True)
class Series:
    """One quantity of one run, in the order of steps."""

    steps: list[int]
    values: list[float]


@dataclass
class RunRecords:
    """What a run folder holds."""

    folder: Path
    name: str
    series: dict[str, Series]
    """By the name that ``metrics.jsonl`` has for it."""
    experts: Recorded | None = None
    """Tokens per expert; None for a run that recorded none."""
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    answers: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    """What ``log.samples`` asked for, by step."""
    checkpoint: Path | None = None
    """The newest one."""
    manifest: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What is missing or could not be read, a line each."""

    def option(self, name: str) -> Any:
        """The value of ``section.key`` in the config; None where it has none."""
        section, key = name.split(".")
        of_section = self.config.get(section)
        return of_section.get(key) if isinstance(of_section, dict) else None


def read_run(folder: Path) -> RunRecords:
    """Read a run folder; raises ``ValueError`` where it is none.

    A part that is missing or damaged is a note; only ``metrics.jsonl`` must be there.
    """
    metrics = folder / METRICS_FILE
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; name a run folder, such as runs/default")
    if not metrics.is_file():
        # A checkpoint lies in the folder of its run.
        above = folder.parent
        hint = f"; did you mean {above}?" if (above / METRICS_FILE).is_file() else ""
        raise ValueError(f"{folder} is not a run folder: it has no {METRICS_FILE}{hint}")
    series, notes = read_series(metrics)
    run = RunRecords(folder, folder.resolve().name, series, notes=notes)
    _read_config(run)
    run.environment = _object(run, ENVIRONMENT)
    run.manifest = _object(run, MANIFEST)
    samples = _object(run, SAMPLES).get("samples", [])
    run.samples = [sample for sample in samples if isinstance(sample, dict)]
    _read_answers(run)
    if (folder / FILE).is_file():
        try:
            run.experts = read_expert_tokens(folder / FILE)
        except ValueError as error:
            run.notes.append(str(error))
    run.checkpoint = newest_checkpoint(folder)
    return run


def read_series(path: Path) -> tuple[dict[str, Series], list[str]]:
    """Every quantity of ``metrics.jsonl``, and notes.

    A step that was done twice counts as it was the last time. Values that are no finite numbers are
    left out.
    """
    by_step: dict[str, dict[int, float]] = {}
    damaged = 0
    not_finite = 0
    for line in path.read_bytes().decode(errors="replace").splitlines():
        record = record_of(line)
        if record is None:
            damaged += 1
            continue
        step = record.pop("step")
        for key, value in record.items():
            # True is an int to isinstance, and no measurement.
            if type(value) not in (int, float):
                damaged += 1
            elif not is_number(value):
                not_finite += 1
            else:
                by_step.setdefault(key, {})[step] = float(value)
    notes: list[str] = []
    if damaged:
        notes.append(f"{path.name}: {damaged:,} lines or values could not be read")
    if not_finite:
        notes.append(f"{path.name}: {not_finite:,} values were not finite and are not drawn")
    series: dict[str, Series] = {}
    for key, values in by_step.items():
        steps = sorted(values)
        series[key] = Series(steps, [values[step] for step in steps])
    return series, notes


def _read_answers(run: RunRecords) -> None:
    path = run.folder / ANSWERS_FILE
    # Few runs ask for answers: without the file nothing is missing.
    if not path.is_file():
        return
    for line in path.read_bytes().decode(errors="replace").splitlines():
        record = record_of(line)
        answers = record.get("answers") if record else None
        if record is None or not isinstance(answers, list):
            run.notes.append(f"{path.name}: a line could not be read")
            continue
        run.answers[record["step"]] = [answer for answer in answers if isinstance(answer, dict)]


def newest_checkpoint(folder: Path) -> Path | None:
    """What ``latest`` names, or the step with the highest number; None without any."""
    try:
        latest = read_latest(folder)
    except ValueError:
        # The checkpoints are there all the same.
        latest = None
    for path in (latest, *reversed(checkpoints(folder))):
        if path is not None and (path / WEIGHTS).is_file():
            return path
    return None


def _read_config(run: RunRecords) -> None:
    path = run.folder / CONFIG
    if not path.is_file():
        run.notes.append(f"no {CONFIG}")
        return
    run.config_text = path.read_text(errors="replace")
    try:
        check_yaml(run.config_text)
        content = yaml.safe_load(run.config_text)
    except (yaml.YAMLError, ValueError, RecursionError):
        content = None
    if isinstance(content, dict):
        run.config = content
    else:
        run.notes.append(f"{CONFIG} is not readable as YAML")


def _object(run: RunRecords, name: str) -> dict[str, Any]:
    """A JSON object of the run folder; an empty one with a note where there is none."""
    path = run.folder / name
    if not path.is_file():
        run.notes.append(f"no {name}")
        return {}
    try:
        return read_json_object(path)
    except ValueError as error:
        run.notes.append(str(error))
        return {}


def flat(config: dict[str, Any]) -> dict[str, str]:
    """A config as ``section.key`` -> value in one line of JSON."""
    found: dict[str, str] = {}
    for section, options in config.items():
        if not isinstance(options, dict):
            found[str(section)] = json.dumps(options, default=str)
            continue
        for key, value in options.items():
            found[f"{section}.{key}"] = json.dumps(value, default=str)
    return found
