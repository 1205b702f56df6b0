"""Bring together what ``megalora eval`` is asked for, and check it without torch.

The command checks it before ranks start and hands it to them as JSON.
"""

import json
import tempfile
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from megalora.adapters.files import AVERAGED, INDEX, START, START_KEY, read_config
from megalora.adapters.latest import CHECKPOINT_NAME
from megalora.adapters.read.options import has_score
from megalora.adapters.read.weights import AdapterWeights
from megalora.adapters.trained_on import model_options, trained_on
from megalora.chat.command import find_models
from megalora.config import ObjectiveConfig, ParallelConfig, RunConfig
from megalora.config.checks import require
from megalora.config.file import load_config
from megalora.config.parallel import check_generation
from megalora.data.sources import locate
from megalora.evaluate.rules import rule_of
from megalora.generate.options import Sampling
from megalora.hf.tensor_names import SCORE, parse_weight
from megalora.json_text import parse_json
from megalora.model.account import open_folder
from megalora.paths import check_file_to_write
from megalora.preflight import check_teacher
from megalora.train.run_files import CONFIG

_MINIMAL = "model: {path: .}\ndata: {train: .}\ntrain: {steps: 1}\n"
"""A config of which only defaults are used."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """An evaluation, as the command line asks for it."""

    target: str
    """An adapter folder, a run folder, or a base model's folder or hub name."""
    data: str | None = None
    """The samples, as ``data.train`` names them; None for those that the run evaluated on."""
    base: str | None = None
    config: str | None = None
    """A training config, for how data is read and what dtype is computed in; None for that of the
    run that the adapter lies in, or defaults."""
    overrides: list[str] = field(default_factory=list)
    nproc: int = 1
    generate: bool = False
    rule: str = "last-number"
    limit: int | None = None
    """Number of rows to generate answers to, the first ones; None for all."""
    sampling: dict[str, Any] = field(default_factory=dict)
    out: str | None = None
    url: str | None = None
    """A server that answers; ``target`` is then a name that it has, or a folder whose contents it
    serves."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Request":
        return cls(**parse_json(text))


@dataclass(frozen=True)
class Plan:
    """An evaluation whose parts are found."""

    request: Request
    base: Path
    adapter: Path | None
    config: RunConfig
    """``data.train`` is the data that is evaluated on, unless ``data.eval`` is set."""
    config_file: Path | None
    """Where the config was read; None for defaults."""

    @property
    def resolved(self) -> Request:
        """The same request with what was found by name, so that ranks look for nothing again."""
        base = str(self.base)
        return replace(
            self.request,
            target=str(self.adapter) if self.adapter else base,
            base=base if self.adapter else None,
            config=str(self.config_file) if self.config_file else None,
        )

    @property
    def own_sources(self) -> list[tuple[str, str]]:
        """(option, source) of the data that the config names, where ``--data`` does not."""
        if self.request.data is not None:
            return []
        data = self.config.data
        if isinstance(data.eval, str):
            return [("data.eval", data.eval)]
        # A part of it is held out.
        return [("data.train", source.path) for source in data.sources]

    @property
    def sampling(self) -> Sampling:
        """Greedy, unless something else was given."""
        return Sampling(**self.request.sampling)


def check_options(request: Request) -> None:
    """Raise ``ValueError`` for what is wrong whatever is evaluated."""
    require(request.nproc >= 1, f"--nproc must be at least 1, got {request.nproc}")
    require(
        request.limit is None or request.limit >= 1,
        f"--limit must be at least 1, got {request.limit}",
    )
    # Both raise where they cannot be made; ranks make them again.
    Sampling(**request.sampling)
    rule_of(request.rule)
    # Not after an hour of generating.
    if request.out is not None:
        check_file_to_write(Path(request.out))


def plan_of(request: Request) -> Plan:
    """Find and check all that needs no torch; raises ``ValueError`` for the first mistake."""
    check_options(request)
    base, adapter = find_models(request.target, request.base, score=True)
    file = config_file(request, adapter)
    config = config_of(request, base, file, adapter)
    config.parallel.data_parallel_sizes(request.nproc)
    # From the adapter's header: a head of other labels would fail after minutes of loading.
    _check_head(request, adapter, config.objective)
    require(
        config.objective.learned_policy is None,
        f"{request.target}: objective.name=grpo learns from rollouts, and eval has conversations"
        " and answers; add objective.name=sft objective.policy=null to judge it by those of --data",
    )
    # Sizes and tensors from headers; raises where the layout does not fit.
    open_folder(base).shape.check_layout(config.parallel)
    check_teacher(config, base)
    if config.objective.holds_start:
        require(
            adapter is not None and _has_start(adapter),
            f"{request.target}: {INDEX} has no {START_KEY}, with which objective.reference=start"
            " compares; add objective.reference=base to compare with the base",
        )
    if request.generate:
        check_generation(config.parallel.pp, config.parallel.cp)
    return Plan(request, base, adapter, config, file)


def _has_start(adapter: Path) -> bool:
    """Whether a checkpoint has the adapter as it was when its run began."""
    # Of format 1, in a file of its own.
    if not (adapter / INDEX).is_file():
        return (adapter / START).is_file()
    # Late: it imports torch, which few requests need here.
    from megalora.adapters.state_index import read_index

    return any(START_KEY in tensor.keys for tensor in read_index(adapter).tensors.values())


def _check_head(request: Request, adapter: Path | None, objective: ObjectiveConfig) -> None:
    """Raise ``ValueError`` unless the adapter has the score head that the objective is judged by,
    or none where that reads a language model."""
    num_scores = _num_scores(adapter) if adapter is not None else 0
    require(
        not num_scores or objective.num_scores > 0,
        f"{request.target}: a classifier or reward model, of which objective.name={objective.name}"
        f" reads nothing. Say how its {num_scores} scores are judged: objective.name=classify"
        f" objective.num_labels={num_scores}, with rows of text and label"
        + (", or objective.name=reward, with pairs" if num_scores == 1 else ""),
    )
    require(
        num_scores == objective.num_scores,
        f"{request.target}: objective.name={objective.name} is judged by a score head of"
        f" {objective.num_scores}, and"
        + (f" this one has {num_scores} scores" if num_scores else " there is none in it"),
    )
    require(
        not (request.generate and num_scores),
        f"{request.target}: --generate: a score head stands in place of lm_head, so that no text"
        " can be written; leave --generate out",
    )


def _num_scores(adapter: Path) -> int:
    """Scores of an adapter's head; 0 for a language model."""
    if not has_score(read_config(adapter)):
        return 0
    # Shapes stand in the file's header: nothing is read yet.
    for name, info in AdapterWeights(adapter).info.items():
        if parse_weight(name) == SCORE:
            return info.shape[0]
    # ``read_adapter`` refuses it, with what was lost.
    return 0


def config_file(request: Request, adapter: Path | None) -> Path | None:
    """The training config that says how data is read."""
    if request.config is not None:
        return Path(request.config)
    # A checkpoint lies in its run folder, which has the config with all defaults filled in. Beside
    # any other adapter a file of this name may be anything.
    # A base lies in no run folder.
    if adapter is None:
        return None
    checkpoint = adapter.absolute()
    # The moving average lies in its checkpoint.
    if checkpoint.name == AVERAGED:
        checkpoint = checkpoint.parent
    if not CHECKPOINT_NAME.fullmatch(checkpoint.name):
        return None
    beside = checkpoint.parent / CONFIG
    return beside if beside.is_file() else None


def config_of(
    request: Request, base: Path, file: Path | None, adapter: Path | None = None
) -> RunConfig:
    """The config with what the command line says: data, base and layout. The base has the values
    that the adapter was trained on, unless the command line says how it is held."""
    # Any layout gives the same loss: the run's own would only be in the way of other ranks.
    one_rank = []
    for option in fields(ParallelConfig):
        default = "null" if option.default is None else option.default
        one_rank.append(f"parallel.{option.name}={default}")
    held: list[str] = []
    if adapter is not None:
        held = [f"model.{key}={value}" for key, value in model_options(trained_on(adapter)).items()]
    overrides = [*one_rank, *held, *request.overrides]
    if file is not None:
        config = load_config(file, overrides)
    else:
        require(request.data is not None, _no_data(request.target))
        # Overrides are read into a file's config; this one has defaults alone.
        with tempfile.TemporaryDirectory() as folder:
            minimal = Path(folder) / "defaults"
            minimal.write_text(_MINIMAL)
            config = load_config(minimal, overrides)
    # What the command line names takes the place of training's data and of its evaluation's.
    data = config.data
    if request.data is not None:
        # Raises where there is no such file.
        locate(request.data)
        data = replace(data, train=request.data, eval=None)
    else:
        require(data.eval is not None, _no_data(request.target))
    return replace(config, model=replace(config.model, path=str(base)), data=data)


def _no_data(target: str) -> str:
    return (
        f"evaluate {target} on what? Give --data FILE; only for a checkpoint in a run folder whose"
        f" {CONFIG} has data.eval are that run's evaluation samples taken"
    )
