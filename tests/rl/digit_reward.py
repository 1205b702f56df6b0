"""A reward of a user's own file."""

from typing import Any


def digits(prompt: str, completion: str, row: dict[str, Any]) -> float:
    """How many of four tokens are digits: no token has two."""
    return sum(map(str.isdigit, completion)) / 4
