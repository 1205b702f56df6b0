"""Tokenise the fixed text on which training and servers are compared.

The text is ours and the same for all runs, so that an adapter gives away no training data.
"""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from transformers import PreTrainedTokenizerBase

from megalora.data.conversation import Conversation
from megalora.data.template import ChatTemplate, RefusedByTemplate
from megalora.data.template_budget import TemplateExceeds

_QUESTION = "What is 17 + 25? Think step by step."
_ANSWER = "First add the ones: 7 + 5 = 12. Then the tens: 10 + 20 = 30. The sum is 42."
_SYSTEM = "You are a helpful assistant."
MAX_TOKENS = 64


def probe_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The text as a conversation in the model's own template, at most 64 tokens.

    A template that refuses the conversation, or prints neither question nor answer, gets another
    form of it: with a system message, with the content as text parts, as the prompt alone. Where it
    takes none of them, or where there is no template, the text stands plain.
    """
    for text in _forms(tokenizer):
        if _QUESTION in text or _ANSWER in text:
            # The template has printed the special tokens.
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            return ids[:MAX_TOKENS]  # type: ignore[return-value]
    # The last form is the plain text, which holds both.
    raise AssertionError("the plain text holds the question")


def _forms(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The text in one form after the other, without those that the template refuses."""
    user = {"role": "user", "content": _QUESTION}
    assistant = {"role": "assistant", "content": _ANSWER}
    chat: list[dict[str, Any]] = [user, assistant]
    with_system = [{"role": "system", "content": _SYSTEM}, *chat]
    # Multimodal templates read contents as lists of parts.
    in_parts = [
        {"role": "user", "content": [{"type": "text", "text": _QUESTION}]},
        {"role": "assistant", "content": [{"type": "text", "text": _ANSWER}]},
    ]
    if tokenizer.chat_template:
        template = ChatTemplate(tokenizer)
        for messages in (chat, with_system, in_parts, [user]):
            # Within a template's budget: this is the first that some commands render.
            with suppress(RefusedByTemplate, TemplateExceeds):
                yield template.render(Conversation(messages=messages))
    yield f"{_QUESTION} {_ANSWER}"
