"""Read the prompts of a run, and say in which order it asks them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch.distributed as dist

from megalora.config import RunConfig
from megalora.config.data import Source
from megalora.data.chat import Encoded, as_printed
from megalora.data.columns import by_form, to_conversation
from megalora.data.conversation import prepare
from megalora.data.mixture import mixture_indices
from megalora.data.order import global_batch_indices
from megalora.data.rows import open_rows
from megalora.data.splits import Split, combined, split_off_eval
from megalora.data.template import ChatTemplate
from megalora.first_rank import on_first_rank
from megalora.rl.episode import Prompt

_FORMS = (
    {"messages": "messages"}, {"messages": "conversations"}, {"messages": "conversation"},
    {"prompt": "prompt", "completion": "completion"},
    {"prompt": "instruction", "completion": "output"}, {"prompt": "prompt"},
)  # fmt: skip
"""Mappings that ``auto`` tries, in this order."""
_SOUGHT = (
    "a column 'messages' or 'conversations', or 'prompt', or 'prompt' and 'completion', or"
    " 'instruction' and 'output'"
)
_HINT = (
    "data.format={prompt: COLUMN}, data.format={prompt: COLUMN, completion: COLUMN} or"
    " data.format={messages: COLUMN}"
)


@dataclass
class Prompts:
    """The prompts of a run. Their rows are on the first rank alone, which judges."""

    train: Split
    """Prompts as samples without a token in the loss; ``value`` is the number in ``rows``."""
    eval: Split | None
    rows: list[Prompt] = field(default_factory=list)
    """Every prompt that was read; empty on other ranks. Numbers are those of the row."""

    def ask(self, number: int, config: RunConfig) -> Prompt:
        """The prompt at this place in the order in which the run asks them; on the first rank."""
        seed = config.data.seed
        if weights := config.data.weights:
            sizes = [len(part.samples) for part in self.train.parts]
            at = mixture_indices(number, 1, sizes, weights, seed)[0]
        else:
            # The endless row of shuffled epochs, one prompt a step.
            at = global_batch_indices(number, 1, len(self.train.samples), seed)[0]
        return self._row(self.train, int(at), number)

    def held_out(self) -> list[Prompt]:
        """All prompts of the evaluation, numbered from 0; on the first rank."""
        if self.eval is None:
            return []
        return [self._row(self.eval, at, at) for at in range(len(self.eval.samples))]

    def _row(self, split: Split, at: int, number: int) -> Prompt:
        return replace(self.rows[int(split.samples[at].value)], number=number)


def read_prompts(config: RunConfig, tokenizer: Any) -> Prompts:
    """Read ``data.train`` and ``data.eval``; collective.

    Raises:
        ValueError: on every rank, where a row cannot be read or no prompt is left.
    """
    rows: list[Prompt] = []

    def read() -> tuple[list[_Source], _Source | None]:
        template = ChatTemplate(tokenizer)
        sources = [_read(source, config, template, rows) for source in config.data.sources]
        held_out = None
        if isinstance(config.data.eval, str):
            held_out = _read(Source(path=config.data.eval), config, template, rows)
        return sources, held_out

    sources, held_out = on_first_rank(read, "the prompts could not be read")
    parts = [source.split(config) for source in sources]
    train = parts[0] if isinstance(config.data.train, str) else combined(parts)
    eval = held_out.split(config) if held_out else None
    if eval is None and config.data.eval is not None:
        assert not isinstance(config.data.eval, str), "a source was read"
        train, eval = split_off_eval(train, config.data.eval, config.data.seed)
    return Prompts(train, eval, rows if dist.get_rank() == 0 else [])


@dataclass(frozen=True)
class _Source:
    """What every rank needs to know of a source: tokens, but no rows."""

    path: str
    tokens: list[np.ndarray]
    """int32, of each prompt that is not too long."""
    numbers: list[int]
    """Of each of these among all prompts."""
    num_too_long: int

    def split(self, config: RunConfig) -> Split:
        """As samples of which nothing is learned."""
        samples: list[Encoded] = []
        for number, tokens in zip(self.numbers, self.tokens, strict=True):
            samples.append(Encoded(tokens, np.zeros(len(tokens), bool), value=float(number)))
        notes: tuple[str, ...] = ()
        if self.num_too_long:
            notes = (f"{self.num_too_long:,} are longer than {_room(config):,} tokens: left out",)
        return Split(
            self.path, config.data.max_length, samples, credit_notes=notes, is_prompts=True
        )


def _room(config: RunConfig) -> int:
    """Tokens of a prompt, at most."""
    return config.data.max_length - config.rl.max_new_tokens


def _read(source: Source, config: RunConfig, template: ChatTemplate, rows: list[Prompt]) -> _Source:
    """The prompts of a source, which are appended to ``rows``."""
    found: list[np.ndarray] = []
    numbers: list[int] = []
    num_too_long = 0
    columns: dict[str, str] | None = None
    every = (row for chunk in open_rows(source.path).chunks() for row in chunk.rows())
    for number, row in enumerate(every, 1):
        # Looked up in the first row, as in training.
        if columns is None:
            columns = _columns(source.format or config.data.format, row)
        try:
            prompt = _prompt(row, columns, config.data.allow_left_out, template)
        except ValueError as error:
            raise ValueError(f"{source.path}, row {number}: {error}") from error
        if len(prompt.tokens) > _room(config):
            num_too_long += 1
            continue
        numbers.append(len(rows))
        found.append(np.array(prompt.tokens, np.int32))
        rows.append(prompt)
    if not found:
        raise ValueError(
            f"{source.path}: no prompt is left; {num_too_long:,} are longer than {_room(config):,}"
            " tokens (data.max_length less rl.max_new_tokens)"
        )
    return _Source(source.path, found, numbers, num_too_long)


def _columns(format: str | Mapping[str, str], row: Mapping[str, Any]) -> dict[str, str]:
    return by_form(format, list(row), _FORMS, _SOUGHT, _HINT)


def _prompt(
    row: Mapping[str, Any],
    columns: Mapping[str, str],
    allow_left_out: Sequence[str],
    template: ChatTemplate,
) -> Prompt:
    conversation = to_conversation(row, columns, allow_left_out)
    conversation = prepare(conversation, lambda: template.joiner, needs_answer=False)
    messages = conversation.messages
    # A completion of several messages is the answer as a whole; of a conversation the last message
    # is, where the assistant said it.
    end = conversation.num_context
    if not end:
        is_answered = bool(messages) and messages[-1]["role"] == "assistant"
        end = len(messages) - int(is_answered)
    if not end:
        raise ValueError("nothing is asked: there is no message before the answer")
    # Rewards compare with it, and the policy must not see it.
    answer = messages[-1]["content"] if end < len(messages) else ""
    asked = messages[end - 1]["content"]
    # Tools, or a system message, that the template does not print would be lost without a word.
    before = as_printed(conversation.first(end), template, allow_left_out)
    tokens = template.prompt_tokens(before)
    expected = answer if isinstance(answer, str) else ""
    return Prompt(0, dict(row), tokens, str(asked), expected, before)
