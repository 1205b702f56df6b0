"""Find the reward that a path names, and check paths before a run starts. No torch."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megalora.json_text import is_number
from megalora.rl.rewards.builtin import NAMES, QUICK, Judge, builtin
from megalora.rl.user_function import FORMS, describe, load_function
from megalora.wording import shorten, typed

OPTION = "rl.rewards"
_ARGUMENTS = ("prompt", "completion", "row")


@dataclass(frozen=True)
class Reward:
    """A reward that was found."""

    judge: Judge
    runs: Literal["here", "loop", "process"]
    """Where it is called: here at once, on the event loop, or in a process of the pool."""
    is_users: bool = False
    """Whether the function is the user's own."""

    def why(self, error: BaseException) -> str:
        """What it raised, in one line; of the user's function with its place."""
        # Ours say all there is to say; a place in our code would only mislead.
        if isinstance(error, ValueError) and not self.is_users:
            return str(error)
        return describe(error)


def load_reward(path: str) -> Reward:
    """The reward at a path: a name of ``builtin``, ``module:function`` or ``file.py:function``.

    Raises:
        ValueError: one line that names the path.
    """
    try:
        known = builtin(path)
    except ValueError as error:
        raise ValueError(f"{OPTION}: {str(error).removeprefix('--rule ')}") from None
    if known is not None:
        # Names come first: "regex" and others are modules as well.
        # A regular expression may take for ever on what a model writes.
        return Reward(known, "here" if path in QUICK else "process")
    if ":" not in path:
        raise ValueError(f"{OPTION}: {path!r} is not a reward; there are {NAMES}, {FORMS}")
    function = load_function(OPTION, path, _ARGUMENTS)

    def judge(asked: str, completion: str, expected: str, row: dict[str, Any]) -> Any:
        return function(asked, completion, row)

    return Reward(judge, "loop" if is_async(function) else "process", is_users=True)


def check_rewards(weights: Mapping[str, float]) -> None:
    """Raise ``ValueError``, in one line, for a path that names no reward or a weight that is no
    finite number. Modules of the user's are imported for it, and nothing is called."""
    for path, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ValueError(f"{OPTION}: the weight of {path} is {typed(weight)}; give a number")
        # A reward that counts for nothing would still take its time.
        if not is_number(weight) or weight == 0:
            raise ValueError(f"{OPTION}: the weight of {path} is {weight}; nothing to learn from")
        # Whoever asks has only a config; the reward itself is loaded again where it is called.
        load_reward(path)


def is_async(function: Any) -> bool:
    """Whether it is an ``async def``, or an object that is called by one."""
    call = getattr(type(function), "__call__", None)  # noqa: B004 the method itself is looked at
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


def as_number(value: Any) -> float | None:
    """What a reward gave, as a float; None where it leaves the completion out.

    Raises:
        ValueError: not a finite number, True, False or None.
    """
    if value is None:
        return None
    # Scalars of NumPy and torch, without importing either.
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, int | float):
        said = f"gave {typed(value)}; a reward is a number, True, False, or None"
        raise ValueError(f"{said} to leave the completion out")
    # An advantage made of NaN would make every completion of its group NaN.
    if not isinstance(value, bool) and not is_number(value):
        raise ValueError(f"gave {shorten(value)}; a reward is a finite number")
    # True and False are 1 and 0.
    return float(value)
