"""Check what is read of a source, left out of it or held out, and how refusals name rows."""

from dataclasses import replace

import pytest

from megalora.data.chat import encode
from megalora.data.splits import Split, load_split, split_off_eval
from megalora.data.too_long import Fit
from tests.data.samples import sample
from tests.jsonl import write_jsonl

GSM8K = {"prompt": "question", "completion": "answer"}


def write_rows(path, rows):
    write_jsonl(path, rows)
    return str(path)


def questions(*answers):
    return [{"question": "What is the sum?", "answer": answer} for answer in answers]


def numbered(count):
    """A split whose samples hold their own number as token, so that each can be told apart."""
    samples = [sample([k, k], [False, True]) for k in range(count)]
    return Split("x.jsonl", 8, samples)


def numbers_of(split):
    """Numbers of the samples that a part of ``numbered`` holds, in its order."""
    return [int(sample.input_ids[0]) for sample in split.samples]


def test_load_split_maps_columns_and_counts(tmp_path, make_tokenizer):
    # Qwen3's template, because it prints more than the row holds: the think block is learned.
    tokenizer = make_tokenizer("qwen3")
    source = write_rows(tmp_path / "train.jsonl", questions("42", "long " * 40, "43, I think"))
    split = load_split(source, tokenizer, format=GSM8K, max_length=80)
    num_tokens = 0
    num_target_tokens = 0
    # The answer in the middle is longer than 80 tokens.
    for found, answer in zip(split.samples, ("42", "43, I think"), strict=True):
        chat = [
            {"role": "user", "content": "What is the sum?"},
            {"role": "assistant", "content": answer},
        ]
        expected = encode(chat, tokenizer)
        assert found.input_ids.tolist() == expected.input_ids.tolist()
        learned = tokenizer.decode(found.input_ids[found.loss_mask].tolist())
        assert learned == f"<think>\n\n</think>\n\n{answer}<|im_end|>"
        num_tokens += len(expected.input_ids)
        num_target_tokens += int(expected.loss_mask.sum())
    assert (split.fit.num_too_long, split.fit.num_no_target) == (1, 0)
    # Each of the four letters of 40 words is a token of its own: the tokenizer has learned no
    # merge of two of them.
    assert split.fit.longest > 160
    assert split.num_tokens == num_tokens
    assert split.num_target_tokens == num_target_tokens
    assert (
        split.summary()
        == f"{source}: 2 samples, {num_tokens} tokens ({num_target_tokens} in the loss); "
        f"1 longer than data.max_length=80 were left out (longest {split.fit.longest})"
    )


def test_max_length_is_the_longest_that_is_kept(tmp_path, make_tokenizer):
    source = write_rows(tmp_path / "a.jsonl", questions("42", "42, I think"))

    def load(length):
        return load_split(source, make_tokenizer(), format=GSM8K, max_length=length)

    # Two answers of different lengths: the limit is put at the longer one, then one below.
    longest = load(1000).fit.longest
    assert (len(load(longest).samples), load(longest).fit.num_too_long) == (2, 0)
    assert (len(load(longest - 1).samples), load(longest - 1).fit.num_too_long) == (1, 1)


def test_samples_without_a_target_are_left_out(tmp_path, make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    # Nothing but contents: an empty answer has not even an end of turn to learn.
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    source = write_rows(tmp_path / "a.jsonl", questions("", "42"))
    split = load_split(source, tokenizer, format=GSM8K, max_length=99)
    assert (len(split.samples), split.fit.num_no_target) == (1, 1)
    assert (
        "in the loss); 1 without a token in the loss were left out; 1 have no end-of-turn"
        in split.summary()
    )
    source = write_rows(tmp_path / "b.jsonl", questions(""))
    with pytest.raises(
        ValueError,
        match=r"none of the 1 samples is left: 1 without a token .*\n  Look at the rows and at",
    ):
        load_split(source, tokenizer, format=GSM8K, max_length=99)


def test_summary_of_a_large_split():
    # 3,000 * 400 tokens are 1.2 M, and 3,000 * 250 of them are in the loss.
    samples = [sample([1] * 400, [False] * 150 + [True] * 250)] * 3000
    many = Split(
        "train.jsonl", 512, samples, fit=Fit("left_out", 512, longest=803, num_too_long=12)
    )
    assert (
        many.summary() == "train.jsonl: 3,000 samples, 1.2 M tokens (750,000 in the loss); "
        "12 longer than data.max_length=512 were left out (longest 803)"
    )


def test_load_split_errors_name_file_and_row(tmp_path, make_tokenizer):
    tokenizer = make_tokenizer()
    good = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    # The refusal of the last of several rows; rows count from 1.
    cases = {
        r"a.jsonl: row 2: there is no assistant message": [
            good,
            {"messages": good["messages"][:1]},
        ],
        r"a.jsonl: row 3: message 2 has the unknown role 'bot'": [
            good,
            good,
            {"messages": [good["messages"][0], {"role": "bot", "content": "a"}]},
        ],
        r"a.jsonl: row 2: column 'messages' must hold a list of messages, got NoneType": [
            good,
            {"text": "x"},
        ],
        r"a.jsonl: data.format=auto looks for a column 'messages'.*there are question, answer": (
            questions("42")
        ),
    }
    for message, rows in cases.items():
        with pytest.raises(ValueError, match=message):
            load_split(
                write_rows(tmp_path / "a.jsonl", rows), tokenizer, format="auto", max_length=99
            )
    source = write_rows(tmp_path / "a.jsonl", [good])
    with pytest.raises(ValueError, match=r"a.jsonl: the tokenizer .* has no chat template"):
        load_split(source, make_tokenizer(None), format="auto", max_length=99)
    message = (
        r"none of the 1 samples is left: 1 longer than data.max_length=3 .*\(longest \d+\).\n "
        r" Raise data.max_length"
    )
    with pytest.raises(ValueError, match=message):
        load_split(source, tokenizer, format="auto", max_length=3)


def test_every_refusal_is_named_where_that_is_asked_for(tmp_path, make_tokenizer):
    user = {"role": "user", "content": "q"}
    # Row 1 is good; rows 2 to 8 fail for one reason with a different name each, row 9 for another.
    rows = [{"messages": [user, {"role": "assistant", "content": "a"}]}]
    for k in range(7):
        rows.append({"messages": [user, {"role": f"bot{k}", "content": "a"}]})
    rows.append({"messages": [user]})
    source = write_rows(tmp_path / "a.jsonl", rows)
    known = "use one of system, developer, user, assistant, tool"
    bots = f"message 2 has the unknown role 'bot0'; {known}"

    def refusal(every_refusal):
        with pytest.raises(ValueError) as caught:
            load_split(
                source, make_tokenizer(), format="auto", max_length=99, every_refusal=every_refusal
            )
        return str(caught.value)

    # Training stops at the first; ``megalora data`` shows all, of each kind the first five rows.
    assert refusal(False) == f"{source}: row 2: {bots}"
    assert (
        refusal(True)
        == f"{source}: 8 of 9 rows are refused\n  7 (rows 2, 3, 4, 5, 6, ...): {bots}\n  1 (rows"
        " 9): there is no assistant message to learn (roles: user); add one or remove the row"
    )


def test_what_is_said_of_answers_without_end_or_mark():
    one = sample([5, 6], [False, True])
    samples = [
        replace(one, num_open=2),
        replace(one, num_unmarked=3),
        # Open in the middle and at the end: counted once, with the end, which is worse.
        replace(one, stops=False, num_open=1),
    ]
    said = Split("train.jsonl", 512, samples).left_out()
    behind_the_last, behind_another, not_learned = said
    assert behind_the_last.startswith("1 have no end-of-turn token in the loss behind the last")
    assert behind_another.startswith("1 have no end-of-turn token in the loss behind an answe")
    assert not_learned.startswith("3 answers are not learned,")


# Of 20 samples: a count, a quarter, and a fraction that rounds to none, of which one is taken.
@pytest.mark.parametrize(("eval", "num_eval"), [(3, 3), (0.25, 5), (0.001, 1)])
def test_split_off_eval(eval, num_eval):
    train, held_out = split_off_eval(numbered(20), eval, seed=7)
    trained = numbers_of(train)
    evaluated = numbers_of(held_out)
    assert len(evaluated) == num_eval
    assert sorted(trained + evaluated) == list(range(20))
    # Both keep the order of the file, which only ``order`` shuffles.
    assert trained == sorted(trained)
    assert evaluated == sorted(evaluated)
    _, again = split_off_eval(numbered(20), eval, seed=7)
    assert numbers_of(again) == evaluated
    assert (train.source, held_out.source) == ("x.jsonl", "x.jsonl (held out)")


def test_split_off_eval_depends_on_the_seed():
    chosen = set()
    for seed in range(8):
        _, held_out = split_off_eval(numbered(20), 5, seed)
        chosen.add(tuple(numbers_of(held_out)))
    # Of the 15,504 ways to choose 5 of 20; that two seeds agree by chance happens once in 550.
    assert len(chosen) == 8


@pytest.mark.parametrize(
    ("eval", "message"),
    [
        (1.5, r"data.eval=1.5 is neither a count \(integer\) nor a fraction between 0 and 1"),
        # YAML's ``eval: yes``; Python would take it for 1.
        (True, "data.eval=True is neither a count"),
        (
            0,
            (
                r"data.eval=0 would hold out 0 of the 20 samples of x.jsonl.\n  Choose between 1"
                r" and 19, or name"
            ),
        ),
        (20, "data.eval=20 would hold out 20 of the 20 samples"),
        # 19.8 samples, rounded.
        (0.99, "data.eval=0.99 would hold out 20 of the 20 samples"),
    ],
)
def test_split_off_too_much(eval, message):
    with pytest.raises(ValueError, match=message):
        split_off_eval(numbered(20), eval, seed=0)
