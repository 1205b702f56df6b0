"""Play an episode with an engine that answers what it was told to."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megalora.data.conversation import Conversation
from megalora.data.template import ChatTemplate
from megalora.rl.conversation import Client
from megalora.rl.environment import Environment
from megalora.rl.episode import Episode, Prompt, Sampled
from megalora.rl.rewards.failures import Failures
from megalora.rl.rewards.judge import Rewards


@dataclass
class Engine:
    """Answers what it was told to, and keeps what it was asked."""

    answers: list[list[int]]
    end: int
    """The stop token: an answer without it at its end was cut."""
    with_routes: bool = True
    asked: list[list[int]] = field(default_factory=list)

    async def __call__(self, tokens: Sequence[int]) -> Sampled:
        # Others may run while an engine works.
        await asyncio.sleep(0)
        turn = len(self.asked)
        self.asked.append(list(tokens))
        ids = self.answers[turn]
        logprobs = [-float(turn + 1) - place / 100 for place in range(len(ids))]
        # [tokens, 1 layer, k 2]: the place of the token, and the turn in which it was read.
        num_read = len(tokens) + len(ids) - 1
        routes = np.stack([np.arange(num_read), np.full(num_read, turn)], axis=1)[:, None]
        return Sampled(
            ids, logprobs, ids[-1] == self.end, [10 * turn] * len(ids),
            routes.astype(np.int16) if self.with_routes else None,
        )  # fmt: skip


def told(tokenizer: Any, *texts: str, cut: bool = False) -> Engine:
    """An engine that answers with these texts."""
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    answers = [[*tokenizer.encode(text, add_special_tokens=False), end] for text in texts]
    if cut:
        answers[-1].pop()
    return Engine(answers, end)


def play(
    rollout: Any,
    engine: Any,
    tokenizer: Any,
    *,
    weights: dict[str, float] | None = None,
    failures: Failures | None = None,
    max_length: int = 1000,
    timeout_s: float = 600,
    expected: str = "",
    conversation: Conversation | None = None,
    row: dict[str, Any] | None = None,
) -> Episode:
    """One episode of a prompt, led by a function, or by what stands at a path."""
    messages = [{"role": "user", "content": "What is the sum?"}]
    template = ChatTemplate(tokenizer)
    tokens = template.prompt_tokens(conversation or Conversation(messages=messages))
    row = row or {"question": "sum"}
    prompt = Prompt(7, row, tokens, "What is the sum?", expected, conversation)

    async def run() -> Episode:
        async with Rewards(weights or {}, failures=failures) as rewards:
            is_path = rollout is None or isinstance(rollout, str)
            environment = Environment(
                rollout if is_path else None, rewards, template,
                max_length=max_length, timeout_s=timeout_s,
            )  # fmt: skip
            if not is_path:
                environment.rollout = rollout
                environment.path = "mine:rollout"
            return await environment.play(prompt, 3, engine)

    return asyncio.run(run())


async def twice(client: Client, row: dict[str, Any]) -> float:
    """An environment of two turns."""
    await client.generate()
    await client.generate("Good morning to you")
    return 0.5
