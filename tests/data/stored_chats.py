"""Make chats for token stores, and the samples that plain tokenisation gives of them."""

import numpy as np

from megalora.data.chat import encode_conversation
from megalora.data.columns import resolve_columns, to_conversation
from megalora.data.template import ChatTemplate


def chats(count):
    """Conversations of different lengths; every third has reasoning, every fourth two answers."""
    rows = []
    for k in range(count):
        answer = {"role": "assistant", "content": f"The answer is {k}" + ", I think" * (k % 5)}
        if k % 3 == 0:
            answer["reasoning_content"] = "sum of two"
        messages = [{"role": "user", "content": f"What is {k}?"}, answer]
        if k % 4 == 0:
            messages += [{"role": "user", "content": "é?"}, {"role": "assistant", "content": "é"}]
        rows.append({"messages": messages, "id": k})
    return rows


def plain(rows, tokenizer, allow_left_out):
    """The samples without a store: row by row, in this process."""
    columns = resolve_columns("auto", rows[0].keys())
    template = ChatTemplate(tokenizer)
    samples = []
    for row in rows:
        conversation = to_conversation(row, columns, allow_left_out)
        samples.append(encode_conversation(conversation, template, allow_left_out))
    return samples


def same(stored, expected):
    """Whether two sequences of samples are the same in every bit and every flag."""
    assert len(stored) == len(expected)
    for one, other in zip(stored, expected, strict=True):
        assert one.input_ids.dtype == np.int32 and one.loss_mask.dtype == bool
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert one.loss_mask.tolist() == other.loss_mask.tolist()
        assert one.num_target_tokens == other.num_target_tokens
        for name in ("left_out", "stops", "num_open", "num_unmarked"):
            assert getattr(one, name) == getattr(other, name)
    return True
