"""Check what is learned, or refused, under each behaviour of chat templates."""

import re

import pytest

from megalora.data.chat import encode_conversation
from megalora.data.conversation import Conversation
from megalora.data.template import ChatTemplate
from tests.data.chat_tokenizer import learned, make_tokenizer
from tests.data.template_cases import CASES, Case
from tests.data.templates import SPECIALS, TEMPLATES


@pytest.fixture(scope="module")
def tokenizers():
    """One tokenizer for each set of special tokens."""
    made = {}
    for specials in {(), *SPECIALS.values()}:
        # "seed: bos opens a turn" is the one template with a single special token of its own.
        bos_token = specials[0] if len(specials) == 1 else None
        made[specials] = make_tokenizer("chatml", specials=specials, bos_token=bos_token)
    return made


def outcome(case: Case, tokenizers, allow=()):
    """The tokenised conversation of a case, and the texts in its loss."""
    tokenizer = tokenizers[SPECIALS.get(case.template, ())]
    tokenizer.chat_template = TEMPLATES[case.template]
    conversation = Conversation(messages=case.messages, **case.more)
    sample = encode_conversation(conversation, ChatTemplate(tokenizer), allow)
    return sample, learned(sample, tokenizer)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.template)
def test_what_is_learned(case, tokenizers):
    if case.refused is None:
        sample, text = outcome(case, tokenizers)
        assert text == case.learned
        assert (sample.stops, sample.left_out) == (case.stops, ())
    else:
        with pytest.raises(ValueError, match=case.refused):
            outcome(case, tokenizers)


REASONING = [case for case in CASES if case.refused and "out the reasoning" in case.refused]


@pytest.mark.parametrize("case", REASONING, ids=lambda case: case.template)
def test_reasoning_may_be_left_out_where_that_is_said(case, tokenizers):
    sample, text = outcome(case, tokenizers, allow=["reasoning"])
    # The run reports how many samples lost it.
    assert sample.left_out == ("reasoning",)
    # All reasoning in the cases begins with R; it is neither printed nor learned, the answer is.
    assert text and not re.search(r"\bR", "".join(text))


def test_there_are_templates_enough():
    # A template without a case would be dead text. The bound, well below their number, guards
    # against a table that loses many of them by mistake.
    assert {case.template for case in CASES} == set(TEMPLATES)
    assert len(TEMPLATES) >= 40
