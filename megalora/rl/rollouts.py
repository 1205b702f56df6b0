"""Turn judged episodes into samples to train on, and into numbers and lines of a record."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megalora.config.policy import PolicyConfig
from megalora.data.advantages import Credit, credited
from megalora.data.chat import Encoded, Rollout
from megalora.data.splits import Split
from megalora.rl.collect import Round
from megalora.rl.episode import Episode
from megalora.train.run_logs import keep_records

FOLDER = "rollouts"
"""Folder in the run folder with what was sampled: a file for each round."""
ROUNDS = "rounds.jsonl"
"""File in it with one line a round: the prompts that are done with."""
REST = "rest.jsonl"
"""File in it with completions that no round had taken when the run ended."""


def credit_of(episodes: Sequence[Episode], policy: PolicyConfig) -> Credit:
    """Advantages of these episodes, which hold whole groups."""
    rewards = [np.nan if one.reward is None else one.reward for one in episodes]
    return credited(
        np.array(rewards, np.float64),
        np.array([one.prompt.number for one in episodes]),
        np.array([sum(one.mask) for one in episodes]),
        np.array([one.truncated for one in episodes], bool),
        policy,
    )


def is_kept(group: Sequence[Episode], policy: PolicyConfig) -> bool:
    """Whether a group has a completion to train on."""
    return bool(credit_of(group, policy).keeps.any())


def samples_of(
    groups: Sequence[Sequence[Episode]], policy: PolicyConfig, steps: int
) -> tuple[list[Encoded], list[np.ndarray]]:
    """The completions that are trained on, and of each step their places among them.

    Args:
        groups: in the order of their prompts; as many for each step.
        steps: optimizer steps that share them.
    """
    samples: list[Encoded] = []
    by_step: list[np.ndarray] = []
    per_step = len(groups) // steps
    for step in range(steps):
        first = len(samples)
        # Groups are whole within a step, so that advantages are those of the step's batch alone.
        episodes = [one for group in groups[step * per_step :][:per_step] for one in group]
        credit = credit_of(episodes, policy)
        for episode, advantage, reward, kept in zip(
            episodes, credit.advantages, credit.rewards, credit.keeps, strict=True
        ):
            if kept:
                samples.append(_encoded(episode, float(advantage), float(reward)))
        by_step.append(np.arange(first, len(samples)))
    return samples, by_step


def split_of(samples: list[Encoded], like: Split, policy: PolicyConfig) -> Split:
    """Rollouts as samples to train on.

    Args:
        like: the prompts that they answer.
    """
    shapes = {one.routes.shape[1:] for one in samples if one.routes is not None}
    assert len(shapes) <= 1, "one model has sampled them all"
    shape = shapes.pop() if shapes else None
    return Split(like.source, like.max_length, samples, policy=policy, route_shape=shape)


def _encoded(episode: Episode, advantage: float, reward: float) -> Encoded:
    prompt = episode.prompt.tokens
    # The prompt was not sampled; nor was what tools said, which has None.
    logprobs = [np.nan] * len(prompt)
    logprobs += [np.nan if one is None else one for one in episode.logprobs]
    return Encoded(
        np.array([*prompt, *episode.completion_ids], np.int32),
        np.array([0] * len(prompt) + episode.mask, bool),
        value=advantage,
        rollout=Rollout(reward, episode.prompt.number, min(episode.versions), episode.truncated),
        floats={"logprobs": np.array(logprobs, np.float32)},
        routes=episode.routes,
    )


def numbers_of(taken: Round, version: int) -> dict[str, float]:
    """What the log says of a round.

    Args:
        version: of the adapter that is trained on it.
    """
    # Also what is left out of training: rewards are of the policy, whatever is learned of them.
    groups = [*taken.groups, *taken.left_out]
    episodes = [one for group in groups for one in group]
    judged = [one.reward for one in episodes if one.reward is not None]
    lengths = [sum(one.mask) for one in episodes]
    ages = [version - min(one.versions) for one in episodes]
    found = {
        "completion_tokens": float(np.mean(lengths)),
        "truncated": float(np.mean([one.truncated for one in episodes])),
        "unjudged": 1 - len(judged) / len(episodes),
        "staleness": float(np.mean(ages)),
        "staleness_max": float(max(ages)),
        "groups_left_out": float(len(taken.left_out)),
    }
    if judged:
        found["reward"] = float(np.mean(judged))
        found["reward_std"] = float(np.std(judged))
    # Of such a group nothing is learned, whether it is left out or not.
    alike = [len({one.reward for one in group} - {None}) < 2 for group in groups]
    found["groups_alike"] = float(np.mean(alike))
    names = sorted({name for one in episodes for name in one.rewards})
    # A single reward is the total.
    for name in names if len(names) > 1 else []:
        values = [one.rewards[name] for one in episodes if name in one.rewards]
        found[f"reward/{name}"] = float(np.mean(values))
    return found


def is_fresh(taken: Round, version: int) -> bool:
    """Whether every token that is trained on was sampled by this version of the adapter."""
    for group in taken.groups:
        for episode in group:
            # A completion that was sent on has several.
            if set(episode.versions) != {version}:
                return False
    return True


def write_round(folder: Path, round: int, step: int, taken: Round) -> None:
    """Keep a round: a file of its completions, in the form that ``objective.name: grpo`` reads, and
    a line with its prompts.

    Args:
        folder: of the rollouts.
        step: finished optimizer steps.
    """
    _write(folder / file_name(step), taken)
    with (folder / ROUNDS).open("a") as file:
        file.write(json.dumps({"round": round, "step": step, "prompts": taken.prompts}) + "\n")


def write_rest(folder: Path, groups: list[list[Episode]]) -> None:
    """Keep what was judged and not trained on when a run ended, whatever has ended it. Its prompts
    are asked again where the run goes on."""
    _write(folder / REST, Round([], groups))


def _write(place: Path, taken: Round) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for trained, groups in ((True, taken.groups), (False, taken.left_out)):
        for group in groups:
            lines += [json.dumps(_record(episode, trained)) for episode in group]
    # Written beside and then renamed: a run that is killed leaves no half file.
    beside = place.with_suffix(".tmp")
    beside.write_text("\n".join(lines) + "\n")
    beside.replace(place)


def file_name(step: int) -> str:
    """Of the rollouts that are trained on from this number of finished steps on."""
    return f"step_{step:06}.jsonl"


def prompts_done(folder: Path, round: int) -> tuple[set[int], int]:
    """(numbers of the prompts that rounds before this one are done with, how many rounds say so).
    Lines of later rounds, from before the run went back, are taken out."""
    kept, _ = keep_records(folder / ROUNDS, lambda record: record["round"] < round)
    done: set[int] = set()
    for record in kept:
        done.update(record["prompts"])
    return done, len(kept)


def _record(episode: Episode, trained: bool) -> dict[str, Any]:
    return {
        "prompt_ids": episode.prompt.tokens,
        "completion_ids": episode.completion_ids,
        "logprobs": episode.logprobs,
        "mask": episode.mask,
        "reward": episode.reward,
        "group": episode.prompt.number,
        "version": min(episode.versions),
        "versions": episode.versions,
        "truncated": episode.truncated,
        "rewards": episode.rewards,
        "trained": trained,
        "asked": episode.prompt.asked,
        "text": episode.text,
    }
