"""Tokenise what is said between two answers of the model, and nothing else.

What the model sampled is never tokenised again: its text may become other tokens, whose
log-probabilities nobody knows.
"""

import re

from megalora.data.conversation import Conversation
from megalora.data.messages import Message
from megalora.data.template import ChatTemplate

_STANDS_FOR_ANSWER = "\ue0f5"
"""A character for private use, in place of the answer before the new messages."""


class NewText:
    """Writes messages as the chat template has them behind an answer."""

    def __init__(self, template: ChatTemplate, like: Conversation | None = None) -> None:
        """
        Args:
            like: the conversation of the prompt, whose tools and template options hold for all that
                follows it.
        """
        self.template = template
        self.like = like or Conversation(messages=[])

    def tokens(self, messages: list[Message], end: int) -> list[int]:
        """All tokens between an answer and the next one: what closes the answer's turn, the new
        messages, and what opens the next turn.

        Args:
            messages: cleaned ones; see ``data.messages``.
            end: the token that ended the answer, which is not repeated.
        Raises:
            ValueError: the template refuses the messages.
        """
        tokenizer = self.template.tokenizer
        text = self._behind_answer(messages)
        end_text = str(tokenizer.convert_ids_to_tokens(end))
        if end_text not in self.template.specials:
            # Ordinary text that an engine stops at: the template's own end follows it.
            return tokenizer(text, add_special_tokens=False)["input_ids"]
        # The answer's end has been sampled; spaces that the template prints before it have not, and
        # it is too late for them.
        own = re.match(rf"\s*{re.escape(end_text)}", text)
        if own is not None:
            text = text[own.end() :]
        # Behind the special token, as in a whole conversation: some tokenizers begin a text
        # otherwise than they go on after a special token.
        ids = tokenizer(end_text + text, add_special_tokens=False)["input_ids"]
        assert ids[0] == end, "a special token is a token of its own"
        return ids[1:]

    def _behind_answer(self, messages: list[Message]) -> str:
        """The template's text behind an answer that these messages follow.

        A question and an answer that stand for all before do: templates write a turn without a look
        at earlier ones, but for their roles, and so a turn costs the same however long the
        conversation is.
        """
        before: list[Message] = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": _STANDS_FOR_ANSWER},
        ]
        conversation = Conversation(
            messages=[*before, *messages],
            tools=self.like.tools,
            documents=self.like.documents,
            options=self.like.options,
        )
        text = self.template.render(conversation, generation_prompt=True)
        # What the template writes before the answer is in the prompt already.
        _, found, behind = text.partition(_STANDS_FOR_ANSWER)
        if not found:
            raise ValueError("the chat template leaves out the assistant's answer")
        return behind
