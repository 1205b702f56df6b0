"""Read, check and tokenise a source, and count the samples that cannot be used."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from megalora.config import DataConfig, ObjectiveConfig, TooLong
from megalora.config.policy import PolicyConfig
from megalora.data.advantages import with_advantages
from megalora.data.build_tokens import Recipe
from megalora.data.chat import Encoded
from megalora.data.permutation import permutation
from megalora.data.samples import (
    concatenate,
    floats_of,
    lengths_of,
    sample_numbers,
    select,
    targets_of,
    template_counts,
)
from megalora.data.scored import Scoring
from megalora.data.token_cache import cache_folder, stored_tokens
from megalora.data.too_long import NOTHING_LEFT_OUT, Fit, fit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Split:
    """The samples of one source that can be trained on, and how many cannot."""

    source: str
    max_length: int
    """Limit in tokens."""
    samples: Sequence[Encoded]
    """Read from disk one by one, when they are asked for; a list where a test makes them."""
    fit: Fit = NOTHING_LEFT_OUT
    """What became of samples that are too long or have nothing to learn."""
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Tokens in the longest sequence of each sample of the source, those left out included."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column that each part of the conversation is read from."""
    unused_columns: tuple[str, ...] = ()
    """Columns of the source that nothing is read from."""
    pairs: bool = False
    """Whether each sample is a pair of sequences."""
    labels: bool = False
    """Whether each sample says if its answer is good."""
    scoring: Scoring | None = None
    """What a score head is to learn of a sample; None for a language model."""
    policy: PolicyConfig | None = None
    """How rollouts are learned; None where samples are none."""
    route_shape: tuple[int, int] | None = None
    """(MoE layers, experts per token) where samples say which experts their tokens go to."""
    is_prompts: bool = False
    """Whether samples are prompts, whose completions the run samples itself."""
    credit_notes: tuple[str, ...] = ()
    """What became of rollouts, for the user."""
    parts: tuple["Split", ...] = ()
    """Where ``data.train`` is a list: the samples of each source, which stand one source behind the
    other in ``samples``."""

    @cached_property
    def sample_lengths(self) -> np.ndarray:
        """[samples] int64: tokens in each of ``samples``."""
        return lengths_of(self.samples)

    @cached_property
    def sample_targets(self) -> np.ndarray:
        """[samples] int64: tokens of each of ``samples`` that are in the loss."""
        return targets_of(self.samples)

    @cached_property
    def row_lengths(self) -> np.ndarray:
        """[samples] int64: tokens that each of ``samples`` takes in a row. The last token of a
        sequence is only a label."""
        return self.sample_lengths - (2 if self.pairs else 1)

    @property
    def floats(self) -> tuple[str, ...]:
        """Names of the numbers that each token of a rollout has."""
        return () if self.policy is None else floats_of(self.samples)

    @property
    def num_tokens(self) -> int:
        return int(self.sample_lengths.sum())

    @property
    def num_target_tokens(self) -> int:
        return int(self.sample_targets.sum())

    def summary(self) -> str:
        """One line for the log: how much data there is, and what was left out."""
        called = "pairs" if self.pairs else "samples"
        if self.policy is not None:
            called = "rollouts"
        if self.is_prompts:
            called = "prompts"
        line = f"{self.source}: {len(self.samples):,} {called}, "
        if self.scoring is not None:
            # Without the places behind the texts, each of which is in the loss.
            places = self.num_target_tokens
            line += f"{_short(self.num_tokens - places)} tokens ({_short(places)} scores)"
        elif self.is_prompts:
            line += f"{_short(self.num_tokens)} tokens"
        else:
            num_targets = _short(self.num_target_tokens)
            line += f"{_short(self.num_tokens)} tokens ({num_targets} in the loss)"
        if self.parts:
            return "\n  ".join([line, *(part.summary() for part in self.parts)])
        return "; ".join([line, *self.left_out()])

    def left_out(self) -> list[str]:
        """What was left out and why, and what the user should know of the rest."""
        reasons = [*self.fit.notes(), *self.credit_notes]
        # A prompt ends before anything could be left out of the loss.
        if not self.is_prompts:
            reasons += _template_notes(self.samples)
        if self.unused_columns:
            reasons.append(f"columns not used: {', '.join(self.unused_columns)}")
        return reasons


def _template_notes(samples: Sequence[Encoded]) -> list[str]:
    """What the chat template leaves out of samples, or does not let the model learn."""
    found = template_counts(samples)
    notes = []
    for kind, count in found.left_out.items():
        notes.append(f"{count:,} lost their {kind} to the chat template (data.allow_left_out)")
    if found.num_endless:
        notes.append(
            f"{found.num_endless:,} have no end-of-turn token in the loss behind the last answer: "
            "the model will not learn to stop there"
        )
    if found.num_open:
        notes.append(
            f"{found.num_open:,} have no end-of-turn token in the loss behind an answer before the"
            " last: the model will not learn to stop there"
        )
    if found.num_unmarked:
        notes.append(
            f"{found.num_unmarked:,} answers are not learned, or not whole, because the chat"
            " template does not mark them as generated ({% generation %})"
        )
    return notes


def _short(count: int) -> str:
    """A count in millions or billions where it is that large."""
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:,}"


def load_data(
    data: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    objective: ObjectiveConfig | None = None,
    every_refusal: bool = False,
) -> tuple[Split, Split | None]:
    """The training samples and, where asked for, the evaluation samples; see ``load_split``.

    Args:
        objective: says what a row holds; None for conversations of which the answers are learned.
    """
    objective = objective or ObjectiveConfig()

    def load(source: str, format: str | Mapping[str, str] | None = None) -> Split:
        return load_split(
            source,
            tokenizer,
            format=data.format if format is None else format,
            max_length=data.max_length,
            too_long=data.too_long,
            allow_left_out=data.allow_left_out,
            cache=data.cache,
            workers=data.workers,
            pairs=objective.pairs,
            labels=objective.labelled,
            scoring=Scoring.of(objective),
            policy=objective.learned_policy,
            every_refusal=every_refusal,
        )

    # One after the other: each source has a store of its own.
    parts = [load(source.path, source.format) for source in data.sources]
    # A list of one source is a list, too: its weights are asked for by place.
    train = parts[0] if isinstance(data.train, str) else combined(parts)
    held_out = None
    if isinstance(data.eval, str):
        held_out = load(data.eval)
    elif data.eval is not None:
        # A number or fraction of the training samples, held out.
        train, held_out = split_off_eval(train, data.eval, data.seed)
    for split in (train, held_out):
        if split is not None and split.labels and len(split.samples) < 2:
            raise ValueError(
                f"{split.source} has one sample, and objective.name=kto compares each prompt with"
                " the answer to another one; use two or more samples, also for data.eval"
            )
    return train, held_out


def combined(parts: Sequence[Split]) -> Split:
    """The samples of several sources, one source behind the other."""
    return Split(
        f"{len(parts)} sources",
        parts[0].max_length,
        concatenate([part.samples for part in parts]),
        lengths=np.concatenate([part.lengths for part in parts]),
        pairs=parts[0].pairs,
        labels=parts[0].labels,
        scoring=parts[0].scoring,
        policy=parts[0].policy,
        is_prompts=parts[0].is_prompts,
        parts=tuple(parts),
    )


def load_split(
    source: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    format: str | Mapping[str, str],
    max_length: int,
    too_long: TooLong = "left_out",
    allow_left_out: Collection[str] = (),
    cache: str | None = None,
    workers: int | None = None,
    pairs: bool = False,
    labels: bool = False,
    scoring: Scoring | None = None,
    policy: PolicyConfig | None = None,
    every_refusal: bool = False,
) -> Split:
    """The samples of a source, tokenised once and kept (``token_cache.py``).

    Args:
        source: see ``locate``.
        tokenizer: a fast tokenizer with a chat template.
        format: see ``resolve_columns``; its columns are looked up in the first row.
        max_length: in tokens, of the whole conversation; of each of a pair's two.
        too_long: what becomes of longer samples.
        allow_left_out: see ``DataConfig``.
        cache: folder for token stores; see ``cache_folder``.
        workers: processes that tokenise where there is no store yet; None for what pays.
        pairs, labels: whether a row holds two answers, or says if its answer is good.
        scoring, policy: what a score head is to learn, or how rollouts are; None for neither.
        every_refusal: try all rows and name all that are refused, instead of the first alone.
    Raises:
        ValueError: a row that cannot be read or tokenised, or of which something would be left out
            (with its number), or no sample is left.
    """
    # The limit is no part of the recipe: samples are stored whole.
    how = (allow_left_out, workers, every_refusal, pairs, labels, scoring, policy is not None)
    recipe = Recipe(source, tokenizer, format, *how)
    store = stored_tokens(recipe, cache_folder(cache))
    # The place to score, behind the text, is no token of it.
    places = int(scoring is not None)
    samples, found = fit(store, max_length, too_long, places)
    samples, notes = with_advantages(store, samples, policy)
    split = Split(
        source, max_length, samples, fit=found, lengths=store.longest - places, pairs=pairs,
        labels=labels, scoring=scoring, columns=store.header.columns,
        unused_columns=tuple(store.header.unused_columns), policy=policy, credit_notes=notes,
    )  # fmt: skip
    if not split.samples:
        raise ValueError(_nothing_is_left(split, store.num_samples))
    return split


def _nothing_is_left(split: Split, num_rows: int) -> str:
    fix = "Look at the rows and at the model's chat template."
    if split.fit.num_too_long:
        fix = "Raise data.max_length, or set data.too_long to cut or split them."
    reasons = "; ".join(split.left_out())
    return f"{split.source}: none of the {num_rows:,} samples is left: {reasons}.\n  {fix}"


def split_off_eval(split: Split, eval: float, seed: int) -> tuple[Split, Split]:
    """Hold out samples for evaluation: (train, eval), each in the order of the source.

    Args:
        split: at least two samples.
        eval: how many samples (int) or which fraction of them (float between 0 and 1; at least one
            sample).
        seed: seed of the choice.
    Raises:
        ValueError: one of the two would have no sample.
    """
    # Pieces of one sample are held out together: they share their text.
    numbers = sample_numbers(split.samples)
    num_samples = int(numbers[-1]) + 1
    # True is an int for isinstance.
    if isinstance(eval, bool) or (isinstance(eval, float) and not 0 < eval < 1):
        raise ValueError(
            f"data.eval={eval} is neither a count (integer) nor a fraction between 0 and 1"
        )
    num_eval = int(eval)
    if isinstance(eval, float):
        num_eval = max(1, round(eval * num_samples))
    if not 1 <= num_eval < num_samples:
        raise ValueError(
            f"data.eval={eval} would hold out {num_eval} of the {num_samples} samples of"
            f" {split.source}.\n  Choose between 1 and {num_samples - 1}, or name another file."
        )
    # The third word keeps this choice apart from the order of any epoch.
    chosen = permutation(num_samples, seed, 0, 1)[:num_eval]
    is_chosen = np.zeros(num_samples, bool)
    is_chosen[chosen] = True
    held_out = is_chosen[numbers]
    eval_samples = select(split.samples, np.flatnonzero(held_out))
    # What was left out of the source is said once, of the training samples.
    name = f"{split.source} (held out)"
    held = Split(
        name, split.max_length, eval_samples, pairs=split.pairs, labels=split.labels,
        scoring=split.scoring, policy=split.policy, is_prompts=split.is_prompts,
    )  # fmt: skip
    return _without(split, held_out), held


def _without(split: Split, held_out: np.ndarray) -> Split:
    """The split without the samples that are held out, and each of its parts without its own.

    Args:
        held_out: [samples] bool.
    """
    if not split.parts:
        return replace(split, samples=select(split.samples, np.flatnonzero(~held_out)))
    parts = []
    start = 0
    for part in split.parts:
        end = start + len(part.samples)
        parts.append(_without(part, held_out[start:end]))
        start = end
        if not parts[-1].samples:
            raise ValueError(
                f"data.eval holds out all samples of {part.source}; hold out fewer, or name another"
                " file"
            )
    return combined(parts)
