"""Which column holds the conversation."""

import pytest

from megalora.data.columns import resolve_columns, to_messages

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
GSM8K = {"prompt": "question", "completion": "answer"}


@pytest.mark.parametrize(
    ("format", "columns", "expected"),
    [
        ("auto", ["id", "messages", "prompt", "completion"], {"messages": "messages"}),
        ("auto", ["completion", "prompt"], {"prompt": "prompt", "completion": "completion"}),
        ({"messages": "conversations"}, ["conversations"], {"messages": "conversations"}),
        (GSM8K, ["question", "answer"], GSM8K),
    ],
)
def test_resolve_columns(format, columns, expected):
    assert resolve_columns(format, columns) == expected


@pytest.mark.parametrize(
    ("format", "message"),
    [
        (
            "auto",
            r"data.format=auto looks for .* there are question, answer.\n  Say .*data.format={prompt: COLUMN, comp",
        ),
        ("sharegpt", "data.format='sharegpt' is not known; use auto, data.format={prompt"),
        (
            {"prompt": "question"},
            r"data.format={'prompt': 'question'} maps other keys than it can; use data.format={pr",
        ),
        ({}, r"data.format={} maps other keys"),
        (
            {"prompt": "questions", "completion": "answer"},
            r"data.format: prompt is mapped to 'questions', but .* question, answer; did you mean question\?",
        ),
        ({"messages": "chat"}, "messages is mapped to 'chat', but the columns are question, answer$"),
    ],
)
def test_format_that_does_not_fit(format, message):
    with pytest.raises(ValueError, match=message):
        resolve_columns(format, ["question", "answer"])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"p": "q", "c": "a"}, ([USER, ASSISTANT], 1)),
        ({"p": [USER, ASSISTANT, USER], "c": [ASSISTANT]}, ([USER, ASSISTANT, USER, ASSISTANT], 3)),
        ({"p": [USER], "c": "a", "tools": None}, ([USER, ASSISTANT], 1)),
    ],
)
def test_prompt_and_completion(row, expected):
    assert to_messages(row, {"completion": "c", "prompt": "p"}) == expected


def test_messages():
    assert to_messages({"m": [USER, ASSISTANT], "prompt": "ignored"}, {"messages": "m"}) == ([USER, ASSISTANT], 0)


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
        ({"m": [USER], "tools": [{"name": "f"}]}, {"messages": "m"}, "column 'tools' is not supported: .*remove it"),
    ],
)
def test_rows_that_do_not_fit(row, columns, message):
    with pytest.raises(ValueError, match=message):
        to_messages(row, columns)
