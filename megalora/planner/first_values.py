"""Choose the values that a first config starts with: usual ones, and what follows from the data and
from the number of GPUs."""

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megalora.config import RunConfig
from megalora.config.commented import FILL_IN
from megalora.config.file import load_config
from megalora.config.tree import read_tree
from megalora.data.sources import locate
from megalora.planner.models import find_architecture
from megalora.planner.packing import is_here
from megalora.train.duration import num_steps

_UNKNOWN = "to-be-filled-in"
"""In place of ``FILL_IN`` while options are read, which refuses that."""
USUAL: dict[str, dict[str, Any]] = {
    "data": {"max_length": 4096, "eval": 0.05},
    "train": {"epochs": 1, "global_batch_size": 64, "lr": 1e-4, "warmup": 0},
    "checkpoint": {"dir": "runs/sft", "every": 100, "keep": 3, "resume": True},
}
"""Values of a first config that differ from the defaults."""
LEAST_SAMPLES = 20
"""Samples from which on a part of them is held out: the usual part of fewer is less than one."""
LEAST_STEPS = 10
"""Steps of an epoch, for which the global batch of small data is made smaller."""
MOST_WARMUP = 10
"""Steps of warm-up, where a twentieth of the run is not shorter."""
KEPT = 0.999
"""Share of the samples that ``data.max_length`` has room for: a single long row would make all
layouts pay for it."""
UNIT = 64
"""``data.max_length`` is a multiple of it."""
NO_LIMIT = 2**30
"""Tokens beyond any sample."""


@dataclass(frozen=True)
class Draft:
    """A config on the way to its file."""

    config: RunConfig
    """Model and data are ``FILL_IN`` where they are not known."""
    usual: frozenset[str]
    """``section.key`` of the values of ``USUAL`` that nobody has overridden."""
    notes: tuple[str, ...] = ()
    """What values follow from, for the user."""

    @property
    def has_model(self) -> bool:
        return self.config.model.path != FILL_IN

    @property
    def has_data(self) -> bool:
        return self.config.data.train != FILL_IN

    def with_usual(self, name: str, value: Any) -> "Draft":
        """The draft with another value, unless the user has given one."""
        if name not in self.usual:
            return self
        section, _, key = name.partition(".")
        options = replace(getattr(self.config, section), **{key: value})
        return replace(self, config=replace(self.config, **{section: options}))


def read_draft(model: str | None, data: str | None, overrides: Sequence[str]) -> Draft:
    """The usual values, with model, data and overrides over them; raises ``ValueError`` as reading
    a config does."""
    start = dict(USUAL)
    start["model"] = {"path": model or _UNKNOWN}
    start["data"] = USUAL["data"] | {"train": data or _UNKNOWN}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "usual"
        # JSON is YAML, too.
        file.write_text(json.dumps(start))
        config = load_config(file, overrides)
        usual = frozenset(read_tree(file, overrides).set_in)
    if config.train.steps is not None and "train.epochs" in usual:
        # The file would say that the steps count.
        config = replace(config, train=replace(config.train, epochs=None))
    if config.model.path == _UNKNOWN:
        config = replace(config, model=replace(config.model, path=FILL_IN))
    if config.data.train == _UNKNOWN:
        config = replace(config, data=replace(config.data, train=FILL_IN))
    return Draft(config, usual)


def fit_to_data(draft: Draft, num_gpus: int) -> Draft:
    """The draft with batch, warm-up, longest sample and run folder for its data.

    Lengths need the tokenizer, whose import takes seconds: they are counted only where it and the
    data are on this machine.

    Raises:
        ValueError: the data cannot be read.
    """
    lengths = None
    if draft.has_model and draft.has_data and is_here(draft.config):
        lengths = _lengths(draft.config)
        draft = with_max_length(draft, lengths)
        if len(lengths) < LEAST_SAMPLES:
            draft = draft.with_usual("data.eval", None)
    num_samples = None if lengths is None else _num_trained_on(draft.config, len(lengths))
    draft = draft.with_usual("train.global_batch_size", _batch(num_samples, num_gpus))
    draft = draft.with_usual("train.warmup", _warmup(draft.config, num_samples))
    if draft.has_data:
        found = locate(draft.config.data.sources[0].path)
        name = found.file.stem if found.file else found.hub[0].rpartition("/")[2]
        draft = draft.with_usual("checkpoint.dir", f"runs/{name}")
    return draft


def _lengths(config: RunConfig) -> list[int]:
    """Tokens of each sample, ascending."""
    # Late: both import what takes seconds.
    from megalora.data.splits import load_data
    from megalora.data.tokenizer import load_tokenizer

    whole = replace(config.data, max_length=NO_LIMIT, eval=None)
    tokenizer = load_tokenizer(Path(config.model.path))
    # Of a pair the longer sequence counts.
    split, _ = load_data(whole, tokenizer, objective=config.objective)
    return sorted(split.lengths.tolist())


def with_max_length(draft: Draft, lengths: list[int]) -> Draft:
    """The draft with room for nearly all samples, as far as the model has positions."""
    # The shortest length that leaves out no more than 1 - KEPT of the samples.
    needed = lengths[math.ceil(KEPT * len(lengths)) - 1]
    longest = UNIT * math.ceil(needed / UNIT)
    positions = find_architecture(draft.config.model.path).get("max_position_embeddings")
    if isinstance(positions, int):
        longest = min(longest, positions)
    draft = draft.with_usual("data.max_length", longest)
    limit = draft.config.data.max_length
    num_longer = sum(length > limit for length in lengths)
    note = (
        f"{len(lengths):,} samples of {lengths[0]:,} to {lengths[-1]:,} tokens, half of them"
        f" shorter than {lengths[len(lengths) // 2]:,}"
    )
    if num_longer:
        note += f"; {num_longer:,} are longer than data.max_length={limit:,} (data.too_long)"
    return replace(draft, notes=(*draft.notes, note))


def _num_trained_on(config: RunConfig, num_samples: int) -> int:
    """Samples that are not held out."""
    held_out = config.data.eval
    if isinstance(held_out, float):
        held_out = max(1, round(held_out * num_samples))
    if isinstance(held_out, int):
        num_samples -= held_out
    return max(1, num_samples)


def _batch(num_samples: int | None, num_gpus: int) -> int:
    """Samples of a step: less where an epoch would have few steps, and a multiple of the GPUs, so
    that data parallelism can divide it."""
    batch = USUAL["train"]["global_batch_size"]
    while num_samples is not None and batch > 1 and num_samples < LEAST_STEPS * batch:
        batch //= 2
    return num_gpus * math.ceil(batch / num_gpus)


def _warmup(config: RunConfig, num_samples: int | None) -> int:
    """Steps of warm-up: short in a short run, which would else never reach ``train.lr``."""
    steps = config.train.steps
    if steps is None and num_samples is not None:
        steps = num_steps(config.train, num_samples)
    return MOST_WARMUP if steps is None else min(MOST_WARMUP, steps // 20)
