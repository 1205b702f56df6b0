"""Check what ``megalora data`` prints of good data, and its one line for what cannot be used."""

from io import StringIO

import pytest
from rich.console import Console

from megalora.cli import main as cli
from megalora.data.chat import encode
from megalora.data.show import histogram, sample_text
from tests.data.chat_tokenizer import make_tokenizer
from tests.jsonl import write_jsonl

# An answer with an escape sequence that would turn the rest of the terminal red.
CHAT = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A\x1b[31m"}]


@pytest.fixture
def config(tmp_path, tiny):
    # Answers of so many letters. Only 300 of them are more than the 100 tokens that are allowed
    # below; of the other three, one is held out.
    rows = []
    for length in (1, 2, 40, 300):
        answer = {"role": "assistant", "content": "A" * length}
        rows.append({"messages": [CHAT[0], answer], "id": length})
    write_jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "run.yaml").write_text(
        f"model: {{path: {tiny}}}\ndata: {{train: {tmp_path}/rows.jsonl}}\ntrain: {{steps: 1}}\n"
    )
    return tmp_path / "run.yaml"


def test_what_is_shown(config, capsys):
    cli.main(["data", str(config), "data.max_length=100", "data.eval=1"])
    out = capsys.readouterr().out
    source = f"{config.parent}/rows.jsonl"
    assert out.startswith(f"data.train  {source}: 2 samples, ")
    assert "note: 1 longer than data.max_length=100 were left out (longest 3" in out
    assert "note: columns not used: id" in out and "read: messages from 'messages'" in out
    assert "sample 2 (" in out and "sample 3 (" not in out
    assert "<|im_start|>assistant\n[LOSS: A<|im_end|>]" in out
    assert f"data.eval  {source} (held out): 1 samples" in out


def test_what_becomes_of_long_samples_is_shown(config, capsys):
    for how, fate, line in (
        ("split", "split", "1 longer than data.max_length=100 were split into"),
        ("truncate_left", "cut", "1 longer than data.max_length=100 were cut at the beginning"),
    ):
        cli.main(["data", str(config), "data.max_length=100", f"data.too_long={how}"])
        out = capsys.readouterr().out
        assert f"note: {line}" in out
        assert f"longer than data.max_length=100: {fate}\n" in out


def test_a_mistake_is_one_line(config, capsys, monkeypatch):
    # Whoever debugs may have set it; it asks for a traceback where a line is expected here.
    monkeypatch.delenv("MEGALORA_TRACEBACK", raising=False)
    bare = config.parent / "bare"
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    for overrides, message in (
        (
            ["data.format={messages: chat}"],
            "rows.jsonl: data.format: messages is mapped to 'chat', but the columns",
        ),
        (["data.train=none.jsonl"], "none.jsonl: no such file (looked in "),
        ([f"model.path={config.parent}"], "there is no config.json in this folder"),
        ([f"model.path={bare}"], "no tokenizer can be read there ("),
        (
            ["data.allow_left_out=[reasonin]"],
            "data.allow_left_out[0] must be one of reasoning, name, tools",
        ),
    ):
        with pytest.raises(SystemExit) as exit:
            cli.main(["data", str(config), *overrides])
        out, err = capsys.readouterr()
        assert (exit.value.code, out) == (2, "")
        assert err.startswith("megalora: ") and message in err and "Traceback" not in err


def test_the_loss_in_colour():
    tokenizer = make_tokenizer("chatml")
    sample = encode(CHAT, tokenizer)
    shown = sample_text(sample, tokenizer, colour=True)
    green = []
    for span in shown.spans:
        if span.style == "green":
            green.append(shown.plain[span.start : span.end])
    # The escape sequence is written out, so that none of the data's reaches the terminal.
    assert green == [r"A\x1b[31m<|im_end|>"]
    # 32 is rich's own green; behind it stands the text of the answer.
    out = StringIO()
    Console(file=out, force_terminal=True, color_system="standard", width=200).print(shown)
    assert "\x1b[32mA\\x1b" in out.getvalue()


def test_histogram():
    # Bins of 4 tokens up to the limit of 20, where a bin ends so that none holds both kept samples
    # and others. The fullest bin, with 3, has 40 signs; one sample has 40 / 3, rounded up.
    lines = list(histogram([1, 2, 2, 9, 25, 39], max_length=20, fate="left out"))
    assert lines == [
        " 0 to  3  " + "#" * 40 + " 3",
        " 4 to  7  " + " " * 40 + " 0",
        " 8 to 11  " + "#" * 14 + " " * 26 + " 1",
        "12 to 15  " + " " * 40 + " 0",
        "16 to 19  " + " " * 40 + " 0",
        "20 to 20  " + " " * 40 + " 0",
        "21 to 23  " + " " * 40 + " 0  longer than data.max_length=20: left out",
        "24 to 27  " + "#" * 14 + " " * 26 + " 1  longer than data.max_length=20: left out",
        "28 to 31  " + " " * 40 + " 0  longer than data.max_length=20: left out",
        "32 to 35  " + " " * 40 + " 0  longer than data.max_length=20: left out",
        "36 to 39  " + "#" * 14 + " " * 26 + " 1  longer than data.max_length=20: left out",
    ]
