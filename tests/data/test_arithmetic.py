"""The generated sums are right, different from each other, and the same for the same seed."""

import sys

import pytest

from megalora.data.arithmetic import main, write_arithmetic
from tests.jsonl import read_jsonl


def test_sums(tmp_path):
    # The folder does not exist yet; a quickstart writes into a fresh one.
    write_arithmetic(tmp_path / "new" / "a.jsonl", 500, seed=3)
    rows = read_jsonl(tmp_path / "new" / "a.jsonl")
    assert len(rows) == 500
    questions = set()
    operators = set()
    for row in rows:
        user, assistant = row["messages"]
        question = user["content"].removeprefix("What is ").removesuffix("?")
        left, operator, right = question.split()
        value = {
            "+": int(left) + int(right),
            "-": int(left) - int(right),
            "*": int(left) * int(right),
        }[operator]
        assert user["role"] == "user"
        # The answer repeats the question, so that a model that has learned it shows which sum it
        # has read.
        assert assistant == {"role": "assistant", "content": f"{question} = {value}"}
        questions.add(question)
        operators.add(operator)
    # As many different questions as samples: one that is held out was never trained on.
    assert len(questions) == 500
    assert operators == {"+", "-", "*"}


def test_the_seed_decides(tmp_path, monkeypatch):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_arithmetic(tmp_path / name, 50, seed)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()
    # The command line leads to the same file as the function.
    monkeypatch.setattr(
        sys, "argv", ["arithmetic", str(tmp_path / "d"), "--num", "50", "--seed", "2"]
    )
    main()
    assert (tmp_path / "d").read_bytes() == (tmp_path / "c").read_bytes()


def test_all_questions_and_no_more(tmp_path, monkeypatch, capsys):
    # 100 * 100 pairs of numbers below 100 for each of three operators; more samples would repeat
    # questions.
    write_arithmetic(tmp_path / "a", 30_000, seed=0)
    assert len(set((tmp_path / "a").read_text().splitlines())) == 30_000
    with pytest.raises(
        ValueError, match="30001 samples: there are 1 to 30000 different questions; ask for fewer"
    ):
        write_arithmetic(tmp_path / "a", 30_001, seed=0)
    # A mistake on the command line is a message of argparse, with exit code 2 as for any other.
    monkeypatch.setattr(sys, "argv", ["arithmetic", str(tmp_path / "d"), "--num", "0"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "0 samples: there are 1 to 30000" in capsys.readouterr().err
