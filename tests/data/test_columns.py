"""Check which columns of a row become the conversation, and which are refused by name."""

import json

import pytest

from megalora.data.columns import resolve_columns, to_conversation, used_columns

SYSTEM = {"role": "system", "content": "s"}
USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}
# The columns of GSM8K, which ``auto`` does not know, so that a user has to map them.
GSM8K = {"prompt": "question", "completion": "answer"}


@pytest.mark.parametrize(
    ("format", "columns", "expected"),
    [
        # TRL's data sets often keep the prompt that the messages were made of: messages win.
        ("auto", ["id", "messages", "prompt", "completion"], {"messages": "messages"}),
        ("auto", ["completion", "prompt"], {"prompt": "prompt", "completion": "completion"}),
        ({"messages": "conversations"}, ["conversations"], {"messages": "conversations"}),
        (GSM8K, ["question", "answer"], GSM8K),
        # ShareGPT's and Alpaca's names are found without a mapping.
        ("auto", ["conversations", "id"], {"messages": "conversations"}),
        ("auto", ["instruction", "output"], {"prompt": "instruction", "completion": "output"}),
        (
            {**GSM8K, "input": "context"},
            ["question", "answer", "context"],
            {**GSM8K, "input": "context"},
        ),
    ],
)
def test_resolve_columns(format, columns, expected):
    assert resolve_columns(format, columns) == expected


@pytest.mark.parametrize(
    ("format", "message"),
    [
        (
            "auto",
            (
                r"data.format=auto looks for .* there are question, answer.\n  Say"
                r" .*data.format={prompt: COLUMN, comp"
            ),
        ),
        # A name of a format, as other trainers take: ShareGPT's files are recognised by ``auto``.
        ("sharegpt", "data.format='sharegpt' is not known; use auto, data.format={prompt"),
        (
            {"prompt": "question"},
            r"data.format={'prompt': 'question'} maps other keys than it can; use data.format={pr",
        ),
        ({}, r"data.format={} maps other keys"),
        (
            {"prompt": "questions", "completion": "answer"},
            (
                r"data.format: prompt is mapped to 'questions', but .* question, answer; did you"
                r" mean question\?"
            ),
        ),
        (
            {"messages": "chat"},
            "messages is mapped to 'chat', but the columns are question, answer$",
        ),
    ],
)
def test_format_that_does_not_fit(format, message):
    with pytest.raises(ValueError, match=message):
        resolve_columns(format, ["question", "answer"])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # The number is that of the messages in the context.
        ({"p": "q", "c": "a"}, ([USER, ASSISTANT], 1)),
        # Messages of the prompt are context: the loss begins behind them.
        ({"p": [USER, ASSISTANT, USER], "c": [ASSISTANT]}, ([USER, ASSISTANT, USER, ASSISTANT], 3)),
        ({"p": [USER], "c": "a", "tools": None}, ([USER, ASSISTANT], 1)),
        # A system message in front of the prompt is context, too: 1 + 1.
        ({"p": "q", "c": "a", "system": "s"}, ([SYSTEM, USER, ASSISTANT], 2)),
    ],
)
def test_prompt_and_completion(row, expected):
    conversation = to_conversation(row, {"completion": "c", "prompt": "p"})
    assert (conversation.messages, conversation.num_context) == expected
    assert (conversation.tools, conversation.documents, conversation.options) == (None, None, {})


def test_messages():
    conversation = to_conversation({"m": [USER, ASSISTANT], "prompt": "unused"}, {"messages": "m"})
    assert (conversation.messages, conversation.num_context) == ([USER, ASSISTANT], 0)


def messages_of(row, **columns):
    return to_conversation(row, columns).messages


def test_alpaca():
    columns = resolve_columns("auto", ["instruction", "input", "output", "text"])
    # Alpaca joins instruction and input; text repeats both and is passed over.
    row = {"instruction": "Add.", "input": "17 25", "output": "42", "system": "Be brief."}
    assert to_conversation(row, columns).messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Add.\n17 25"},
        {"role": "assistant", "content": "42"},
    ]
    # Most of Alpaca's rows have no input; they must not end in an empty line.
    assert messages_of({**row, "input": ""}, **columns)[1]["content"] == "Add."
    assert messages_of({**row, "input": None}, **columns)[1]["content"] == "Add."
    assert used_columns(columns) >= {"instruction", "input", "output", "system"}


def test_sharegpt():
    # ShareGPT writes a call as JSON in the text; weight 0 says that a turn is not to be learned.
    call = '{"name": "sum", "arguments": {"of": [17, 25]}}'
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "17 + 25?", "weight": 0},
        {"from": "function_call", "value": call},
        {"from": "observation", "value": "42"},
        {"from": "gpt", "value": "It is 42."},
    ]
    columns = resolve_columns("auto", ["id", "conversations"])
    assert messages_of({"conversations": turns}, **columns) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "17 + 25?", "weight": 0},
        {
            "role": "assistant",
            "tool_calls": [
                {"type": "function", "function": {"name": "sum", "arguments": {"of": [17, 25]}}}
            ],
        },
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "It is 42."},
    ]
    # An unknown speaker would otherwise be given some role, and be learned or not by chance.
    for turn, message in {
        "someone": r"message 1 is from 'someone'; known speakers are human, user",
        "function_call": (
            r"message 1: a function_call must hold JSON with name and arguments, got str 'x'"
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            messages_of({"conversations": [{"from": turn, "value": "x"}]}, **columns)


TOOL = {"type": "function", "function": {"name": "f", "description": "d"}}


@pytest.mark.parametrize(
    ("columns", "tools"),
    [
        ({"tools": [TOOL]}, [TOOL]),
        # Parquet files often hold tools as text.
        ({"tools": json.dumps([TOOL])}, [TOOL]),
        # Arrow pads a tool with the keys that tools of other rows have.
        ({"tools": [{**TOOL, "strict": None}]}, [TOOL]),
        # OpenAI's older form.
        ({"functions": [TOOL["function"]]}, [TOOL]),
        # Llama 3.1's template prints a header for tools unless they are none: an empty list is.
        ({"tools": []}, None),
        ({"tools": "[]"}, None),
        ({"tools": ""}, None),
    ],
)
def test_tools(columns, tools):
    row = {"messages": [USER, ASSISTANT], **columns}
    assert to_conversation(row, {"messages": "messages"}).tools == tools


def test_options_and_documents():
    row = {
        "messages": [USER, ASSISTANT],
        "chat_template_kwargs": {"enable_thinking": False, "budget": None},
        "documents": [{"title": "t", "text": "x"}],
    }
    conversation = to_conversation(row, {"messages": "messages"})
    # Arrow pads budget, which this row does not set; the template would find it defined.
    assert conversation.options == {"enable_thinking": False}
    assert conversation.documents == row["documents"]


def test_columns_of_the_conversation_are_used_or_refused():
    # As in data sets for reading comprehension: without its context, nobody can answer.
    row = {"question": "q", "answer": "a", "context": "It rains."}
    mapping = {"prompt": "question", "completion": "answer"}
    message = (
        r"column 'context' belongs to the conversation and would be left out \(str 'It rains.'\).\n"
        r"  Map it"
    )
    with pytest.raises(ValueError, match=message):
        to_conversation(row, mapping)
    # The two ways out that the message names: leave it out on purpose, or map it.
    assert to_conversation(row, mapping, ["context"]).messages == [USER, ASSISTANT]
    assert messages_of(row, **mapping, input="context")[0]["content"] == "q\nIt rains."
    for empty in (None, "", [], {}):
        assert messages_of({**row, "context": empty}, **mapping) == [USER, ASSISTANT]
    # What a message says already is not lost: data sets keep what messages were made of.
    said = {"messages": [USER, ASSISTANT], "instruction": "q", "input": ""}
    assert messages_of(said, messages="messages") == [USER, ASSISTANT]


def test_a_system_prompt_in_two_places():
    row = {"messages": [SYSTEM, USER, ASSISTANT], "system": "s"}
    # The same twice is no contradiction.
    assert messages_of(row, messages="messages") == [SYSTEM, USER, ASSISTANT]
    with pytest.raises(
        ValueError, match="column 'system' and the first message hold different system prompts"
    ):
        messages_of({**row, "system": "other"}, messages="messages")


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"m": "q"}, {"messages": "m"}, "column 'm' must hold a list of messages, got str 'q'"),
        ({}, {"messages": "m"}, "column 'm' must hold a list of messages, got NoneType None"),
        (
            {"p": "q", "c": 3},
            {"prompt": "p", "completion": "c"},
            "'c' must hold a string or a list of messages, got int 3",
        ),
        (
            {"m": [USER], "tools": "{"},
            {"messages": "m"},
            "column 'tools' holds text that is not JSON",
        ),
        (
            {"m": [USER], "tools": ["f"]},
            {"messages": "m"},
            "column 'tools' must hold a list of objects, got",
        ),
        (
            {"m": [USER], "chat_template_kwargs": [1]},
            {"messages": "m"},
            "'chat_template_kwargs' must hold an object",
        ),
        (
            {"m": [USER], "system": 3},
            {"messages": "m"},
            "column 'system' must hold a string, got int 3",
        ),
        (
            {"m": [USER], "history": [["q", "a"]]},
            {"messages": "m"},
            "column 'history' belongs to the conversation",
        ),
    ],
)
def test_rows_that_do_not_fit(row, columns, message):
    with pytest.raises(ValueError, match=message):
        to_conversation(row, columns)


def test_a_completion_that_repeats_the_prompt_is_refused():
    columns = {"prompt": "prompt", "completion": "chosen"}
    for prompt in ("q", [USER]):
        with pytest.raises(
            ValueError, match=r"'chosen' begins with the messages of 'prompt'.*{messages: chosen}"
        ):
            to_conversation({"prompt": prompt, "chosen": [USER, ASSISTANT]}, columns)
    # An answer that merely looks like the prompt is an answer.
    for chosen in ("q", [ASSISTANT], [{**USER, "content": "r"}, ASSISTANT]):
        to_conversation({"prompt": "q", "chosen": chosen}, columns)
