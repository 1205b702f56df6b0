"""Check that a checkpoint belongs to the run that a config describes."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megalora.adapters.files import LORA_SECTION
from megalora.adapters.trained_on import model_options, trained_on
from megalora.adapters.training_state import SavedState
from megalora.config import RunConfig
from megalora.data.chat import Encoded
from megalora.data.digest import samples_digest
from megalora.lora.section import differing, settings
from megalora.lora.spec import Adapted, has_start
from megalora.model.shape import ModelShape
from megalora.train.checkpoint.identity import Identity, Samples

SAME_RUN = (
    "model.dtype", "data.format", "data.max_length", "data.seed", "train.global_batch_size",
    "lora.rank", "lora.alpha", "lora.target_modules", "lora.exclude_modules", "lora.layers",
    "lora.rank_pattern",
    "lora.alpha_pattern", "lora.expert_rank", "lora.use_rslora",
)  # fmt: skip
"""Options that decide the order of samples, and which parameters are trained on them: they must not
change in the middle of a run."""
ADDED = {
    "data.too_long": "left_out", "objective.name": "sft", "objective.reference": "base",
    "lora.share_outer": False, "lora.use_dora": False, "lora.init": "lora", "lora.lora_bias": False,
    "lora.modules_to_save": [], "lora.trainable_token_indices": [], "lora.bias": "none",
    "model.weight_format": "auto", "model.quantised_parts": "linears",
    "train.relora": None, "train.ema_decay": 0.0,
    "objective.num_labels": None, "objective.labels": None,
    "rl.group_size": 8, "rl.steps_per_rollout": 1,
}  # fmt: skip
"""Such options that checkpoints of earlier versions lack, and what they did then."""
BY_CONTENT = ("model.path", "data.train", "data.eval")
"""Options that are compared by content; by name where a checkpoint has no digests."""
_MISSING = object()
"""Stands for an option that a saved config lacks; None is a value."""


def check_same_run(
    state: SavedState,
    config: RunConfig,
    identity: Identity,
    adapted: list[Adapted],
    shape: ModelShape,
) -> list[str]:
    """Raise ``ValueError``, with what differs, unless the run that saved ``state`` is this one;
    returns lines for the user.

    Args:
        shape: of the model, with what this run trains of it beside adapters.
    """
    if state.imported_from is not None:
        _check_import(state, config, identity, adapted)
        if state.shape_of(replace(shape.of_base, num_scores=shape.num_scores)) != shape:
            raise ValueError(
                f"{state.folder} trains other weights of the base than this config does"
                " (lora.modules_to_save, lora.trainable_token_indices, lora.bias). Use the section"
                f" in {state.folder / LORA_SECTION}"
            )
        return _base_then(state, config)
    _check_options(state, config)
    # Digests cannot be made up afterwards: the data may have changed since.
    if state.identity is None:
        _check_names(state, config)
        return [
            f"{state.folder} has no digests of its data and base (an earlier version saved it):"
            " they are compared by name, not by content"
        ]
    _check_content(state, state.identity, config, identity)
    return []


def check_same_samples(
    state: SavedState, config: RunConfig, samples: Samples, encoded: Sequence[Encoded]
) -> None:
    """Raise ``ValueError`` unless the data makes the samples that the run has been trained on.

    Args:
        samples: number and digest of this run's samples.
        encoded: the samples themselves, for checkpoints of earlier versions.
    """
    if state.imported_from is not None:
        return
    # The commoner mistake first, with numbers; a digest only says that something differs.
    if state.num_samples != samples.count:
        named = ", ".join(source.path for source in config.data.sources)
        raise ValueError(
            f"{state.folder} was trained on {state.num_samples:,} samples of {named},"
            f" which now has {samples.count:,}: samples would be repeated or skipped. Restore the"
            " data, or start a new run in another checkpoint.dir."
        )
    if state.identity is None:
        return
    saved = state.identity["samples"]
    digest = samples.digest
    # Earlier versions digested tokens, not digests of samples, and wrote no kind before it.
    if saved and ":" not in saved:
        digest = samples_digest(encoded)
    if saved != digest:
        raise ValueError(
            f"{state.folder} was trained on other tokens: the data's files are the same, but the"
            " tokenizer, the chat template or megalora itself now makes other samples of them."
            " Restore it, or start a new run in another checkpoint.dir."
        )


def _value(config: dict[str, Any], option: str) -> Any:
    """The value of ``section.key`` in a config as JSON holds it."""
    section, key = option.split(".")
    return config.get(section, {}).get(key, _MISSING)


def _check_options(state: SavedState, config: RunConfig) -> None:
    now = asdict(config)
    options: list[str] = [*SAME_RUN, *ADDED]
    # data.eval is a source, which is compared by content, or a number of samples to hold out.
    was_source = isinstance(_value(state.config, "data.eval"), str)
    is_source = isinstance(config.data.eval, str)
    if not (was_source and is_source):
        options.append("data.eval")
    for option in options:
        before = _value(state.config, option)
        if before is _MISSING:
            before = ADDED.get(option, _MISSING)
        if before is _MISSING:
            raise ValueError(f"the state of {state.folder} is damaged: it has no config.{option}")
        if before != _value(now, option):
            raise _other_value(state, option, before, _value(now, option))


def _other_value(state: SavedState, option: str, before: Any, now: Any) -> ValueError:
    return ValueError(
        f"{state.folder} was trained with {option}={before}, this run has {now}. Use the same"
        " value, or start a new run in another checkpoint.dir."
    )


def _check_names(state: SavedState, config: RunConfig) -> None:
    now = asdict(config)
    for option in BY_CONTENT:
        before = _value(state.config, option)
        after = _value(now, option)
        are_names = isinstance(before, str) and isinstance(after, str)
        same = _same_place(before, after) if are_names else before == after
        if not same:
            raise _other_value(state, option, before, after)


def _check_content(
    state: SavedState, before: dict[str, Any], config: RunConfig, now: Identity
) -> None:
    sources = {"data.train": (before["train"], now.train), "data.eval": (before["eval"], now.eval)}
    for option, (old, new) in sources.items():
        if old != new:
            named = _value(asdict(config), option)
            raise ValueError(
                f"{state.folder} was trained with other data: the content of {option}={named} is"
                f" not that of {_value(state.config, option)} when it was saved. Restore it, or"
                " start a new run in another checkpoint.dir."
            )
    # Checkpoints of earlier versions had none.
    if before.get("teacher") != now.teacher:
        raise ValueError(
            f"{state.folder} was trained with another teacher:"
            f" objective.teacher={config.objective.teacher} (then"
            f" {state.config.get('objective', {}).get('teacher')}). Restore it, or start a new run"
            " in another checkpoint.dir."
        )
    if what := _other_base(before, now):
        raise ValueError(
            f"{state.folder} was trained on another base: {what} in model.path={config.model.path}"
            f" (then {_value(state.config, 'model.path')}). Restore it, or start a new run in"
            " another checkpoint.dir."
        )


def _other_base(before: dict[str, Any], now: Identity) -> str:
    """Which part of the base has changed, in words; empty where none has."""
    old = before["config"]
    new = now.config
    # A field of config.json says more than "the weights", so it comes first.
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            return (
                f"config.json had {key}={old.get(key, 'nothing')}, now {new.get(key, 'nothing')},"
            )
    return "the weights have changed" if before["weights"] != now.weights else ""


def _check_import(
    state: SavedState, config: RunConfig, identity: Identity, adapted: list[Adapted]
) -> None:
    """An imported adapter says which base it is for and what it adapts; data and everything else
    may be chosen."""
    if state.identity is None:
        what = "" if _same_place(state.base, config.model.path) else "the name"
    else:
        # An import need not have read the weights: then they count as the same.
        weights = state.identity["weights"] or identity.weights
        what = _other_base({**state.identity, "weights": weights}, identity)
    if what:
        raise ValueError(
            f"{state.folder} was imported for the base {state.base}, this run has"
            f" model.path={config.model.path}, which is another ({what} differs). Import it for"
            " this one"
        )
    if state.num_scores != config.objective.num_scores:
        raise ValueError(
            f"{state.folder} holds a score head of {state.num_scores} labels, and this run"
            f" (objective.name={config.objective.name}) trains one of {config.objective.num_scores}"
        )
    # Files have A and B as they are, and nothing says what part of them is the base's.
    if has_start(adapted):
        raise ValueError(
            f"{state.folder} was imported and holds A and B alone: lora.init={config.lora.init}"
            " initialises new adapters from the base weights. Leave lora.init out to resume it"
        )
    if apart := differing(settings(adapted), state.adapted):
        raise ValueError(
            f"{state.folder} holds other adapters than this config's lora section describes:"
            f" {len(apart)} modules differ in presence, rank, scale or sharing, such as"
            f" {apart[0]}. Use the section in {state.folder / LORA_SECTION}"
        )


def _base_then(state: SavedState, config: RunConfig) -> list[str]:
    """A line where an imported adapter was trained on other values of its base than this run has,
    which may be meant."""
    known = trained_on(state.folder)
    if known is None:
        return []
    model = config.model
    now = replace(known, weight_format=model.weight_format, quantised_parts=model.quantised_parts)
    if model_options(known) == model_options(now):
        return []
    return [
        f"note: {state.folder} was trained on a base that was {known.words()}, and in this run it"
        f" is {now.words()}"
    ]


def _same_place(one: str, other: str) -> bool:
    """Whether two values of an option mean the same hub name, or the same folder however it is
    written."""
    return one == other or Path(one).resolve() == Path(other).resolve()
