"""A reward of one's own: digits, of which a random model says few."""

from typing import Any


def digits(prompt: str, completion: str, row: dict[str, Any]) -> float:
    """The share of four tokens that are digits; no token of the tiny model has two."""
    return sum(map(str.isdigit, completion)) / 4
