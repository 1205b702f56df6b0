"""Say how much better a completion is than others of its prompt: advantages from rewards.

Groups are those of the whole file, whatever shares a batch, a rank or a microbatch. In float64, and
of all rewards of a group, also of completions that are not trained on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megalora.config.checks import require
from megalora.config.policy import PolicyConfig
from megalora.data.chat import Encoded
from megalora.data.rollouts import check_columns
from megalora.data.samples import StoredSamples
from megalora.data.tokens import TokenStore


@dataclass(frozen=True, eq=False)
class Credit:
    """What the samples of a file are trained by."""

    advantages: np.ndarray
    """[samples] float64. Where it takes the batch to know them, rewards without the mean of their
    group."""
    rewards: np.ndarray
    """[samples] float64, shaped; NaN where nothing judged a sample."""
    keeps: np.ndarray
    """[samples] bool: what is trained on."""
    notes: list[str]
    """Lines for the user."""


def with_advantages(
    store: TokenStore, samples: StoredSamples, options: PolicyConfig | None
) -> tuple[StoredSamples, tuple[str, ...]]:
    """Those of a store's rollouts that are trained on, with their advantages as their values, and
    lines for the user.

    Args:
        samples: those of the store that fit; rewards of the others count for their groups.
        options: None where samples are no rollouts, which stay as they are.
    Raises:
        ValueError: a column is missing that the options need, or no rollout is better than another.
    """
    if options is None:
        return samples, ()
    records = store.records
    columns = store.header.columns
    source = store.header.source
    check_columns(source, columns, options)
    if "reward" in columns:
        credit = credited(
            records["reward"], records["group"], records["targets"], records["truncated"], options
        )
        store.give_values(credit.advantages, credit.rewards)
    else:
        # Advantages that somebody has computed are used as they are.
        keeps = ~(records["truncated"] & options.drop_truncated)
        credit = Credit(records["value"], records["reward"], keeps, [])
    pieces = samples.pieces[credit.keeps[samples.pieces["sample"]]]
    moves = "advantages" in columns or options.by_batch or options.kl_coef
    require(
        bool(moves) or not len(pieces) or bool(credit.advantages[pieces["sample"]].any()),
        f"{source}: every advantage is 0, so that nothing would be learned: the rewards of each"
        " group are all alike, or every completion is alone in its group",
    )
    notes = list(credit.notes)
    versions = records["version"]
    if versions.any():
        notes.append(f"sampled by versions {versions.min()} to {versions.max()}")
    return StoredSamples(samples.stores, pieces), tuple(notes)


def credited(
    rewards: np.ndarray,
    groups: np.ndarray,
    lengths: np.ndarray,
    truncated: np.ndarray,
    options: PolicyConfig,
) -> Credit:
    """Advantages of completions from their rewards.

    Args:
        rewards: [samples] float64, NaN where nothing judged one.
        groups: [samples], the same number for completions of one prompt.
        lengths: [samples] learned tokens.
        truncated: [samples] bool: the length limit ended it.
    """
    judged = ~np.isnan(rewards)
    shaped = rewards + overlong_penalty(lengths, options)
    values = np.zeros(len(rewards))
    values[judged] = of_groups(shaped[judged], groups[judged], options)
    keeps = judged.copy()
    notes: list[str] = []
    if not judged.all():
        notes.append(f"{(~judged).sum():,} without a reward were left out")
    even = np.zeros(len(rewards), bool)
    even[judged] = is_even(shaped[judged], groups[judged])
    num_even = len(np.unique(groups[even]))
    if num_even and options.drop_even_groups:
        keeps &= ~even
        notes.append(
            f"{even.sum():,} in {num_even:,} groups whose rewards are all alike were left out"
        )
    elif num_even:
        notes.append(f"{num_even:,} groups have rewards that are all alike, and teach nothing")
    if options.drop_truncated and (cut := keeps & truncated).any():
        keeps &= ~truncated
        notes.append(f"{cut.sum():,} that the length limit has cut were left out")
    return Credit(values, shaped, keeps, notes)


def overlong_penalty(lengths: np.ndarray, options: PolicyConfig) -> np.ndarray:
    """[samples]: 0 up to ``overlong_length - overlong_cache`` tokens, from there on falling to -1
    (DAPO 2503.14476, equation 13)."""
    length = options.overlong_length
    cache = options.overlong_cache
    if length is None or cache is None:
        return np.zeros(len(lengths))
    return -np.clip((lengths - (length - cache)) / cache, 0, 1)


def of_groups(rewards: np.ndarray, groups: np.ndarray, options: PolicyConfig) -> np.ndarray:
    """[samples]: rewards without the mean of their group, over its standard deviation, as far as
    the options say so. A completion that is alone in its group has nothing to compare with: 0."""
    index, sizes, means = _by_group(rewards, groups)
    found = rewards.copy()
    if options.advantage_mean == "group":
        found = rewards - means[index]
    elif options.advantage_mean == "leave_one_out":
        # Less the mean of the others: (r - mean) n / (n - 1).
        scale = sizes / np.maximum(sizes - 1, 1)
        found = (rewards - means[index]) * scale[index]
    if options.advantage_std == "group":
        squares = np.bincount(index, weights=(rewards - means[index]) ** 2)
        deviations = np.sqrt(squares / np.maximum(sizes - 1, 1))
        found = found / (deviations + options.advantage_epsilon)[index]
    return found


def of_batch(advantages: np.ndarray, rewards: np.ndarray, options: PolicyConfig) -> np.ndarray:
    """[samples] of a global batch: what ``of_groups`` left to it.

    Args:
        advantages: what that returned for them.
        rewards: their rewards.
    """
    found = advantages
    if options.advantage_mean == "batch":
        found = found - rewards.mean()
    if options.advantage_std == "batch":
        deviation = rewards.std(ddof=1) if len(rewards) > 1 else 0.0
        found = found / (deviation + options.advantage_epsilon)
    return found


def is_even(rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """[samples] bool: all rewards of its group are alike."""
    if not len(rewards):
        return np.zeros(0, bool)
    index, sizes, _ = _by_group(rewards, groups)
    # Of values, not by a deviation, which rounding keeps from 0.
    lowest = np.full(len(sizes), np.inf)
    highest = np.full(len(sizes), -np.inf)
    np.minimum.at(lowest, index, rewards)
    np.maximum.at(highest, index, rewards)
    return (lowest == highest)[index]


def _by_group(rewards: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, ...]:
    """([samples] place of its group, [groups] sizes, [groups] means)"""
    _, index = np.unique(groups, return_inverse=True)
    sizes = np.bincount(index)
    return index, sizes, np.bincount(index, weights=rewards) / np.maximum(sizes, 1)


def rewards_of(samples: Sequence[Encoded]) -> np.ndarray:
    """[samples] float64."""
    if isinstance(samples, StoredSamples):
        return samples.record_of("reward")
    return np.array([sample.rollout.reward for sample in samples], np.float64)
