"""Say how tokens are chosen and where an answer ends, and check it. No torch: the command line
checks its arguments here."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalora.config.checks import require
from megalora.hf.json_file import read_hf_config, read_json_object

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How each next token is chosen, as transformers and vLLM define the options."""

    temperature: float = 0.0
    """What logits are divided by. 0 takes the most probable token (greedy)."""
    top_p: float = 1.0
    """Only the most probable tokens that together have at least this probability are drawn from."""
    top_k: int = 0
    """Only so many tokens, the most probable ones, are drawn from. 0 for all."""
    seed: int = 0
    """Seed of the draws; every answer has a stream of its own."""
    max_new_tokens: int = 256
    """Tokens of an answer, at most."""

    def __post_init__(self) -> None:
        # NaN passes every comparison with a limit, so it is asked for by itself.
        is_temperature = math.isfinite(self.temperature) and self.temperature >= 0
        require(is_temperature, f"temperature must be 0 or above, got {self.temperature}")
        require(0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, got {self.top_p}")
        require(self.top_k >= 0, f"top_k must not be negative, got {self.top_k}")
        # numpy's key takes 64 bits without a sign, torch's and vLLM's seeds 63.
        require(0 <= self.seed < 2**63, f"seed must be from 0 to 2^63 - 1, got {self.seed}")
        require(
            self.max_new_tokens >= 1,
            f"max_new_tokens must be at least 1, got {self.max_new_tokens}",
        )


def stop_tokens(folder: Path) -> frozenset[int]:
    """Ids of the tokens that end an answer: those of ``generation_config.json`` in a model folder,
    else of its ``config.json``; empty where neither names one.

    Raises:
        ValueError: ``eos_token_id`` is neither a number nor a list of numbers.
    """
    path = folder / GENERATION_CONFIG
    # It comes first, as for transformers: instruct models end a turn with other tokens than the
    # base that they were made from, and only this file says so.
    named = read_json_object(path).get("eos_token_id") if path.is_file() else None
    if named is None:
        path = folder / "config.json"
        named = read_hf_config(folder).get("eos_token_id")
    if named is None:
        return frozenset()
    # Chat models often have two: the end of a turn, and the end of a text.
    ids = named if isinstance(named, list) else [named]
    for token in ids:
        # ``type``, not isinstance: true is an int to Python, and not a token.
        require(type(token) is int, f"{path}: eos_token_id must be token ids, got {named!r}")
    return frozenset(ids)


def model_sampling(folder: Path) -> dict[str, Any]:
    """Fields of ``Sampling`` that a model's ``generation_config.json`` sets, as transformers and
    vLLM take them where a user sets none; empty where it does not sample."""
    path = folder / GENERATION_CONFIG
    config = read_json_object(path) if path.is_file() else {}
    if not config.get("do_sample"):
        return {}
    # transformers' own default of top_k is 50, which vLLM does not have; what is written counts.
    found: dict[str, Any] = {"temperature": 1.0}
    for name in ("temperature", "top_p", "top_k"):
        value = config.get(name)
        if value is not None:
            require(type(value) in (int, float), f"{path}: {name} must be a number, got {value!r}")
            found[name] = value
    return found
