"""What is asked, sampled and judged. No torch: what runs beside the training needs none."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megalora.data.conversation import Conversation


@dataclass(frozen=True, eq=False)
class Prompt:
    """A row of the data as it is asked; every completion of its group answers it."""

    number: int
    """Its place in the order in which the run asks prompts, from 0; no other of the run has it,
    also where a row is asked again in a later epoch."""
    row: dict[str, Any]
    """As the data has it, all columns."""
    tokens: list[int]
    """The conversation up to where the answer begins, as the chat template writes it."""
    asked: str
    """The text of the last message before the answer."""
    expected: str
    """The text of the row's answer; empty where the row has none."""
    conversation: Conversation | None = None
    """What ``tokens`` were written of, whose tools and template options later turns need, too."""


@dataclass(frozen=True, eq=False)
class Sampled:
    """What an engine sampled behind the tokens that it was given."""

    tokens: list[int]
    """The token that ended it included."""
    logprobs: list[float]
    """Of each token, in the engine, at the temperature that it was sampled at."""
    ended: bool
    """Whether a stop token ended it; otherwise the length limit did."""
    versions: list[int]
    """Of the adapter that sampled each token."""
    routes: np.ndarray | None = None
    """[tokens read, L, k] int16: the experts that each MoE layer chose for each token that the
    engine read, those given included and the last sampled one left out; None where it does not say.
    """


Ask = Callable[[Sequence[int]], Awaitable[Sampled]]
"""Has the engine sample behind these token ids."""


@dataclass(frozen=True, eq=False)
class Episode:
    """One completion of a prompt, with everything that was said in it. Lists are as long as
    ``completion_ids``."""

    prompt: Prompt
    sample: int
    """Its place in the prompt's group."""
    completion_ids: list[int]
    """All that stands behind ``prompt.tokens``, what tools said included."""
    logprobs: list[float | None]
    """In the engine; None where the engine did not sample the token."""
    mask: list[int]
    """1 where the engine sampled the token, 0 where it was given."""
    versions: list[int]
    """Of the adapter; of a token that was given, that of the one before."""
    truncated: bool
    """Whether a length limit ended it."""
    text: str
    """What the rewards read: the completion without special tokens."""
    reward: float | None
    """None where nothing judged it, which leaves it out."""
    rewards: dict[str, float]
    """Each reward by its name, before weights."""
    routes: np.ndarray | None = None
    """As in ``Sampled``, of prompt and completion without the last token."""
