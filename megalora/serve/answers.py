"""Read vLLM's answers to ``/v1/completions``, and write the fields of requests for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megalora.serve.api import Served

TOKENS_AT_ONCE = 128
"""vLLM's limit on ``logprob_token_ids``."""


@dataclass(frozen=True)
class Completion:
    """A generated text."""

    model: str
    """Id of the model that answered, as the server gives it."""
    version: str | None
    """Version of the adapter; None for the base model."""
    tokens: list[int]
    logprobs: list[float]
    """Log-probability of each of the tokens."""
    text: str
    finish_reason: str


@dataclass(frozen=True)
class Probe:
    """Log-probabilities of tokens[1:], or scores of the text, with and without the adapter."""

    model: str
    adapter: list[float]
    base: list[float]

    @property
    def largest_change(self) -> float:
        """0 for an adapter that does nothing."""
        differences = [abs(a - b) for a, b in zip(self.adapter, self.base, strict=True)]
        return max(differences, default=0.0)


COMPLETION = {"logprobs": 0, "return_token_ids": True}
"""Fields of a request for a completion. With zero alternatives the answer has the log-probabilities
of the chosen tokens."""


def completion(served: Served, answer: dict[str, Any]) -> Completion:
    """The completion in an answer to a request with the fields ``COMPLETION``."""
    choice = answer["choices"][0]
    return Completion(
        model=answer["model"],
        version=served.version,
        tokens=choice["token_ids"],
        logprobs=choice["logprobs"]["token_logprobs"],
        text=choice["text"],
        finish_reason=choice["finish_reason"],
    )


def scores(answer: dict[str, Any]) -> list[float]:
    """The scores in an answer to ``Api.scores``."""
    (row,) = answer["data"]
    # vLLM calls them so with any activation.
    return row["probs"]


def prompt_fields(tokens: Sequence[int]) -> dict[str, Any]:
    """Fields of a request for the log-probabilities of a prompt."""
    # vLLM generates at least one token.
    return {"prompt": [*tokens], "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}


def prompt_logprobs(answer: dict[str, Any], tokens: Sequence[int]) -> list[float]:
    """Log-probabilities of ``tokens[1:]``, from the answer to ``prompt_fields``."""
    # Nothing stands before the first token, so that it has none.
    rows = answer["choices"][0]["prompt_logprobs"][1:]
    found = []
    for row, token in zip(rows, tokens[1:], strict=True):
        # A row has the token of the prompt, and the most likely one if that is another.
        found.append(row[str(token)]["logprob"])
    return found


def prefix_fields(tokens: Sequence[int], start: int) -> dict[str, Any]:
    """Fields of a request for the same numbers without ``prompt_logprobs``.

    Every prefix is a prompt of its own, asked how likely the next token is.

    Args:
        start: place in ``tokens[1:]`` at which the next ``TOKENS_AT_ONCE`` begin.
    """
    prefixes = []
    wanted = set()
    for end in range(start, min(start + TOKENS_AT_ONCE, len(tokens) - 1)):
        prefixes.append([*tokens[: end + 1]])
        wanted.add(tokens[end + 1])
    return {
        "prompt": prefixes,
        "max_tokens": 1,
        "temperature": 0.0,
        "logprobs": 0,
        # Each answer has the log-probabilities of all of these.
        "logprob_token_ids": sorted(wanted),
        # By id, because two tokens may have the same text.
        "return_tokens_as_token_ids": True,
    }


def prefix_logprobs(answer: dict[str, Any], tokens: Sequence[int], start: int) -> list[float]:
    """Log-probabilities from the answer to ``prefix_fields``."""
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    # Prefix k ends with token start + k; the token behind it was asked for.
    wanted = tokens[start + 1 : start + 1 + len(choices)]
    found = []
    for choice, token in zip(choices, wanted, strict=True):
        (logprobs,) = choice["logprobs"]["top_logprobs"]
        found.append(logprobs[f"token_id:{token}"])
    return found
