"""Read vLLM's answers to ``/v1/completions``, and write the fields of requests for them."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megalora.json_text import is_number
from megalora.serve.api import Served
from megalora.serve.errors import ServerError
from megalora.wording import printable, typed

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


def _read[**P, T](read: Callable[P, T]) -> Callable[P, T]:
    """Have a reader raise ``ServerError`` for an answer of another shape than vLLM's."""

    @functools.wraps(read)
    def reading(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return read(*args, **kwargs)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ServerError(
                f"the server's answer is not vLLM's ({type(error).__name__}:"
                f" {printable(str(error))[:100]}); is it vLLM 0.32?"
            ) from None

    return reading


def _numbers(values: Any) -> list[float]:
    """A list of numbers; raises ``TypeError`` for another value."""
    if not isinstance(values, list):
        raise TypeError(f"a list of numbers is {typed(values)}")
    for value in values:
        if not is_number(value):
            raise TypeError(f"a number is {typed(value)}")
    return values


def whole_numbers(values: Any) -> list[int]:
    """A list of integers, as token ids are; raises ``TypeError`` for another value."""
    if not isinstance(values, list) or any(type(value) is not int for value in values):
        raise TypeError(f"a list of token ids is {typed(values)}")
    return values


def numbers_or_null(values: Any) -> list[Any]:
    """A list of numbers, of which some may be null; raises ``TypeError`` for another value."""
    given = [value for value in values if value is not None] if isinstance(values, list) else values
    _numbers(given)
    return values


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a text is {typed(value)}")
    return value


@_read
def completion(served: Served, answer: dict[str, Any]) -> Completion:
    """The completion in an answer to a request with the fields ``COMPLETION``."""
    choice = answer["choices"][0]
    return Completion(
        model=_text(answer["model"]),
        version=served.version,
        tokens=whole_numbers(choice["token_ids"]),
        logprobs=_numbers(choice["logprobs"]["token_logprobs"]),
        text=_text(choice["text"]),
        finish_reason=_text(choice["finish_reason"]),
    )


@_read
def scores(answer: dict[str, Any]) -> list[float]:
    """The scores in an answer to ``Api.scores``."""
    (row,) = answer["data"]
    # vLLM calls them so with any activation.
    return _numbers(row["probs"])


def prompt_fields(tokens: Sequence[int]) -> dict[str, Any]:
    """Fields of a request for the log-probabilities of a prompt."""
    # vLLM generates at least one token.
    return {"prompt": [*tokens], "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}


@_read
def prompt_logprobs(answer: dict[str, Any], tokens: Sequence[int]) -> list[float]:
    """Log-probabilities of ``tokens[1:]``, from the answer to ``prompt_fields``."""
    # Nothing stands before the first token, so that it has none.
    rows = answer["choices"][0]["prompt_logprobs"][1:]
    found = []
    for row, token in zip(rows, tokens[1:], strict=True):
        # A row has the token of the prompt, and the most likely one if that is another.
        found.append(row[str(token)]["logprob"])
    return _numbers(found)


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


@_read
def prefix_logprobs(answer: dict[str, Any], tokens: Sequence[int], start: int) -> list[float]:
    """Log-probabilities from the answer to ``prefix_fields``."""
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    # Prefix k ends with token start + k; the token behind it was asked for.
    wanted = tokens[start + 1 : start + 1 + TOKENS_AT_ONCE]
    found = []
    for choice, token in zip(choices, wanted, strict=True):
        (logprobs,) = choice["logprobs"]["top_logprobs"]
        found.append(logprobs[f"token_id:{token}"])
    return _numbers(found)
