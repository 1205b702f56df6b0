"""Hold one row's conversation: messages and all that a chat template gets beside them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megalora.data.messages import Message, cleaned, without_nulls


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages, and the other arguments of a chat template."""

    messages: list[Message]
    num_context: int = 0
    """The first so many messages are never in the loss."""
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the template: the column ``chat_template_kwargs``."""
    learned: tuple[bool, ...] = ()
    """Whether each message is learned: an assistant's, behind the context, not flagged out. Set by
    ``prepare``."""

    def first(self, num_messages: int) -> "Conversation":
        """The same with only so many messages."""
        return replace(self, messages=self.messages[:num_messages])

    @property
    def assistants(self) -> list[int]:
        """Indices of the assistant's messages."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]


def prepare(
    conversation: Conversation, joiner: Callable[[], str], *, needs_answer: bool = True
) -> Conversation:
    """Clean the messages and decide which may be learned.

    Args:
        conversation: as read from a row.
        joiner: returns what stands between two text parts of one content.
        needs_answer: whether there must be something to learn.
    Raises:
        ValueError: a malformed message, or no assistant message behind the context.
    """
    messages: list[Message] = []
    learned: list[bool] = []
    for number, message in enumerate(conversation.messages, 1):
        message, flag = cleaned(message, number, joiner)
        messages.append(message)
        behind_context = number > conversation.num_context
        learned.append(message["role"] == "assistant" and behind_context and flag is not False)
    # Flags may still leave nothing to learn, which is counted (``num_no_target``), not refused.
    roles = [message["role"] for message in messages[conversation.num_context :]]
    if needs_answer and "assistant" not in roles:
        raise ValueError(
            f"there is no assistant message to learn (roles: {', '.join(roles) or 'none'}); add one"
            " or remove the row"
        )
    return replace(conversation, messages=messages, learned=tuple(learned))


def objects(value: Any, column: str) -> list[dict[str, Any]] | None:
    """A list of objects without nulls; None for an empty one.

    Raises:
        ValueError: it is something else; the message names the column.
    """
    if value in (None, [], {}, ""):
        return None
    if not isinstance(value, Sequence) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"column {column!r} must hold a list of objects, got {repr(value)[:60]}")
    # Arrow gives every object the keys of all rows.
    return [without_nulls(item) for item in value] or None
