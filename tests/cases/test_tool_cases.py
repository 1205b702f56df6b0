"""Read conversations with tool calls as users bring them: learned whole, or refused in a line."""

import pyarrow
import pyarrow.parquet
import pytest

from tests.cases.rows import PLAIN, chat
from tests.jsonl import write_jsonl

# Mistral's rule that a tool's result needs a call before it, and calls with their arguments.
CALLS = """\
{%- set state = namespace(called=false) -%}
{%- for m in messages -%}
{%- if m.role == 'tool' and not state.called -%}\
{{ raise_exception('a tool result without a call') }}{%- endif -%}
{%- set state.called = (m.tool_calls | default([])) | length > 0 \
or (m.role == 'tool' and state.called) -%}
<|im_start|>{{ m.role }}
{{ m.content }}{%- for c in m.tool_calls | default([]) -%}\
<call>{{ c.function.name }} {{ c.function.arguments | tojson
}}</call>{%- endfor -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""
CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Paris"}},
}


def test_empty_tool_calls_list(load):
    template = """\
{%- for m in messages -%}<|im_start|>{{ m.role }}
{%- if m.tool_calls is defined %}
{% for c in m.tool_calls -%}<call>{{ c.function.name }}</call>{%- endfor -%}{%- else %}
{{ m.content }}{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""
    # Templates ask whether tool_calls is defined, and then print calls in place of the content;
    # OpenAI's exports write the empty values in every message.
    for empty in (
        {"tool_calls": []},
        {"tool_calls": None},
        {"function_call": {}},
        {"reasoning_content": ""},
    ):
        rows = [chat(("user", "Q"), ("assistant", "The whole answer.", empty))]
        assert load(rows, template)[0] == [["The whole answer.<|im_end|>"]]


def tool_row(name, arguments, answer):
    """A question, a call, its result and the answer."""
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return chat(
        ("user", name),
        ("assistant", "", {"tool_calls": [call]}),
        ("tool", answer),
        ("assistant", answer),
    )


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_null_padded_tool_arguments(load, tmp_path, kind):
    rows = [
        tool_row("weather", {"city": "Paris", "when": {"day": "Monday"}}, "sunny"),
        tool_row("calc", {"expr": "1+1", "when": {"hour": 3}}, "2"),
    ]
    table = pyarrow.Table.from_pylist(rows)
    # Arrow has one type for all arguments of a column: every call gets the other one's keys, null.
    # Many JSONL files were written from such tables.
    first_call = table.to_pylist()[0]["messages"][1]["tool_calls"][0]
    assert first_call["function"]["arguments"]["expr"] is None
    if kind == "parquet":
        pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    else:
        write_jsonl(tmp_path / "rows.jsonl", table.to_pylist())
    assert load(None, CALLS, name=f"rows.{kind}")[0] == [
        [
            '<call>weather {"city": "Paris", "when": {"day": "Monday"}}</call><|im_end|>',
            "sunny<|im_end|>",
        ],
        # Arrow keeps the order in which keys were seen first.
        ['<call>calc {"when": {"hour": 3}, "expr": "1+1"}</call><|im_end|>', "2<|im_end|>"],
    ]


def test_tool_calls_left_out(load):
    message = (
        r"row 1: the chat template leaves out the tool_calls of message 2 \('weather'\).\n  Use a"
        r" chat template"
    )
    # OpenAI's form before tools, with arguments as text.
    old = {"function_call": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    # A template that prints the call only where there is no content.
    one_of_both = PLAIN.replace(
        "{{ m.content }}", "{{ m.content or m.tool_calls[0].function.name }}"
    )
    for said in ({"tool_calls": [CALL]}, old):
        for content in ("", None, "I look it up."):
            with pytest.raises(ValueError, match=message):
                load([chat(("user", "Weather in Paris?"), ("assistant", content, said))])
        with pytest.raises(ValueError, match=message):
            load([chat(("user", "Weather?"), ("assistant", "I look it up.", said))], one_of_both)
    # A template's own marks of what is learned do not excuse it.
    marked = PLAIN.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")
    row = chat(("user", "Weather in Paris?"), ("assistant", "", {"tool_calls": [CALL]}))
    with pytest.raises(ValueError, match=message):
        load([row], marked)


def test_tool_conversations(load):
    rows = [
        chat(
            ("user", "Weather in Paris?"),
            ("assistant", "", {"tool_calls": [CALL]}),
            # The name repeats that of the call, so that leaving it out loses nothing.
            ("tool", "sunny", {"tool_call_id": "abcdefghi", "name": "weather"}),
            ("assistant", "It is sunny."),
        )
    ]
    assert load(rows, CALLS)[0] == [
        ['<call>weather {"city": "Paris"}</call><|im_end|>', "It is sunny.<|im_end|>"],
    ]
