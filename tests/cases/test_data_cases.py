"""Read data files as users bring them: what is learned of each, or the line that refuses it."""

import json

import pytest

from megalora.cli import main as cli
from megalora.data.probe_text import probe_tokens
from tests.cases.rows import PLAIN, chat
from tests.data.chat_tokenizer import make_tokenizer


def text_of(split, tokenizer):
    """The first sample as text: what the model is given, learned or not."""
    return tokenizer.decode(split.samples[0].input_ids.tolist())


def test_columns_left_out(load):
    # Alpaca's columns. Without the input, nobody could answer the question.
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
        ("[" * 100_000, r"rows.jsonl:2: lists or objects are nested more than 100 deep"),
        (
            '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content":'
            ' "yo", "x": ' + "[" * 300 + "]" * 300 + "}]}",
            r"rows.jsonl:2: lists or objects are nested more than 100 deep",
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
