"""Episodes that need no reward's process: one completion, judged by its token ids."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from megalora.config import RLConfig, RunConfig
from megalora.config.objective import ObjectiveConfig
from megalora.config.policy import PolicyConfig
from megalora.rl.batches import PlayWith
from megalora.rl.episode import Ask, Episode, Prompt
from megalora.rl.feed import sampling_feed
from megalora.rl.play import playing
from megalora.train.loop import train
from tests.jsonl import write_jsonl
from tests.parity.runs import make_config

LOW = 64
"""Token ids below this are rewarded."""


def write_prompts(path: Path, num: int = 10) -> Path:
    """Rows with a question and its answer."""
    rows = [{"prompt": f"What is {n}?", "completion": f"{n}", "level": n} for n in range(num)]
    write_jsonl(path, rows)
    return path


@asynccontextmanager
async def by_ids(config: RunConfig) -> AsyncIterator[PlayWith]:
    """Rewards the share of low token ids."""

    async def play(prompt: Prompt, place: int, ask: Ask) -> Episode:
        sampled = await ask(prompt.tokens)
        tokens = sampled.tokens
        reward = sum(token < LOW for token in tokens) / len(tokens)
        return Episode(
            prompt, place, tokens, list(sampled.logprobs), [1] * len(tokens), sampled.versions,
            not sampled.ended, " ".join(map(str, tokens)), reward, {"low": reward}, sampled.routes,
        )  # fmt: skip

    yield play


def rl_config(
    tiny: Path, prompts: Path, out: Path, policy: dict[str, Any] | None = None, **options: Any
) -> RunConfig:
    """Four completions of four tokens for each of two prompts a step.

    Args:
        policy: options of the loss.
        options: ``rl`` for that section, others as in ``make_config``.
    """
    rl = RLConfig(
        **{"rewards": "exact", "group_size": 4, "max_new_tokens": 4, **options.pop("rl", {})}
    )
    options = {"parallel": {}, "eval": 3, "steps": 4, "lr": 3e-3, **options}
    objective = ObjectiveConfig(name="grpo", policy=PolicyConfig(**(policy or {})))
    return make_config(tiny, prompts, out, objective=objective, rl=rl, **options)


def train_by_ids(config: RunConfig) -> Path | None:
    """``megalora rl`` with these episodes; a rank function."""
    return train(config, feed=sampling_feed(by_ids))


def train_and_judge(config: RunConfig) -> Path | None:
    """``megalora rl`` as the config says it; a rank function."""
    return train(config, feed=sampling_feed(playing))
