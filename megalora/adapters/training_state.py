"""Read a checkpoint's training state: state.json, checked key by key, and the float32 factors that
lie beside the optimizer's moments."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalora.adapters.best_loss import BestLoss, Evaluations
from megalora.adapters.files import STATE_JSON, STATE_KEYS
from megalora.adapters.saved_tensors import SavedTensors
from megalora.config import LoRAConfig, ObjectiveConfig
from megalora.hf.json_file import read_json_object
from megalora.json_text import is_number
from megalora.lora.section import adapted_of, settings
from megalora.lora.select import resolve
from megalora.lora.spec import FACTORS_BY_NAME, Adapted, expected_tensors
from megalora.lora.trained_weight import TrainedWeight
from megalora.lora.whole import with_biases, with_trained
from megalora.model.shape import ModelShape

Json = dict[str, Any]


@dataclass(frozen=True)
class SavedState:
    """Content of a checkpoint's state.json."""

    folder: Path
    step: int
    """Finished optimizer steps."""
    config: Json = field(default_factory=dict)
    """The run's config, by section; empty for an imported adapter."""
    num_samples: int = 0
    world_size: int = 0
    saved_at: float = 0.0
    """Seconds since 1970; 0 where the checkpoint was saved before this was written down."""
    evaluations: Evaluations = field(default_factory=Evaluations)
    """Up to this step; those of a checkpoint of an earlier version count as done at its step."""
    identity: Json | None = None
    """Digests of data and base (``identity.py``); None where the checkpoint was saved before there
    were any."""
    has_sums: bool = False
    """Whether the checkpoint has digests of all its files (``sums.py``)."""
    recent_losses: tuple[float, ...] = ()
    """Those of the last steps, where ``train.skip_spikes`` looks at them."""
    left_out: int = 0
    """Bad steps among those since ``cycle_start``: Adam has not counted them."""
    imported_from: str | None = None
    base: str = ""
    """Name or folder of the base that an adapter was imported for."""
    adapted: list[list[Any]] = field(default_factory=list)
    """Rows of ``lora.section.settings``, one for each adapted linear; empty where an earlier
    version saved the checkpoint."""
    cycles: int = 0
    """Adapters that were merged into the base before this one (``cycles.py``)."""
    cycle_start: int = 0
    """Finished steps when the adapter began that is trained now."""
    in_memory: bool = False
    """Whether these are snapshots, which lie in memory: tensors alone, and no adapter."""
    imported_scores: int = 0
    """Numbers that an imported score head gives."""
    imported_saved: tuple[str, ...] = ()
    """``ModelShape.saved`` of an imported adapter."""
    imported_tokens: tuple[int, ...] = ()
    """``ModelShape.tokens`` of an imported adapter."""
    imported_biases: tuple[str, ...] = ()
    """``ModelShape.biases`` of an imported adapter."""

    @property
    def num_scores(self) -> int:
        """Numbers that the score head gives; 0 where there is none."""
        options = {"objective": {}, **self.config}["objective"]
        # Checkpoints of earlier versions have options that may be unknown now; none had a head.
        scored = options.get("name") in ("classify", "reward")
        return ObjectiveConfig(**options).num_scores if scored else self.imported_scores

    def shape_of(self, base: ModelShape) -> ModelShape:
        """The base's sizes with the score head, and with what is trained of the base.

        Raises:
            ValueError: the state describes another model than ``base``.
        """
        with_score = replace(base, num_scores=self.num_scores)
        if self.imported_from is not None:
            return replace(
                with_score, saved=self.imported_saved, tokens=self.imported_tokens,
                biases=self.imported_biases,
            )  # fmt: skip
        lora = self.config["lora"]
        # Earlier versions trained nothing such, and their other options may be unknown now.
        has_whole = lora.get("modules_to_save") or lora.get("trainable_token_indices")
        if not has_whole and lora.get("bias", "none") == "none":
            return with_score
        try:
            section = LoRAConfig(**lora)
            with_whole = with_trained(section, with_score)
            return with_biases(section, with_whole, self.trained(base))
        except (TypeError, ValueError) as error:
            path = self.folder / STATE_JSON
            raise ValueError(f"{path} does not fit this base: {error}") from None

    def trained(self, shape: ModelShape) -> list[Adapted]:
        """The projections that were trained, with their own ranks and scales.

        Raises:
            ValueError: the state describes another model than ``shape``.
        """
        path = self.folder / STATE_JSON
        try:
            # Earlier versions saved no rows: what the run's config selects in this model.
            rows = self.adapted or settings(resolve(LoRAConfig(**self.config["lora"]), shape))
            return adapted_of(rows, shape)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} does not fit this base: {error}") from None


def read_state(folder: Path) -> SavedState:
    """The training state of a checkpoint's folder.

    Raises:
        ValueError: anything that no save or import has written; the message names the file and the
            key.
    """
    path = folder / STATE_JSON
    if not path.is_file():
        raise ValueError(f"it has no {STATE_JSON}")
    try:
        # Numbers are checked below, with the names of their keys.
        state = read_json_object(path, exact_numbers=False)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    known = {
        "step": _count(path, state, "step"),
        "saved_at": _number(path, state, "saved_at"),
        "identity": _identity(path, state),
        "evaluations": _evaluations(path, state),
        "has_sums": _switch(path, state, "sums"),
    }
    # An import has no run yet: neither a config nor samples.
    if "imported_from" in state:
        return SavedState(
            folder,
            imported_from=_text(path, state, "imported_from"),
            base=_text(path, state, "base"),
            adapted=_adapted(path, state),
            imported_scores=_count(path, {"num_scores": 0, **state}, "num_scores"),
            imported_saved=_texts(path, {"saved": [], **state}, "saved"),
            imported_tokens=_counts(path, {"tokens": [], **state}, "tokens"),
            imported_biases=_texts(path, {"biases": [], **state}, "biases"),
            **known,
        )
    return SavedState(
        folder,
        adapted=_adapted(path, state) if "adapted" in state else [],
        config=_sections(path, state),
        num_samples=_count(path, state, "num_samples"),
        world_size=_count(path, state, "world_size"),
        recent_losses=_losses(path, state),
        **_cycle(path, state),
        **known,
    )


def read_factors(
    folder: Path,
    adapted: list[Adapted],
    dtypes: Mapping[str, torch.dtype],
    whole: Sequence[TrainedWeight] = (),
) -> dict[str, Tensor]:
    """Trained factors by tensor name, from the float32 masters of a checkpoint.

    Args:
        adapted: what was trained, as ``SavedState.trained`` says.
        dtypes: tensor name -> the dtype to return it in. A parameter in training is its master,
            rounded to the parameter's dtype.
        whole: weights that are trained whole.

    Raises:
        ValueError: the file cannot be read, or lacks a tensor, or holds one of another shape.
    """
    factors: dict[str, Tensor] = {}
    with SavedTensors(folder) as saved:
        for name, shape in expected_tensors(adapted, whole).items():
            there = saved.shape(STATE_KEYS[0], name)
            if there is not None and there != shape:
                raise ValueError(
                    f"{saved.says}: {STATE_KEYS[0]}.{name} is {there}, and {STATE_JSON.name} says"
                    f" {shape}"
                )
            value = saved.whole(STATE_KEYS[0], name, shape)
            # A copy: the file is closed behind this.
            factors[name] = value.to(dtypes[name], copy=True)
    return factors


def _require(condition: bool, path: Path, key: str, expected: str, value: Any) -> None:
    """Raise ``ValueError`` for a value that is not what was written."""
    if not condition:
        shown = repr(value)
        if len(shown) > 60:
            shown = shown[:60] + "..."
        raise ValueError(f"{path} is damaged: {key} must be {expected}, got {shown}")


def _count(path: Path, state: Json, key: str) -> int:
    value = state.get(key)
    # ``type``, because true is an int too; 2**53, because JSON's numbers are float64 to others.
    _require(type(value) is int and 0 <= value < 2**53, path, key, "a count", value)
    return int(value or 0)


def _number(path: Path, state: Json, key: str) -> float:
    value = state.get(key, 0.0)
    _require(
        type(value) in (int, float) and 0 <= value < 2**53, path, key, "a time in seconds", value
    )
    return float(value)


def _evaluations(path: Path, state: Json) -> Evaluations:
    if "best" not in state:
        return Evaluations(last_step=_count(path, state, "step"))
    best = state["best"]
    _require(isinstance(best, dict), path, "best", "an object", best)
    loss = best.get("loss")
    is_loss = loss is None or is_number(loss)
    _require(is_loss, path, "best.loss", "a finite number or null", loss)
    last = state.get("evaluated_step")
    _require(type(last) is int and -1 <= last < 2**53, path, "evaluated_step", "a step", last)
    found = BestLoss(loss, _count(path, best, "step"), _count(path, best, "since"))
    return Evaluations(found, int(last or 0))


def _switch(path: Path, state: Json, key: str) -> bool:
    value = state.get(key, False)
    _require(type(value) is bool, path, key, "true or false", value)
    return bool(value)


def _text(path: Path, state: Json, key: str) -> str:
    value = state.get(key)
    _require(isinstance(value, str), path, key, "text", value)
    return str(value)


def _texts(path: Path, state: Json, key: str) -> tuple[str, ...]:
    value = state.get(key)
    is_texts = isinstance(value, list) and all(isinstance(text, str) for text in value)
    _require(is_texts, path, key, "a list of texts", value)
    return tuple(value or ())


def _counts(path: Path, state: Json, key: str) -> tuple[int, ...]:
    value = state.get(key)
    _require(isinstance(value, list), path, key, "a list of counts", value)
    return tuple(_count(path, {key: count}, key) for count in value or ())


def _cycle(path: Path, state: Json) -> dict[str, int]:
    """Which cycle the adapter is of, when that began, and how many steps were left out since."""
    # Earlier versions merged nothing, and did not count what they left out.
    known = {"cycles": 0, "cycle_start": 0, "left_out": 0, **state}
    found = {key: _count(path, known, key) for key in ("cycles", "cycle_start", "left_out")}
    # With a negative count Adam's updates would have another sign.
    since = _count(path, state, "step") - found["cycle_start"]
    _require(since >= 0, path, "cycle_start", "at most the step", found["cycle_start"])
    left_out = found["left_out"]
    _require(left_out <= since, path, "left_out", f"at most {since} steps", left_out)
    return found


def _losses(path: Path, state: Json) -> tuple[float, ...]:
    values = state.get("recent_losses", [])
    _require(isinstance(values, list), path, "recent_losses", "a list of numbers", values)
    for value in values:
        # Compared with the next loss: a mean with NaN would let every spike pass.
        _require(is_number(value), path, "recent_losses", "finite numbers", value)
    return tuple(map(float, values))


def _sections(path: Path, state: Json) -> Json:
    config = state.get("config")
    _require(isinstance(config, dict), path, "config", "an object of sections", config)
    assert isinstance(config, dict)
    for name in ("model", "data", "train", "lora"):
        section = config.get(name)
        _require(isinstance(section, dict), path, f"config.{name}", "an object", section)
    return config


def _identity(path: Path, state: Json) -> Json | None:
    identity = state.get("identity")
    if identity is None:
        return None
    _require(isinstance(identity, dict), path, "identity", "an object", identity)
    for key in ("train", "eval", "samples", "weights"):
        # None: that part was not there, such as data for evaluation.
        value = identity.get(key)
        is_digest = value is None or isinstance(value, str)
        _require(is_digest, path, f"identity.{key}", "a digest", value)
    config = identity.get("config")
    _require(isinstance(config, dict), path, "identity.config", "the base's config.json", config)
    return identity


def _adapted(path: Path, state: Json) -> list[list[Any]]:
    rows = state.get("adapted")
    _require(isinstance(rows, list), path, "adapted", "a list", rows)
    assert isinstance(rows, list)
    for i, row in enumerate(rows):
        _require(_is_row(row), path, f"adapted[{i}]", "[module, layer, rank, scale]", row)
    return rows


def _is_row(row: Any) -> bool:
    """Whether a value is what ``lora.section.settings`` writes for a linear."""
    if not isinstance(row, list) or len(row) not in (4, 5, 6):
        return False
    module, layer, rank, scale, *more = row
    names = ["", "A", "B", *FACTORS_BY_NAME]
    # Ranks of experts, the largest of which is the rank.
    if len(more) == 2:
        if not isinstance(more[1], list) or any(type(r) is not int or r < 1 for r in more[1]):
            return False
        if max(more[1], default=None) != rank:
            return False
    # The head is in no layer: None.
    return (
        type(module) is str
        and type(layer) in (int, type(None))
        and type(rank) is int
        and type(scale) in (int, float)
        and (not more or more[0] in names)
    )
