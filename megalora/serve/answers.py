"""What vLLM's answers to ``/v1/completions`` say, and the fields to ask for so that they say it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megalora.serve.api import Served

TOKENS_AT_ONCE = 128
"""vLLM's limit on ``logprob_token_ids``."""


@dataclass(frozen=True)
class Completion:
    model: str
    """The id that answered, as the server says."""
    version: str | None
    tokens: list[int]
    logprobs: list[float]
    """Of each of the tokens."""
    text: str
    finish_reason: str


@dataclass(frozen=True)
class Probe:
    """Log-probabilities of tokens[1:], with and without the adapter."""

    model: str
    adapter: list[float]
    base: list[float]

    @property
    def largest_change(self) -> float:
        """0 for an adapter that does nothing."""
        return max((abs(a - b) for a, b in zip(self.adapter, self.base, strict=True)), default=0.0)


COMPLETION = {"logprobs": 0, "return_token_ids": True}
"""Zero alternatives: the chosen tokens' own log-probabilities."""


def completion(served: Served, answer: dict[str, Any]) -> Completion:
    choice = answer["choices"][0]
    return Completion(
        model=answer["model"],
        version=served.version,
        tokens=choice["token_ids"],
        logprobs=choice["logprobs"]["token_logprobs"],
        text=choice["text"],
        finish_reason=choice["finish_reason"],
    )


def prompt_fields(tokens: Sequence[int]) -> dict[str, Any]:
    return {"prompt": [*tokens], "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}


def prompt_logprobs(answer: dict[str, Any], tokens: Sequence[int]) -> list[float]:
    """Of ``tokens[1:]``, from the answer to ``prompt_fields``."""
    rows = answer["choices"][0]["prompt_logprobs"][1:]  # nothing stands before the first token
    return [row[str(token)]["logprob"] for row, token in zip(rows, tokens[1:], strict=True)]


def prefix_fields(tokens: Sequence[int], start: int) -> dict[str, Any]:
    """The same numbers without ``prompt_logprobs``: every prefix is a prompt of its own, asked how
    likely the next token is.

    Args:
        start: where the next ``TOKENS_AT_ONCE`` of ``tokens[1:]`` begin.
    """
    ends = range(start, min(start + TOKENS_AT_ONCE, len(tokens) - 1))
    return {
        "prompt": [[*tokens[: end + 1]] for end in ends], "max_tokens": 1, "temperature": 0.0,
        "logprobs": 0,
        "logprob_token_ids": sorted({tokens[end + 1] for end in ends}),
        "return_tokens_as_token_ids": True,
    }  # fmt: skip


def prefix_logprobs(answer: dict[str, Any], tokens: Sequence[int], start: int) -> list[float]:
    """From the answer to ``prefix_fields``."""
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    wanted = tokens[start + 1 : start + 1 + len(choices)]
    return [
        choice["logprobs"]["top_logprobs"][0][f"token_id:{token}"]
        for choice, token in zip(choices, wanted, strict=True)
    ]
