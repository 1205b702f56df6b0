"""The generated sums are right, different from each other, and the same for the same seed."""

import sys

import pytest

from megalora.data.arithmetic import main, write_arithmetic
from tests.jsonl import read_jsonl


def test_sums(tmp_path):
    write_arithmetic(tmp_path / "new" / "a.jsonl", 500, seed=3)
    conversations = [row["messages"] for row in read_jsonl(tmp_path / "new" / "a.jsonl")]
    assert len(conversations) == 500
    assert len({user["content"] for user, _ in conversations}) == 500
    for user, assistant in conversations:
        question = user["content"].removeprefix("What is ").removesuffix("?")
        left, operator, right = question.split()
        value = {
            "+": int(left) + int(right),
            "-": int(left) - int(right),
            "*": int(left) * int(right),
        }[operator]
        assert (user["role"], assistant) == (
            "user",
            {"role": "assistant", "content": f"{question} = {value}"},
        )
    assert {user["content"].split()[3] for user, _ in conversations} == {"+", "-", "*"}


def test_the_seed_decides(tmp_path, monkeypatch):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_arithmetic(tmp_path / name, 50, seed)
    assert (
        (tmp_path / "a").read_bytes()
        == (tmp_path / "b").read_bytes()
        != (tmp_path / "c").read_bytes()
    )
    monkeypatch.setattr(
        sys, "argv", ["arithmetic", str(tmp_path / "d"), "--num", "50", "--seed", "2"]
    )
    main()
    assert (tmp_path / "d").read_bytes() == (tmp_path / "c").read_bytes()


def test_all_questions_and_no_more(tmp_path, monkeypatch, capsys):
    write_arithmetic(tmp_path / "a", 30_000, seed=0)
    assert len(set((tmp_path / "a").read_text().splitlines())) == 30_000
    with pytest.raises(
        ValueError, match="30001 samples: there are 1 to 30000 different questions; ask for fewer"
    ):
        write_arithmetic(tmp_path / "a", 30_001, seed=0)
    monkeypatch.setattr(sys, "argv", ["arithmetic", str(tmp_path / "d"), "--num", "0"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "0 samples: there are 1 to 30000" in capsys.readouterr().err
