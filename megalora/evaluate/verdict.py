"""Hold what an evaluation finds, and say which of its answers are right. No torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megalora.config import ObjectiveConfig
from megalora.data.questions import Question, read_questions
from megalora.data.splits import Split
from megalora.evaluate.request import Plan
from megalora.evaluate.rules import rule_of

Kind = Literal["tokens", "pairs", "rated", "taught", "labels"]
"""What a loss is of: target tokens, pairs of answers, answers rated good or bad, a distance from a
teacher, or labels of sequences."""


def kind_of(objective: ObjectiveConfig) -> Kind:
    """What the loss of an evaluation is of. A reward model is judged by pairs."""
    # First of all: a reward model has a score head, and is judged by pairs.
    if objective.pairs:
        return "pairs"
    if objective.labelled:
        return "rated"
    if objective.num_scores:
        return "labels"
    return "tokens" if objective.teacher is None else "taught"


@dataclass(frozen=True)
class Judged:
    """What one of the two, adapter or base, does."""

    loss: float | None
    """Mean cross entropy over target tokens, in nats, or what ``objective`` says of pairs; None
    where a server answers, which gives none."""
    count: int
    """Target tokens of the loss, or pairs, or labelled answers; 0 without one."""
    answers: list[str] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    """For each answer."""
    num_cut: int = 0
    """Number of answers that were cut at ``max_new_tokens``."""
    others: dict[str, float] = field(default_factory=dict)
    """What the objective reports beside its loss."""

    @property
    def perplexity(self) -> float:
        assert self.loss is not None
        # A loss of 710 and more has none that a float holds.
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def accuracy(self) -> float:
        return sum(self.right) / len(self.right)


@dataclass(frozen=True)
class Verdict:
    """An evaluation's result, the same on every rank."""

    data: str
    """One line about the samples."""
    questions: list[Question]
    judged: dict[str, Judged]
    """By who was judged: ``base``, and ``adapter`` where there is one. A base has no score head, so
    that of a classifier or a reward model the adapter alone is judged."""
    asked: dict[str, str] = field(default_factory=dict)
    """Where a server answered: its ids of the two."""
    kind: Kind = "tokens"
    notes: list[str] = field(default_factory=list)
    """Lines that help to read the numbers."""


def questions_of(plan: Plan, split: Split, tokenizer: Any) -> list[Question]:
    """The questions of the rows that the loss is of; raises ``ValueError`` for a row without an
    answer to compare with."""
    questions = read_questions(plan.config.data, split, tokenizer, plan.request.limit)
    for question in questions:
        if not question.expected.strip():
            raise ValueError(
                f"{split.source}, row {question.row}: the last answer is no text, so that no rule"
                " can compare with it"
            )
    return questions


def judge_answers(
    plan: Plan,
    split: Split,
    questions: Sequence[Question],
    tokens: Sequence[Sequence[int]],
    tokenizer: Any,
) -> tuple[list[str], list[bool]]:
    """The answers as text, and whether each is right.

    Args:
        split: where the questions come from, for messages.
        tokens: of each question's answer; the one that ended it may be among them.
    Raises:
        ValueError: the rule cannot compare with a row's answer.
    """
    # A rule of the user's is imported anew on every rank.
    rule = rule_of(plan.request.rule)
    answers: list[str] = []
    right: list[bool] = []
    for question, answer in zip(questions, tokens, strict=True):
        text = tokenizer.decode(answer, skip_special_tokens=True)
        answers.append(text)
        try:
            right.append(rule(text, question.expected))
        except ValueError as error:
            raise ValueError(f"{split.source}, row {question.row}: {error}") from error
    return answers, right
