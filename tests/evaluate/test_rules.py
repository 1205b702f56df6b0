"""Which answers each rule takes for right, and what it refuses to judge."""

from pathlib import Path

import pytest

from megalora.evaluate.rules import rule_of


@pytest.mark.parametrize(
    ("rule", "answer", "expected", "right"),
    [
        ("last-number", "So 12 + 30 = 42.", "#### 42", True),
        ("last-number", "1,234.50 dollars", "1234.5", True),
        ("last-number", "It is 42, or 43", "42", False),
        ("last-number", "no idea", "42", False),
        ("last-number", "= -3", "3", False),
        # A sign behind a digit is an operator.
        ("last-number", "10-3", "3", True),
        ("last-number", "2 - -3", "-3", True),
        ("last-number", ".5", "0.5", True),
        ("last-number", "-$1,319", "-1319", True),
        ("last-number", "\u22127 degrees", "-7", True),
        # Commas that part no thousands part numbers.
        ("last-number", "x = 1,2", "2", True),
        ("last-number", "1,2345", "12345", False),
        # A box holds the answer, whatever follows it.
        ("last-number", r"\boxed{42}. I am 100% sure.", "42", True),
        ("last-number", r"\boxed{1}, no: $\boxed{\text{about } 1{,}234}$", "1234", True),
        ("last-number", r"\boxed{10\,000}", "#### 10,000", True),
        ("last-number", r"\boxed{\frac{1}{2}}", "2", False),
        ("last-number", r"42 is \boxed{4", "4", False),
        ("exact", "  yes\n", "yes", True),
        ("exact", "Yes", "yes", False),
        ("regex:[A-D]", "A? No: B", "B", True),
        ("regex:[A-D]", "B? No: A", "B", False),
        (r"regex:answer: (\w+)", "answer: a; answer: yes", "the answer: yes", True),
        (r"regex:(?:x|(y))", "y x", "y", False),
        ("regex:[A-D]", "none", "B", False),
    ],
)
def test_rules(rule: str, answer: str, expected: str, right: bool) -> None:
    assert rule_of(rule)(answer, expected) is right


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("last-numbr", "--rule last-numbr: not a rule; there are last-number, exact, regex:PATT"),
        ("regex:", "--rule regex:: not a rule"),
        ("regex:(", "--rule regex:(: not a regular expression"),
        ("no_such_module:f", "--rule no_such_module:f: No module named 'no_such_module'"),
        ("json:f", "--rule json:f: module 'json' has no attribute 'f'"),
        ("json:__doc__", "--rule json:__doc__ is not a function"),
    ],
)
def test_rules_that_are_none(rule: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        rule_of(rule)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("rule", ["last-number", "regex:[0-9]"])
def test_an_expected_answer_that_cannot_be_judged(rule: str) -> None:
    with pytest.raises(ValueError, match="the expected answer has no .*: 'none'"):
        rule_of(rule)("42", "none")


def test_a_function_of_the_user_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rules.py").write_text(
        "def starts(answer, expected):\n    return answer.startswith(expected)\n"
        "def score(answer, expected):\n    return 0.5\n"
    )
    monkeypatch.chdir(tmp_path)
    rule = rule_of("my_rules:starts")
    assert rule("yes, it is", "yes")
    assert not rule("no", "yes")
    with pytest.raises(ValueError, match="score must return True or False, got 0.5"):
        rule_of("my_rules:score")("a", "b")
