"""Check that the loss mask, decoded, is what the assistant says, in each kind of chat template."""

import time

import numpy as np
import pytest

from megalora.data.chat import Encoded, encode, encode_conversation
from megalora.data.conversation import Conversation
from megalora.data.template import ChatTemplate
from megalora.data.turns import _common_prefix
from tests.data.chat_tokenizer import learned

# Two answers, so that one has a turn behind it and the other ends the text; blank lines, a dash,
# Chinese and white space at the end, because tokens of several bytes have to be cut from the text
# at the right place.
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 17 + 25?"},
    {"role": "assistant", "content": "17 + 25 = 42"},
    {"role": "user", "content": "And the sum of\n\n42 and 1?"},
    {"role": "assistant", "content": "It is 43 — \n\n  indeed: 四十三 "},
]
LAST = TURNS[-1]["content"]


def assistant(content, **keys):
    return [
        {"role": "user", "content": "Good morning"},
        {"role": "assistant", "content": content, **keys},
    ]


# What is learned of TURNS: each answer with its end of turn. The line break behind that belongs to
# the next turn, unless a template's own mark holds it.
EXPECTED = {
    "chatml": ["17 + 25 = 42<|im_end|>", f"{LAST}<|im_end|>"],
    # Qwen3 opens the last answer with an empty think block, which the served model must produce.
    "qwen3": ["17 + 25 = 42<|im_end|>", f"<think>\n\n</think>\n\n{LAST}<|im_end|>"],
    "marked_open": ["17 + 25 = 42<|im_end|>", f"{LAST}<|im_end|>"],
    "marked_closed": ["17 + 25 = 42<|im_end|>\n", f"{LAST}<|im_end|>\n"],
}


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("template", EXPECTED)
def test_loss_is_on_the_assistant_alone(make_tokenizer, template, trim_offsets):
    tokenizer = make_tokenizer(template, trim_offsets)
    encoded = encode(TURNS, tokenizer)
    assert learned(encoded, tokenizer) == EXPECTED[template]
    # The ids are those of the whole text at once, as vLLM tokenises it: turns that are tokenised
    # apart could be cut otherwise at their borders.
    text = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert encoded.input_ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    # No conversation here begins with the assistant, so every learned token has one before it.
    assert encoded.num_target_tokens == encoded.loss_mask.sum() > 0
    assert (encoded.input_ids.dtype, encoded.loss_mask.dtype) == (np.int32, np.bool_)


def test_llama2_template_without_header(make_tokenizer):
    tokenizer = make_tokenizer("llama2")
    # Without the system message, which this template refuses. The spaces around an answer are
    # printed by the template and are the model's to produce.
    expected = [" 17 + 25 = 42 <|im_end|>", f" {LAST.strip()} <|im_end|>"]
    assert learned(encode(TURNS[1:], tokenizer), tokenizer) == expected


def test_the_first_turn_is_learned_from_its_content_on(make_tokenizer):
    # Nothing stands before the first message, so no generation prompt can be rendered there: the
    # header of the turn is found by changing the message, and must not be learned.
    tokenizer = make_tokenizer("chatml")
    messages = [
        {"role": "assistant", "content": "Good morning to you."},
        {"role": "user", "content": "you"},
    ]
    assert learned(encode(messages, tokenizer), tokenizer) == ["Good morning to you.<|im_end|>"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("<think>\nforty two\n</think>\n\n42", "<think>\nforty two\n</think>\n\n42<|im_end|>"),
        ("", "<think>\n\n</think>\n\n<|im_end|>"),
        # The same text as the user's: looking for the answer in the text would find the question.
        ("Good morning", "<think>\n\n</think>\n\nGood morning<|im_end|>"),
    ],
)
def test_qwen3_contents(make_tokenizer, content, expected):
    tokenizer = make_tokenizer("qwen3")
    assert learned(encode(assistant(content), tokenizer), tokenizer) == [expected]


def test_texts_that_hold_the_sentinel(make_tokenizer):
    # Marks are private-use characters from U+E000 on; data that holds some gets another alphabet.
    tokenizer = make_tokenizer("chatml")
    messages = [
        {"role": "user", "content": "a \ue000 b"},
        {"role": "assistant", "content": "\ue001 \ue000"},
    ]
    assert learned(encode(messages, tokenizer), tokenizer) == ["\ue001 \ue000<|im_end|>"]


def test_an_empty_content_whose_line_the_template_leaves_out(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    # Turns end with <|im_end|> all the same: the end of the answer has to be found without knowing
    # the end-of-sequence token.
    tokenizer.eos_token = "<|endoftext|>"
    body = (
        "{{ m.role + '\n' + m.content }}{% if m.content %}{{ '\n' }}{% endif %}{{ '<|im_end|>' }}"
    )
    tokenizer.chat_template = "{% for m in messages %}" + body + "{% endfor %}"
    messages = [{"role": "assistant", "content": ""}, *assistant("42")]
    assert learned(encode(messages, tokenizer), tokenizer)[0] == "<|im_end|>"


def test_the_first_token_is_no_target():
    # Two of the three tokens are in the mask; nothing predicts the first one.
    assert Encoded(np.array([5, 6, 7]), np.array([True, False, True])).num_target_tokens == 1


# OpenAI's API writes null as the content of a message that only calls tools.
@pytest.mark.parametrize("content", ["", None, "I look it up."])
def test_tool_calls_are_learned(make_tokenizer, content):
    tokenizer = make_tokenizer("chatml")
    messages = [
        # A call, its result and the answer: both of the assistant's are learned, the result is not.
        *assistant(content, tool_calls=[{"name": "sum"}]),
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "42"},
    ]
    call = f"{content or ''}\n<tool_call>\nsum\n</tool_call><|im_end|>"
    assert learned(encode(messages, tokenizer), tokenizer) == [call, "42<|im_end|>"]


@pytest.mark.parametrize("template", ["qwen3", "marked_open"])
def test_context_is_not_learned(make_tokenizer, template):
    tokenizer = make_tokenizer(template)
    # The first answer stands in the context of four messages.
    encoded = encode(TURNS, tokenizer, num_context=4)
    assert learned(encoded, tokenizer) == EXPECTED[template][1:]
    # Context changes the mask alone.
    assert encoded.input_ids.tolist() == encode(TURNS, tokenizer).input_ids.tolist()


def test_keys_that_are_none_count_as_absent(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    # Arrow gives every message the keys of all others, with None for what it does not have.
    padded = [{**turn, "name": None, "tool_calls": None} for turn in TURNS]
    assert (
        encode(padded, tokenizer).input_ids.tolist() == encode(TURNS, tokenizer).input_ids.tolist()
    )


# Where an answer ends is found by rendering the conversation up to it, and where the next one
# begins by rendering what stands before it: 3 messages of TURNS end with the first answer, 4 stand
# before the last.
REFUSES_CUTS = "{%- if messages | length in (3, 4) %}{{ raise_exception('cut') }}{%- endif %}"


@pytest.mark.parametrize(
    ("end", "first", "num_open"),
    [("<|im_end|>", "17 + 25 = 42<|im_end|>", 0), ("<|endoftext|>", "17 + 25 = 42", 1)],
)
def test_a_turn_behind_which_the_template_refuses_to_be_cut(make_tokenizer, end, first, num_open):
    """The end of a sequence is learned; another token might open the next turn, and is counted."""
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = REFUSES_CUTS + tokenizer.chat_template.replace("<|im_end|>", end)
    encoded = encode(TURNS, tokenizer)
    assert learned(encoded, tokenizer) == [first, f"{LAST}{end}"]
    assert (encoded.stops, encoded.num_open) == (True, num_open)


@pytest.mark.parametrize(
    ("marked", "num_unmarked", "expected"),
    [
        ("message.role == 'assistant'", 0, EXPECTED["marked_open"]),
        ("message.role == 'assistant' and loop.last", 1, EXPECTED["marked_open"][1:]),
    ],
)
def test_answers_that_the_template_does_not_mark(make_tokenizer, marked, num_unmarked, expected):
    tokenizer = make_tokenizer("marked_open")
    tokenizer.chat_template = tokenizer.chat_template.replace("message.role == 'assistant'", marked)
    encoded = encode(TURNS, tokenizer)
    assert learned(encoded, tokenizer) == expected
    # Marks are {% generation %} blocks; an answer without one is counted, not learned.
    assert encoded.num_unmarked == num_unmarked
    context = encode(TURNS, tokenizer, num_context=4)
    assert (learned(context, tokenizer), context.num_unmarked) == (EXPECTED["marked_open"][1:], 0)


USER = {"role": "user", "content": "you"}


# Messages are numbered from 1, as a reader of the data file counts them.


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            [USER],
            r"there is no assistant message to learn \(roles: user\); add one or remove the row",
        ),
        ([], r"there is no assistant message to learn \(roles: none\)"),
        ([USER, "hello"], "message 2 must be an object with role and content, got str 'hello'"),
        (
            # ShareGPT's keys under the name messages.
            [USER, {"from": "gpt", "value": "x"}],
            r"message 2 has no 'role' \(its keys: from, value\)",
        ),
        (
            [USER, {"role": "bot", "content": "x"}],
            "message 2 has the unknown role 'bot'; use one of system, developer",
        ),
        ([{"role": "assistant"}], r"message 1 has no 'content' \(its keys: role\)"),
        # Null is an answer only beside tool calls.
        (
            [{"role": "assistant", "content": None}],
            r"message 1 \(assistant\) has null as content; write a text",
        ),
        # As data for vision models has it: an image cannot become tokens here.
        (
            [USER, {"role": "assistant", "content": [{"type": "image", "image": "x.png"}]}],
            "message 2: content must be a string or a list of text parts, got a list with dict",
        ),
        (
            [USER, {"role": "assistant", "content": {"text": "x"}}],
            "message 2: content must be a string or a list",
        ),
    ],
)
def test_malformed_conversations(make_tokenizer, messages, message):
    with pytest.raises(ValueError, match=message):
        encode(messages, make_tokenizer("chatml"))


def test_nothing_to_learn_after_the_context(make_tokenizer):
    # The fourth message is a question, so all that is left behind the context is the user's.
    with pytest.raises(ValueError, match=r"no assistant message to learn \(roles: user\)"):
        encode(TURNS[:4], make_tokenizer("chatml"), num_context=3)


def test_the_template_refuses(make_tokenizer):
    # TURNS begins with a system message; the reason shown is the template's own.
    with pytest.raises(
        ValueError,
        match=r"the chat template refuses these messages \(only user and assistant are supp",
    ):
        encode(TURNS, make_tokenizer("llama2"))


def test_the_template_drops_the_content(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="the chat template leaves out the content of message 2"):
        encode(assistant("42"), tokenizer)


def test_no_template(make_tokenizer):
    with pytest.raises(
        ValueError, match=r"the tokenizer 'tiny' has no chat template.\n  Use the instruct model's"
    ):
        encode(TURNS, make_tokenizer(None, name_or_path="tiny"))


def test_slow_tokenizer(make_tokenizer):
    class Slow(type(make_tokenizer())):
        is_fast = False

    tokenizer = make_tokenizer()
    # Only fast tokenizers map tokens to places in the text.
    tokenizer.__class__ = Slow
    with pytest.raises(ValueError, match=r"is a slow one.*\n  Save it with a tokenizer.json"):
        encode(TURNS, tokenizer)


def test_an_option_that_is_empty_need_not_be_read(make_tokenizer):
    template = ChatTemplate(make_tokenizer("chatml"))
    messages = assistant("42")
    # A template that does not read an option would lose what it says; an empty one says nothing.
    for options in ({"custom_instructions": "", "xml_tools": []}, {}):
        encoded = encode_conversation(Conversation(messages=messages, options=options), template)
        assert learned(encoded, template.tokenizer) == ["42<|im_end|>"]


@pytest.mark.parametrize("content", ["", " \n"])
def test_an_empty_answer_in_the_middle_learns_to_stop(make_tokenizer, content):
    """Qwen3 prints an empty answer otherwise while it is the last: with an empty <think> block."""
    tokenizer = make_tokenizer("qwen3")
    messages = [*assistant(content), *assistant("42")]
    expected = [f"{content}<|im_end|>", "<think>\n\n</think>\n\n42<|im_end|>"]
    assert learned(encode(messages, tokenizer), tokenizer) == expected


def test_a_call_without_arguments_has_none(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "call.name +", "(call.function | tojson) +"
    )
    # Absent, and three ways of saying none: a template that prints the function as JSON must not
    # teach four spellings of the same call.
    for arguments in ({}, {"arguments": None}, {"arguments": ""}, {"arguments": {}}):
        call = {"type": "function", "function": {"name": "sum", **arguments}}
        encoded = encode(assistant("", tool_calls=[call]), tokenizer)
        text = '\n<tool_call>\n{"name": "sum", "arguments": {}}\n</tool_call><|im_end|>'
        assert learned(encoded, tokenizer) == [text]


@pytest.mark.parametrize(
    ("text", "place", "other", "length"),
    [
        # (a text and a place in it, another text, how far they agree)
        ("abcd", 0, "abxd", 2),
        ("abcd", 2, "cd", 2),
        ("abcd", 2, "cde", 2),
        ("abcd", 4, "a", 0),
        ("ab", 0, "", 0),
        ("b", 0, "a", 0),
    ],
)
def test_common_prefix(text, place, other, length):
    assert _common_prefix(text, place, other) == length


def test_a_long_run_of_backslashes_takes_no_quadratic_time(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    escapes = " \\u0041 \\ue000"
    content = "\\" * 30_000 + escapes
    assert learned(encode(assistant(content), tokenizer), tokenizer) == [f"{content}<|im_end|>"]
    # About as long as for other letters; 300 times as long where each backslash is looked at anew.
    # A bound of 30 lies between the two on any machine, because both are CPU times of this process.
    backslashes_s = cpu_seconds(lambda: encode(assistant(content), tokenizer))
    letters_s = cpu_seconds(lambda: encode(assistant("a" * 30_000 + escapes), tokenizer))
    assert backslashes_s < 30 * letters_s


def cpu_seconds(call):
    start = time.process_time()
    call()
    return time.process_time() - start
