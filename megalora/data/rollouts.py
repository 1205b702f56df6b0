"""Read completions that were sampled from a policy, with their rewards or advantages.

A row has ``prompt_ids`` and ``completion_ids``, token ids as the engine took and gave them, so that
nothing is tokenised again; or a conversation, of which the assistant's turns are learned. Beside
them:

    reward               a number, or null: not judged
    advantage            a number that is used as it is, in place of a reward
    advantages           the same for each token of the completion
    group                what the rewards of a prompt are compared by; without it, the prompt
    logprobs             log-probability of each completion token in the engine; null: unknown
    proximal_logprobs    the same in the policy that ratios are taken to
    mask                 1 for each completion token that the policy chose, 0 for those of tools
    version              of the adapter that sampled it, 0 and up
    versions             the same for each completion token, of which the oldest counts
    truncated            true where the length limit ended it

Lists are as long as ``completion_ids``. In a row of a JSONL file a column may be missing or null
where it says something only of some rows: mask, version, truncated, single log-probabilities.
"""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from hashlib import blake2b
from typing import Any

import numpy as np

from megalora.config.checks import require
from megalora.config.policy import PolicyConfig
from megalora.data.chat import Encoded, Rollout, encode_conversation
from megalora.data.columns import mapped, resolve_columns, to_conversation
from megalora.data.template import ChatTemplate
from megalora.json_text import is_number
from megalora.wording import typed

BY_TOKEN = ("logprobs", "proximal_logprobs", "advantages")
"""Columns with a number for each completion token that are kept by token."""
_CREDIT = ("reward", "advantage", "advantages")
"""Columns of which a row needs one."""
_BESIDE = (
    *_CREDIT,
    "group",
    "logprobs",
    "proximal_logprobs",
    "mask",
    "version",
    "versions",
    "truncated",
)
_OF_IDS = ("logprobs", "proximal_logprobs", "advantages", "mask", "versions")
"""Columns that belong to the token ids of a completion."""
_HINT = (
    "data.format={prompt_ids: COLUMN, completion_ids: COLUMN, reward: COLUMN} or"
    " data.format={messages: COLUMN, reward: COLUMN}"
)
_LARGEST_ID = (1 << 31) - 1


def resolve_rollouts(format: str | Mapping[str, str], columns: Collection[str]) -> dict[str, str]:
    """Which column holds what, as ``resolve_columns`` says it, for rows of rollouts.

    Raises:
        ValueError: nothing is recognised, a column is missing, the mapping has other keys, or it
            names a column that does not exist.
    """
    if not isinstance(format, str):
        main = ({"prompt_ids", "completion_ids"}, {"messages"}, {"prompt", "completion"})
        found = mapped(format, columns, main, _HINT, optional=_BESIDE)
    else:
        # Columns under their own names; ids come first, for they are what was sampled.
        if {"prompt_ids", "completion_ids"} <= set(columns):
            found = {"prompt_ids": "prompt_ids", "completion_ids": "completion_ids"}
        else:
            found = resolve_columns(format, columns)
        for name in _BESIDE:
            if name in columns:
                found[name] = name
    credit = [name for name in _CREDIT if name in found]
    require(
        len(credit) == 1,
        "objective.name=grpo learns from one of the columns reward, advantage and advantages;"
        f" found {' and '.join(credit) or 'none of them'} among {', '.join(columns)}.\n"
        f"  Say which column is which: {_HINT}",
    )
    if "prompt_ids" not in found:
        of_ids = [name for name in _OF_IDS if name in found]
        require(
            not of_ids,
            f"columns {', '.join(of_ids)} are of tokens, and this row has text, which may become"
            " other tokens than the engine's; give prompt_ids and completion_ids, or leave these"
            " columns out of data.format",
        )
    return found


def check_columns(source: str, columns: Mapping[str, str], options: PolicyConfig) -> None:
    """Raise ``ValueError`` unless rows have what the options read."""
    needed = {"logprobs": options.reads_engine, "proximal_logprobs": options.proximal == "data"}
    for name, is_read in needed.items():
        require(
            not is_read or name in columns,
            f"{source} has no column {name}, which objective.policy.proximal={options.proximal}"
            f" with mismatch={options.mismatch}, drop_gap={options.drop_gap} and"
            f" drop_divergence={options.drop_divergence} reads; without it use proximal=current"
            " or start alone",
        )
    # Given advantages are used as they are.
    judged = {
        "advantage_mean": options.advantage_mean != "group",
        "advantage_std": options.advantage_std != "group",
        "drop_even_groups": options.drop_even_groups,
        "overlong_length": options.overlong_length is not None,
    }
    for option, is_set in judged.items():
        require(
            not is_set or "reward" in columns,
            f"objective.policy.{option} needs rewards, and {source} has advantages; leave it out",
        )


def rollout_of(
    row: Mapping[str, Any],
    columns: Mapping[str, str],
    template: ChatTemplate,
    allow_left_out: Collection[str],
) -> Encoded:
    """A row as a sample; ``columns`` is what ``resolve_rollouts`` returned.

    Raises:
        ValueError: a value that means nothing, or as ``encode_conversation`` says.
    """
    # The first row decides which columns there are. A mask that only later rows have would have its
    # tool's tokens learned; a mapping of the user's leaves out what it does not name.
    if all(key == column for key, column in columns.items()):
        later = [key for key in _BESIDE if key not in columns and row.get(key) is not None]
        require(
            not later,
            f"column {', '.join(later)} is not in the first row, which says what columns there are;"
            " give it there, too, or null",
        )
    held = {key: row.get(column) for key, column in columns.items()}
    if "prompt_ids" in columns:
        encoded = _of_ids(held, columns)
        # Whatever of the completion a mask leaves out.
        prompt = _ids(held["prompt_ids"], columns["prompt_ids"])
    else:
        of_text = {key: name for key, name in columns.items() if key not in _BESIDE}
        conversation = to_conversation(row, of_text, allow_left_out)
        encoded = encode_conversation(conversation, template, allow_left_out)
        # The first learned token ends the prompt.
        prompt = encoded.input_ids[: int(np.argmax(encoded.loss_mask))]
    value = 0.0
    if "advantage" in columns:
        value = _number(held["advantage"], columns["advantage"])
    truncated = held.get("truncated")
    require(
        truncated in (None, True, False),
        f"column {columns.get('truncated')!r} must hold true or false, got {typed(truncated)}",
    )
    rollout = Rollout(
        reward=_reward(held.get("reward"), columns.get("reward", "")),
        group=_group(held.get("group"), prompt),
        version=_oldest(held, columns),
        truncated=bool(truncated),
    )
    return replace(encoded, value=value, rollout=rollout)


def _of_ids(held: Mapping[str, Any], columns: Mapping[str, str]) -> Encoded:
    prompt = _ids(held["prompt_ids"], columns["prompt_ids"])
    completion = _ids(held["completion_ids"], columns["completion_ids"])
    require(
        len(prompt) > 0 and len(completion) > 0,
        f"columns {columns['prompt_ids']!r} and {columns['completion_ids']!r} must hold tokens:"
        " before a completion stands at least one, and an empty one teaches nothing",
    )
    floats: dict[str, np.ndarray] = {}
    for name in BY_TOKEN:
        if name in columns:
            values = _numbers(held[name], columns[name], len(completion), name)
            # The prompt was not sampled.
            before = np.full(len(prompt), np.nan, np.float32)
            floats[name] = np.concatenate([before, values])
    chosen = np.ones(len(completion), bool)
    if held.get("mask") is not None:
        chosen = _mask(held["mask"], columns["mask"], len(completion))
    return Encoded(
        np.concatenate([prompt, completion]),
        np.concatenate([np.zeros(len(prompt), bool), chosen]),
        floats=floats,
    )


def _ids(value: Any, column: str) -> np.ndarray:
    """[n] int32"""
    ids = value if isinstance(value, list) else None
    # A truth value is an int for isinstance.
    is_whole = ids is not None and all(type(one) is int and 0 <= one <= _LARGEST_ID for one in ids)
    if ids is None or not is_whole:
        raise ValueError(f"column {column!r} must hold a list of token ids, got {typed(value)}")
    return np.array(ids, np.int32)


def _list(value: Any, column: str, length: int) -> list[Any]:
    """A list of one value for each completion token."""
    if not isinstance(value, list):
        raise ValueError(
            f"column {column!r} must hold a list, one value for each completion token, got"
            f" {typed(value)}"
        )
    require(
        len(value) == length,
        f"column {column!r} has {len(value):,} values for {length:,} completion tokens",
    )
    return value


def _numbers(value: Any, column: str, length: int, name: str) -> np.ndarray:
    """[length] float32; NaN for null, which an advantage cannot be."""
    # No log-probability at all: an engine that was not asked for any.
    if value is None and name != "advantages":
        return np.full(length, np.nan, np.float32)
    found = np.full(length, np.nan, np.float32)
    for place, one in enumerate(_list(value, column, length)):
        if one is None and name != "advantages":
            continue
        number = _number(one, column)
        require(
            name == "advantages" or number <= 0,
            f"column {column!r} must hold log-probabilities, which are not above 0, got {number:g}",
        )
        found[place] = number
    return found


def _mask(value: Any, column: str, length: int) -> np.ndarray:
    """[length] bool"""
    values = _list(value, column, length)
    wrong = [one for one in values if one not in (0, 1)]
    require(not wrong, f"column {column!r} must hold 0 or 1 for each token, got {wrong[:1]}")
    return np.array(values, bool)


def _number(value: Any, column: str) -> float:
    if not is_number(value):
        raise ValueError(f"column {column!r} must hold a number, got {typed(value)}")
    return float(value)


def _reward(value: Any, column: str) -> float:
    """NaN where nothing judged the completion; whether an answer is right is a reward, too."""
    if value is None:
        return math.nan
    return float(value) if isinstance(value, bool) else _number(value, column)


def _oldest(held: Mapping[str, Any], columns: Mapping[str, str]) -> int:
    """The version that a completion counts as: that of its oldest token."""
    version = _version(held.get("version"), columns.get("version", ""))
    if held.get("versions") is None:
        return version
    column = columns["versions"]
    values = _list(held["versions"], column, len(held["completion_ids"]))
    # Each token has one: what a tool gave has that of the token before.
    require(None not in values, f"column {column!r} must hold a version for each token, got null")
    oldest = min(_version(one, column) for one in values)
    require(
        held.get("version") in (None, oldest),
        f"column {columns.get('version')!r} says {version}, and the oldest of {column!r} is"
        f" {oldest}",
    )
    return oldest


def _version(value: Any, column: str) -> int:
    if value is None:
        return 0
    require(
        type(value) is int and value >= 0,
        f"column {column!r} must hold a version, a number from 0 on, got {typed(value)}",
    )
    return value


def _group(value: Any, prompt: np.ndarray) -> int:
    """A number that is the same for what belongs together, wherever it stands in the file."""
    digest = blake2b(digest_size=8)
    # Prompts stand for themselves; a name "1" is another group than a number 1.
    digest.update(prompt.tobytes() if value is None else b"group " + json.dumps(value).encode())
    return int.from_bytes(digest.digest(), "little")
