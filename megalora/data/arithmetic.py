"""Write a small chat data set of sums, so that a run can be tried without a download.

``python -m megalora.data.arithmetic OUT --num 2000 --seed 0 [--pairs | --labels | --ratings]``
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

from megalora.paths import user_path

_OPERATORS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
_NAMES = {"+": "sum", "-": "difference", "*": "product"}
_NUM_OPERANDS = 100
_NUM_QUESTIONS = len(_OPERATORS) * _NUM_OPERANDS**2


def write_arithmetic(
    path: str | Path,
    num_samples: int,
    seed: int,
    *,
    pairs: bool = False,
    labels: bool = False,
    ratings: bool = False,
) -> None:
    """Write a JSONL file of different questions on two numbers below 100, and their answers.

    Args:
        path: the file; its folder is created.
        num_samples: 1 to 30,000, which are all questions there are.
        seed: the same seed gives the same file.
        pairs: write two answers to each question, a bare equation that is preferred (``chosen``)
            and the same number in a sentence (``rejected``).
        labels: write the question alone (``text``) and what it asks for, by name (``label``).
        ratings: write one answer (``messages``) and whether it is good (``label``): the equation in
            every other row, the sentence in the others.
    Raises:
        ValueError: num_samples is out of range.
    """
    if not 1 <= num_samples <= _NUM_QUESTIONS:
        raise ValueError(
            f"{num_samples} samples: there are 1 to {_NUM_QUESTIONS} different questions; ask for"
            " fewer"
        )
    lines = []
    # Numbers of questions, each at most once.
    for code in random.Random(seed).sample(range(_NUM_QUESTIONS), num_samples):
        # code = (kind * 100 + left) * 100 + right.
        rest, right = divmod(code, _NUM_OPERANDS)
        kind, left = divmod(rest, _NUM_OPERANDS)
        operator = list(_OPERATORS)[kind]
        asked, equation, sentence = _conversations(operator, left, right)
        row: dict[str, Any] = {"messages": equation}
        if pairs:
            row = {"chosen": equation, "rejected": sentence}
        if ratings:
            # Alternating, so that any part of the file has as many of both.
            is_good = len(lines) % 2 == 0
            row = {"messages": equation if is_good else sentence, "label": is_good}
        if labels:
            row = {"text": asked, "label": _NAMES[operator]}
        lines.append(json.dumps(row) + "\n")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(lines), encoding="utf-8")


def _conversations(operator: str, left: int, right: int) -> tuple[str, list[Any], list[Any]]:
    """(a question, the conversation that answers with the equation, the one that answers with the
    same number in a sentence)."""
    question = f"{left} {operator} {right}"
    result = _OPERATORS[operator](left, right)
    asked = {"role": "user", "content": f"What is {question}?"}
    equation = {"role": "assistant", "content": f"{question} = {result}"}
    # The number is right in both: what is preferred is the form alone.
    said = f"Let me see. I would say that it is {result}."
    sentence = {"role": "assistant", "content": said}
    return asked["content"], [asked, equation], [asked, sentence]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=user_path, help="the JSONL file to write")
    parser.add_argument(
        "--num", type=int, default=2000, help="number of questions (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    # A row has one form.
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument(
        "--pairs", action="store_true", help="two answers to each question, one preferred"
    )
    forms.add_argument(
        "--labels", action="store_true", help="the question and what it asks for: a label"
    )
    forms.add_argument(
        "--ratings", action="store_true", help="one answer to each question, and if it is good"
    )
    args = parser.parse_args()
    try:
        write_arithmetic(
            args.out, args.num, args.seed, pairs=args.pairs, labels=args.labels,
            ratings=args.ratings,
        )  # fmt: skip
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
