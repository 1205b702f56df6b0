"""Turn a conversation into token ids and a loss mask that is on for what the assistant says.

Only whole conversations are tokenised, so the ids are those that the served model will see. A
conversation is refused if its chat template leaves a part of it out (``reach.py``). What the
assistant says in the text (``spans.py``) is found by marks (``marks.py``), in any template.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from megalora.data.conversation import Conversation, prepare
from megalora.data.marks import Span
from megalora.data.messages import (
    REASONING,
    Message,
    arguments_as_objects,
    arguments_as_text,
    function_of,
)
from megalora.data.reach import Marked, left_out, locate, refuse_what_is_left_out
from megalora.data.spans import ends_with_special, learned_spans, unmarked_answers
from megalora.data.template import ChatTemplate, RefusedByTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Rollout:
    """What is known of a completion that was sampled, beside its tokens."""

    reward: float = math.nan
    """NaN where nothing judged it."""
    group: int = 0
    """The same for all completions of a prompt."""
    version: int = 0
    """Of the adapter that sampled it."""
    truncated: bool = False
    """Whether the length limit ended it."""


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A tokenised conversation of n tokens."""

    input_ids: np.ndarray
    """[n] int32."""
    loss_mask: np.ndarray
    """[n] bool: the assistant produces this token, end-of-turn included."""
    left_out: tuple[str, ...] = ()
    """Kinds of values that did not reach the text and are allowed not to."""
    stops: bool = True
    """Whether the last learned turn ends with a special token in the loss."""
    num_open: int = 0
    """Number of learned turns before the last one that do not."""
    num_unmarked: int = 0
    """Number of answers that the template's own marks ({% generation %}) leave out, at least in
    part."""
    value: float = 0.0
    """1 where the answer is a good one, 0 where it is a bad one or has no label; what a score is
    compared with: the number of a label, a value, a pair's margin, or a rollout's advantage."""
    second: int = 0
    """Of a pair, which is one sample of two sequences: the first token of the rejected one, before
    which the chosen one ends. 0 where the sample is one sequence."""
    rollout: Rollout = field(default_factory=Rollout)
    """Where the sample is a completion that was sampled."""
    floats: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Name -> [n] float32, a number for each token, such as a log-probability; NaN where there is
    none."""
    routes: np.ndarray | None = None
    """[n - 1, L, K] int16: the experts that each MoE layer of the engine chose for each token but
    the last; None where nobody knows."""

    @property
    def num_target_tokens(self) -> int:
        """Tokens in the loss. The first is never one: nothing stands before it to predict it."""
        return int(self.loss_mask[1:].sum())

    @property
    def sequences(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, loss mask) of each sequence: one, or the two of a pair."""
        if not self.second:
            return [(self.input_ids, self.loss_mask)]
        cut = [self.second]
        return list(zip(np.split(self.input_ids, cut), np.split(self.loss_mask, cut), strict=True))


def encode(
    messages: Sequence[Message],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    num_context: int = 0,
    allow_left_out: Collection[str] = (),
) -> Encoded:
    """Tokenise messages with the tokenizer's chat template; the loss is on the assistant's tokens.

    Args:
        messages: dicts with ``role`` and ``content``.
        tokenizer: a fast tokenizer with a chat template.
        num_context: the first so many messages are never in the loss.
        allow_left_out: kinds of what the template may leave out, such as ``reasoning``.
    Raises:
        ValueError: no chat template, a malformed message, no assistant message, or the template
            refuses them or leaves something out.
    """
    conversation = Conversation(messages=list(messages), num_context=num_context)
    return encode_conversation(conversation, ChatTemplate(tokenizer), allow_left_out)


def encode_conversation(
    conversation: Conversation, template: ChatTemplate, allow_left_out: Collection[str] = ()
) -> Encoded:
    """The same for a conversation with tools, documents or options; see ``encode``."""
    conversation = prepare(conversation, lambda: template.joiner)
    conversation, text, marked, missing = _printed(conversation, template, allow_left_out)
    # ... of which the assistant's turns are learned.
    spans = learned_spans(conversation, template, marked)
    ids, mask = _tokenise(text, spans, template)
    stops = [ends_with_special(text, span, template) for span in spans]
    return Encoded(
        ids,
        mask,
        missing,
        stops=bool(spans) and stops[-1],
        num_open=stops[:-1].count(False),
        num_unmarked=len(unmarked_answers(conversation, template, marked, spans)),
    )


def encode_text(
    conversation: Conversation, template: ChatTemplate, allow_left_out: Collection[str] = ()
) -> Encoded:
    """The tokens of a conversation of which nothing is learned, and which needs no answer."""
    conversation = prepare(conversation, lambda: template.joiner, needs_answer=False)
    _, text, _, missing = _printed(conversation, template, allow_left_out)
    return Encoded(*_tokenise(text, [], template), missing)


def _printed(
    conversation: Conversation, template: ChatTemplate, allow_left_out: Collection[str]
) -> tuple[Conversation, str, Marked, tuple[str, ...]]:
    """The conversation as this template prints it best, its text, where its parts are, and kinds of
    what is missing and may be."""
    template.check_options(conversation)
    conversation = _with_known_reasoning(conversation, template)
    conversation, text = _render(conversation, template)
    _require_unicode(conversation, text)
    # Everything has to be in the text.
    marked = locate(conversation, template, text)
    missing = refuse_what_is_left_out(left_out(conversation, template, marked), allow_left_out)
    return conversation, text, marked, missing


def as_printed(
    conversation: Conversation, template: ChatTemplate, allow_left_out: Collection[str] = ()
) -> Conversation:
    """A conversation, of which nothing need be learned, as this template prints it best.

    Raises:
        ValueError: the template refuses it, or leaves a part of it out that ``allow_left_out`` does
            not name.
    """
    return _printed(conversation, template, allow_left_out)[0]


def _with_known_reasoning(conversation: Conversation, template: ChatTemplate) -> Conversation:
    """The conversation with its reasoning under a key that the template reads."""
    used = _used_reasoning_keys(conversation)
    if not used:
        return conversation
    read = [key for key in REASONING if template.names_key(key, conversation)]
    # Where the template reads no reasoning at all, ``left_out`` finds that it is missing.
    if not read or used <= set(read):
        return conversation
    messages = []
    for message in conversation.messages:
        held = [key for key in REASONING if key in message]
        # Two different texts of reasoning stay as they are: one of them would be lost.
        if len(held) == 1 and held[0] not in read:
            message = _with_key_renamed(message, held[0], read[0])
        messages.append(message)
    return replace(conversation, messages=messages)


def _used_reasoning_keys(conversation: Conversation) -> set[str]:
    used: set[str] = set()
    for message in conversation.messages:
        used |= message.keys() & set(REASONING)
    return used


def _with_key_renamed(message: Message, old: str, new: str) -> Message:
    """The message with one key renamed in its place; templates may print keys in their order."""
    renamed: Message = {}
    for key, value in message.items():
        renamed[new if key == old else key] = value
    return renamed


def _render(conversation: Conversation, template: ChatTemplate) -> tuple[Conversation, str]:
    """The text, and the conversation with arguments of tool calls in the form that makes it.

    Most templates print arguments as JSON and want objects. Some concatenate them (DeepSeek-V3) and
    want JSON text: they refuse an object, or print it as Python would.
    """
    if not any(message.get("tool_calls") for message in conversation.messages):
        return conversation, template.render(conversation)
    as_objects = replace(conversation, messages=arguments_as_objects(conversation.messages))
    as_text = replace(conversation, messages=arguments_as_text(conversation.messages))
    try:
        text = template.render(as_objects)
    except RefusedByTemplate as error:
        try:
            return as_text, template.render(as_text)
        except RefusedByTemplate:
            # The reason that holds for most templates is the one to show.
            raise error from None
    for message in as_objects.messages:
        for call in message.get("tool_calls", ()):
            # Printed as Python would, {'a': 1}, which no server parses.
            arguments = function_of(call).get("arguments")
            if isinstance(arguments, dict) and arguments and str(arguments) in text:
                return as_text, template.render(as_text)
    return as_objects, text


def _require_unicode(conversation: Conversation, text: str) -> None:
    """Raise ``ValueError`` for half a surrogate pair: no tokenizer takes it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = text[error.start]
        where = "the conversation"
        for number, message in enumerate(conversation.messages, 1):
            if _holds(message, half):
                where = f"message {number}"
                break
        raise ValueError(
            f"{where} holds half a character ({half!r}, one half of a surrogate pair), as cutting "
            "a text inside an emoji leaves it; remove it"
        ) from None


def _holds(value: object, char: str) -> bool:
    """Whether a character stands anywhere in a JSON value, keys of objects included."""
    if isinstance(value, dict):
        return any(_holds(key, char) or _holds(item, char) for key, item in value.items())
    if isinstance(value, list):
        return any(_holds(item, char) for item in value)
    return isinstance(value, str) and char in value


def _tokenise(
    text: str, spans: Sequence[Span], template: ChatTemplate
) -> tuple[np.ndarray, np.ndarray]:
    """[n] int32 token ids, and [n] bool: the token covers a character of a span."""
    # The template has printed the special tokens, beginning of sequence included.
    encoding = template.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    # The first character of each token, and the one after its last. Without any token the array
    # would have one dimension, so it is reshaped.
    starts, ends = np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
    mask = np.zeros(len(starts), dtype=bool)
    for start, end in spans:
        # An empty span lies inside a token without covering any of it.
        if end > start:
            mask |= (starts < end) & (ends > start)
    return np.array(encoding["input_ids"], dtype=np.int32), mask
