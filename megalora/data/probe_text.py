"""The text on which training side and servers are compared. It is ours, the same for all runs: an adapter gives away no training data."""

from typing import Any

from transformers import PreTrainedTokenizerBase

_QUESTION, _ANSWER = (
    "What is 17 + 25? Think step by step.",
    "First add the ones: 7 + 5 = 12. Then the tens: 10 + 20 = 30. The sum is 42.",
)
MAX_TOKENS = 64


def probe_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The text as a conversation in the model's own template, or plain where it has none; at most 64 tokens."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
        text: Any = tokenizer.apply_chat_template(messages, tokenize=False)
    else:
        text = f"{_QUESTION} {_ANSWER}"
    return tokenizer(text, add_special_tokens=False)["input_ids"][:MAX_TOKENS]  # type: ignore
