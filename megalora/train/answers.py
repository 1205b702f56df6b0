"""Answer a few fixed questions with the model while it trains (``log.samples``).

Nothing of the training changes: answers are greedy, so that no generator is asked, dropout is off
as in evaluations, and the cache is freed.
"""

from typing import Any

from megalora.config import RunConfig
from megalora.data.questions import Question, asked_by_user, read_questions
from megalora.data.splits import Split
from megalora.data.template import ChatTemplate
from megalora.first_rank import on_first_rank
from megalora.generate.generate import generate
from megalora.generate.options import Sampling, stop_tokens
from megalora.hf.folder import local_folder
from megalora.train.assemble import Run
from megalora.train.run_logs import ShownAnswer


def questions_of(
    config: RunConfig, train: Split, held_out: Split | None, tokenizer: Any
) -> list[Question]:
    """The questions of ``log.samples``, the same on every rank; collective.

    Raises:
        ValueError: on every rank, where a row cannot be read or the chat template refuses one.
    """
    wanted = config.log.samples
    if not wanted:
        return []

    def read() -> list[Question]:
        if isinstance(wanted, int):
            return read_questions(config.data, held_out or train, tokenizer, wanted)
        template = ChatTemplate(tokenizer)
        return [asked_by_user(text, template) for text in wanted]

    # Files are read once, and no rank can have others than the first one.
    return on_first_rank(read, "the questions of log.samples could not be read")


class Answers:
    """Answers the same questions whenever it is asked to."""

    def __init__(self, run: Run, questions: list[Question], tokenizer: Any) -> None:
        self.run = run
        self.questions = questions
        self.tokenizer = tokenizer
        self.options = Sampling(max_new_tokens=run.config.log.sample_tokens)
        self.stop: frozenset[int] = frozenset()
        # Most runs ask nothing: their start waits for no file and no hub.
        if questions:
            self.stop = stop_tokens(local_folder(run.config.model.path))

    def now(self) -> list[ShownAnswer]:
        """Answers by the model as it is, on every rank; empty without questions. Collective."""
        if not self.questions:
            return []
        prompts = [question.tokens for question in self.questions]
        found = generate(self.run.model, prompts, self.options, stop=self.stop)
        answers: list[ShownAnswer] = []
        for question, answer in zip(self.questions, found, strict=True):
            text = self.tokenizer.decode(answer.tokens, skip_special_tokens=True)
            answers.append(
                ShownAnswer(question.asked, question.expected, text, answer.tokens, answer.ended)
            )
        return answers
