"""One row of a data set -> token ids and a loss mask that is on for what the assistant said.

Some chat templates mark the assistant's text themselves (``{% generation %}``). For all others the mask is found by
rendering the conversation again with one message replaced by a sentinel: whatever differs from the full text is that
message, in any template. Only whole conversations are tokenised, so the ids are those the served model will see.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2.exceptions import TemplateError

from megalora.data.columns import Message, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""First character, and the one after the last."""
ROLES = ("system", "developer", "user", "assistant", "tool")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A tokenised conversation of n tokens."""

    input_ids: np.ndarray
    """[n] int32."""
    loss_mask: np.ndarray
    """[n] bool: the assistant produces this token, end-of-turn included."""

    @property
    def num_target_tokens(self) -> int:
        """Tokens in the loss. The first token is never one: nothing stands before it to predict it from."""
        return int(self.loss_mask[1:].sum())


def encode(messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", *, num_context: int = 0) -> Encoded:
    """Tokenise a conversation with the tokenizer's chat template; the loss is on the assistant's tokens.

    Where the template marks them, its marks decide. Otherwise an assistant turn begins where the generation prompt
    ends, so what the template puts before the content (an empty ``<think>`` block) is learned: the served model has to
    produce it. In both cases the end-of-turn token that follows directly is in the loss.

    Args:
        messages: dicts with ``role`` and ``content``.
        tokenizer: a fast tokenizer with a chat template.
        num_context: the first so many messages are never in the loss.
    Raises:
        ValueError: no chat template, a malformed message, no assistant message, or the template refuses them.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template.\n"
            "  Use the instruct model's tokenizer, or put a chat_template.jinja into the model folder."
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} is a slow one, which cannot tell which text a token covers.\n"
            "  Save it with a tokenizer.json (transformers' fast format)."
        )
    messages = [_checked(message, number) for number, message in enumerate(messages, 1)]
    if all(message["role"] != "assistant" for message in messages[num_context:]):
        roles = ", ".join(message["role"] for message in messages[num_context:]) or "none"
        raise ValueError(f"there is no assistant message to learn (roles: {roles}); add one or remove the row")
    context_has_assistant = any(message["role"] == "assistant" for message in messages[:num_context])
    if _GENERATION.search(tokenizer.get_chat_template()) and not context_has_assistant:
        text, spans = _marked_spans(messages, tokenizer)
    else:
        text, spans = _sentinel_spans(messages, tokenizer, num_context)
    return _tokenise(text, spans, tokenizer)


def _checked(message: Message, number: int) -> Message:
    """The message without the keys that are None (parquet gives every message all keys), or a ValueError."""
    if type(message) is not dict:
        raise ValueError(f"message {number} must be an object with role and content, got {shown(message)}")
    present = {key: value for key, value in message.items() if value is not None}
    keys = ", ".join(message) or "none"
    if "role" not in present:
        raise ValueError(f"message {number} has no 'role' (its keys: {keys}); rename the key that says who speaks")
    if present["role"] not in ROLES:
        raise ValueError(f"message {number} has the unknown role {present['role']!r}; use one of {', '.join(ROLES)}")
    if "content" not in present and "tool_calls" in present:
        present["content"] = ""
    if "content" not in present:
        raise ValueError(f"message {number} has no 'content' (its keys: {keys}); rename the key that holds the text")
    if isinstance(present["content"], str):
        return present
    raise ValueError(f"message {number}: content must be a string, got {shown(present['content'])}")


def _render(messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", generation_prompt: bool = False) -> str:
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation_prompt)
    except (TemplateError, TypeError) as error:
        raise ValueError(f"the chat template refuses these messages ({error}); change the row's messages") from error
    return str(text)


def _marked_spans(messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase") -> tuple[str, list[Span]]:
    """Text and assistant spans of a template with ``{% generation %}`` marks.

    The tokenizer's own mask is not used: where a marked text ends in a space and the tokenizer trims offsets (Llama 3),
    its ``char_to_token`` finds nothing there and every token up to the end of the conversation is marked.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    text = _render(messages, tokenizer)
    options: dict[str, Any] = {**tokenizer.special_tokens_map, "return_assistant_tokens_mask": True}
    rendered: Any = render_jinja_template([list(messages)], chat_template=tokenizer.get_chat_template(), **options)
    spans: list[Span] = []
    for start, end in rendered[1][0]:
        # A block that holds its end-of-turn token is often followed by the special token that opens the next turn.
        closed = text[start:end].rstrip().endswith(tuple(_special_tokens(tokenizer)))
        spans.append((start, end if closed else _with_end_of_turn(text, end, tokenizer)))
    return text, spans


def _sentinel_spans(
    messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", num_context: int
) -> tuple[str, list[Span]]:
    """Text and assistant spans of any template; see the module docstring."""
    text = _render(messages, tokenizer)
    # A private-use character that the text does not hold, so nothing matches it by chance.
    sentinel = next(char for char in map(chr, range(0xE000, 0xF900)) if char not in text)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i < num_context:
            continue
        # Tool calls and reasoning go with the content: they are the assistant's words too.
        replaced = [*messages[:i], {"role": "assistant", "content": sentinel}, *messages[i + 1 :]]
        before, found, after = _render(replaced, tokenizer).partition(sentinel)
        if not found:
            raise ValueError(f"the chat template leaves out the content of message {i + 1}; it could not be learned")
        start = _common_prefix(text, before)
        end = max(start, len(text) - _common_prefix(text[::-1], after[::-1]))
        if i > 0:
            prompt = _render(messages[:i], tokenizer, generation_prompt=True)
            if text.startswith(prompt):
                start = len(prompt)
        spans.append((start, _with_end_of_turn(text, end, tokenizer)))
    return text, spans


def _common_prefix(text: str, other: str) -> int:
    """Length of the longest common prefix; the usual case, all of ``other``, without a loop in Python."""
    if text.startswith(other):
        return len(other)
    return next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))


def _special_tokens(tokenizer: "PreTrainedTokenizerBase") -> set[str]:
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | set(tokenizer.all_special_tokens)


def _with_end_of_turn(text: str, end: int, tokenizer: "PreTrainedTokenizerBase") -> int:
    """``end`` moved past a special token that follows directly, or past white space and the eos token (Llama 2)."""
    followers = [token for token in _special_tokens(tokenizer) if text.startswith(token, end)]
    if followers:
        return end + max(map(len, followers))
    if tokenizer.eos_token and (spaced := re.compile(r"\s+" + re.escape(str(tokenizer.eos_token))).match(text, end)):
        return spaced.end()
    return end


def _tokenise(text: str, spans: Sequence[Span], tokenizer: "PreTrainedTokenizerBase") -> Encoded:
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts, ends = np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
    mask = np.zeros(len(starts), dtype=bool)
    for start, end in spans:
        mask |= (starts < end) & (ends > start)
    return Encoded(np.array(encoding["input_ids"], dtype=np.int32), mask)
