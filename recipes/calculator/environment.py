"""Let the model use a calculator: it writes ``<calc>12 * 3</calc>``, and reads what that gives.

Used by ``rl.environment: recipes/calculator/environment.py:rollout``, with a reward that reads the
last answer, such as ``rl.rewards: {last-number: 1.0}``.
"""

import ast
import operator
import re
from collections.abc import Callable
from typing import Any

from megalora.rl.conversation import Client

CALL = re.compile(r"<calc>(.*?)</calc>", re.DOTALL)
MOST_CALLS = 4
LARGEST = 1e15
_OPERATIONS: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


async def rollout(client: Client, row: dict[str, Any]) -> None:
    """Answer calls until the model answers without one; ``rl.rewards`` judge the whole."""
    for _ in range(MOST_CALLS):
        reply = await client.generate()
        call = CALL.search(reply.text)
        # Nothing can follow an answer that the length limit cut.
        if call is None or not reply.ended:
            return
        result = calculate(call[1])
        shown = "error" if result is None else f"{result:g}"
        client.add(f"<result>{shown}</result>")
    await client.generate()


def calculate(text: str) -> float | None:
    """The value of a sum of numbers with + - * / and brackets; None where it is none.

    The text is parsed and not run: it is written by a model.
    """
    try:
        value = _value(ast.parse(text.strip(), mode="eval").body)
    # No sum, divided by 0, too large, or nested too deeply.
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None
    return value if abs(value) < LARGEST else None


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return float(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError(f"{ast.dump(node)[:40]} is not part of a sum")
