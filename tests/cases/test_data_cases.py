"""Read data files as users bring them: what is learned of each, or the line that refuses it."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from megalora.cli import main as cli
from megalora.data.probe_text import probe_tokens
from megalora.data.splits import load_split
from tests.data.chat_tokenizer import learned, make_tokenizer
from tests.jsonl import write_jsonl

# ChatML without tools: what it does not name, it leaves out.
PLAIN = """\
{%- for m in messages -%}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""
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


def chat(*turns):
    """A row of (role, content) or (role, content, further fields) for each message."""
    messages = []
    for role, content, *more in turns:
        messages.append({"role": role, "content": content, **dict(*more)})
    return {"messages": messages}


@pytest.fixture
def load(tmp_path):
    """Loads rows under a template: (what is learned of each row, summary)."""

    def run(rows, template=PLAIN, format="auto", name="rows.jsonl", **how):
        tokenizer = make_tokenizer("chatml")
        tokenizer.chat_template = template
        path = tmp_path / name
        if rows is not None:
            write_jsonl(path, rows)
        split = load_split(str(path), tokenizer, format=format, max_length=4096, **how)
        return [learned(sample, tokenizer) for sample in split.samples], split

    return run


def text_of(split, tokenizer):
    """The first sample as text: what the model is given, learned or not."""
    return tokenizer.decode(split.samples[0].input_ids.tolist())


def test_columns_left_out(load):
    # Alpaca's columns. The input was once left out: a question that nobody could answer.
    row = {"instruction": "Add the two numbers.", "input": "17 25", "output": "42"}
    learned_text, split = load([row])
    assert learned_text == [["42<|im_end|>"]]
    assert "user\nAdd the two numbers.\n17 25<|im_end|>" in text_of(split, make_tokenizer())
    # A mapping that does not name the input still uses it.
    mapped = {"prompt": "instruction", "completion": "output"}
    by_mapping = load([row], format=mapped)[1]
    assert by_mapping.samples[0].input_ids.tolist() == split.samples[0].input_ids.tolist()
    # A system prompt in a column of its own; an id is no part of a conversation.
    row = {"system": "Answer in French.", "prompt": "Good day?", "completion": "Bonjour.", "id": 7}
    learned_text, split = load([row])
    assert learned_text == [["Bonjour.<|im_end|>"]]
    assert text_of(split, make_tokenizer()).startswith(
        "<|im_start|>system\nAnswer in French.<|im_end|>"
    )
    assert split.summary().endswith("; columns not used: id")
    # Columns that a template would have to print, and this one does not.
    messages = chat(("user", "q"), ("assistant", "a"))
    with pytest.raises(
        ValueError,
        match=r"row 1: chat_template_kwargs holds 'enable_thinking', which the chat templ",
    ):
        load([{**messages, "chat_template_kwargs": {"enable_thinking": False}}])
    for column in ("tools", "functions"):
        with pytest.raises(
            ValueError, match=r"row 1: the chat template leaves out the tools \('get_weather'\)"
        ):
            load([{**messages, column: [{"name": "get_weather", "description": "Say it."}]}])
    with pytest.raises(
        ValueError, match=r"row 1: the chat template leaves out the documents \('Rain"
    ):
        load([{**messages, "documents": [{"title": "Rain", "text": "It rains."}]}])


def test_empty_answer_loss_on_next_turn(load):
    # The template prints nothing for an empty answer, not even its end: the loss must not move on
    # to the next turn, which is the user's.
    rows = [chat(("user", "Q1"), ("assistant", ""), ("user", "Q2"), ("assistant", "A two."))]
    template = PLAIN.replace(
        "{{ m.content }}<|im_end|>\n", "{% if m.content %}{{ m.content }}<|im_end|>\n{% endif %}"
    )
    assert load(rows, template)[0] == [["A two.<|im_end|>"]]


def test_two_answers_in_a_row_without_an_end_of_turn(load):
    rows = [
        chat(
            ("user", "Q"),
            ("assistant", "A one"),
            ("assistant", "A two"),
            ("user", "R"),
            ("assistant", "B"),
        )
    ]
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    # No end of turn: what follows an answer is the next header, which the model must not learn.
    learned_text, split = load(rows, template)
    assert learned_text == [["A one", "A two", "B"]]
    assert (
        "1 have no end-of-turn token in the loss behind the last answer: the model will not learn"
        in split.summary()
    )


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


# The second line of a file. JSON may escape half of a surrogate pair, which cutting a text inside
# an emoji leaves and no tokenizer takes; Python's parser, jinja and tokenizers have limits, too.
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            (
                r'{"messages": [{"role": "user", "content": "hi \ud83d"}, {"role": "assistant",'
                r' "content": "yo"}]}'
            ),
            (
                r"rows.jsonl: row 2: message 1 holds half a character \('\\ud83d', one half of a"
                r" surrogate pair\)"
            ),
        ),
        (
            (
                r'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content":'
                r' "\ude00 yo"}]}'
            ),
            r"rows.jsonl: row 2: message 2 holds half a character \('\\ude00'",
        ),
        ('{"id": ' + "7" * 4400 + "}", r"rows.jsonl:2: holds a number of too many digits \("),
        ("[" * 100_000, r"rows.jsonl:2: lists or objects are nested too deeply to be read"),
        (
            '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content":'
            ' "yo", "x": ' + "[" * 300 + "]" * 300 + "}]}",
            r"rows.jsonl: row 2: message 2: nested deeper than 100 levels",
        ),
        (
            (
                '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant",'
                ' "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1e999}}}]}]}'
            ),
            r"rows.jsonl: row 2: message 2: holds the number inf",
        ),
    ],
)
def test_lone_surrogate_and_what_is_like_it(load, tmp_path, line, message):
    good = json.dumps(chat(("user", "q"), ("assistant", "a")))
    (tmp_path / "rows.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(ValueError, match=message):
        load(None)


# OpenAI's name for the flag that keeps a message out of the loss, and those of other trainers; with
# answers found in the text, and with the template's own marks.
@pytest.mark.parametrize("key", ["weight", "train", "trainable", "loss", "loss_mask"])
@pytest.mark.parametrize("template", ["span", "marked"])
def test_message_flags(load, key, template):
    text = PLAIN
    if template == "marked":
        marked = (
            "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{%"
            " else %}"
        )
        text = PLAIN.replace("{{ m.content }}", marked + "{{ m.content }}{% endif %}")
    no: object = False
    yes: object = True
    # OpenAI writes numbers.
    if key == "weight":
        no = 0
        yes = 1
    # The answer that is not learned first, last, and a flag that says nothing new.
    rows = [
        chat(
            ("user", "Q1"),
            ("assistant", "BAD", {key: no}),
            ("user", "Q2"),
            ("assistant", "GOOD", {key: yes}),
        ),
        chat(
            ("user", "Q1"),
            ("assistant", "GOOD", {key: yes}),
            ("user", "Q2"),
            ("assistant", "BAD", {key: no}),
        ),
        chat(("user", "Q1", {key: no}), ("assistant", "GOOD", {key: None})),
    ]
    assert load(rows, text)[0] == [["GOOD<|im_end|>"]] * 3


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (("assistant", "A", {"weight": 0.5}), "message 2: weight=0.5 is neither 0 nor 1"),
        (
            ("assistant", "A", {"weight": 0, "train": True}),
            "message 2: weight and train contradict each other",
        ),
        (
            ("assistant", "A", {"mask": True}),
            "message 2 has mask=True, which can mean learned or hidden",
        ),
        (
            ("user", "A", {"train": True}),
            r"message 2 \(user\) has train set, but only assistant messages can be",
        ),
    ],
)
def test_flags_that_cannot_be_honoured(load, turn, message):
    with pytest.raises(ValueError, match=message):
        load([chat(("user", "Q"), turn, ("assistant", "B"))])


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


# The probe is a fixed question by which adapters in two engines are compared; it has to exist for
# every template: with a system message where one is demanded, without an answer where two messages
# are too many, as plain text where nothing is accepted.
@pytest.mark.parametrize(
    ("refusal", "form"),
    [
        (
            "{%- if messages[0].role != 'system' -%}{{ raise_exception('no') }}{%- endif -%}",
            "system",
        ),
        ("{%- if messages | length > 1 -%}{{ raise_exception('no') }}{%- endif -%}", "alone"),
        ("{{- raise_exception('never') -}}", "plain"),
        ("{{- 1 // 0 -}}", "plain"),
    ],
)
def test_probe_refused_by_template(load, refusal, form):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = refusal + PLAIN
    text = tokenizer.decode(probe_tokens(tokenizer))
    assert text.startswith("What is 17 + 25?" if form == "plain" else "<|im_start|>")
    assert ("<|im_start|>system\n" in text) == (form == "system")
    if form == "system":
        rows = [chat(("system", "S"), ("user", "Q"), ("assistant", "A"))]
        assert load(rows, refusal + PLAIN)[0] == [["A<|im_end|>"]]


def test_reasoning_left_out(load):
    row = chat(("user", "2+2?"), ("assistant", "4", {"reasoning_content": "two and two make four"}))
    with pytest.raises(
        ValueError,
        match=r"row 1: the chat template leaves out the reasoning of message 2 \('two and",
    ):
        load([row])
    # Allowed on purpose, it is counted.
    learned_text, split = load([row, row], allow_left_out=["reasoning"])
    assert learned_text == [["4<|im_end|>"]] * 2
    assert split.summary().endswith(
        "; 2 lost their reasoning to the chat template (data.allow_left_out)"
    )


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


def test_the_command_line_names_file_and_row(tmp_path, tiny, capfd, monkeypatch):
    monkeypatch.delenv("MEGALORA_TRACEBACK", raising=False)
    row = chat(("user", "hi \ud83d"), ("assistant", "yo"))
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "run.yaml").write_text(
        f"model: {{path: {tiny}}}\ndata: {{train: {tmp_path}/rows.jsonl}}\ntrain: {{steps: 1}}\n"
    )
    with pytest.raises(SystemExit) as exit:
        cli.main(["data", str(tmp_path / "run.yaml")])
    out, err = capfd.readouterr()
    assert (exit.value.code, out) == (2, "")
    assert err.startswith(
        f"megalora: {tmp_path}/rows.jsonl: row 1: message 1 holds half a character"
    )
    assert err.count("\n") == 1
