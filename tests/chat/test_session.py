"""Conversations and their commands, with an engine that says what it was asked."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from megalora.chat.session import Message, Session, Stopped


class Echo:
    """Says who answers and with how many messages; keeps what it was asked."""

    def __init__(self, *, has_adapter: bool = True, has_base: bool = True) -> None:
        self.has_adapter = has_adapter
        self.has_base = has_base
        self.asked: list[tuple[list[Message], dict[str, Any], bool, int]] = []
        self.refuses = False

    def stream(
        self, messages: Sequence[Message], options: Mapping[str, Any], *, by_base: bool, number: int
    ) -> Iterator[str]:
        self.asked.append((list(messages), dict(options), by_base, number))
        yield "I am "
        if self.refuses:
            raise ValueError("too long")
        yield "the base" if by_base else "the adapter"


def said(session: Session, *lines: str) -> list[str]:
    return ["".join(session.say(line)) for line in lines]


def test_messages_grow_and_pieces_come_one_by_one() -> None:
    engine = Echo()
    session = Session(engine, {"seed": 3}, system="Be brief.")
    assert list(session.say("Hello")) == ["I am ", "the adapter", "\n"]
    said(session, "Again", "")
    system = {"role": "system", "content": "Be brief."}
    first = [system, {"role": "user", "content": "Hello"}]
    assert engine.asked[0] == (first, {"seed": 3}, False, 0)
    answer = {"role": "assistant", "content": "I am the adapter"}
    second = [*first, answer, {"role": "user", "content": "Again"}]
    # An empty line asks nothing; the second answer has other draws.
    assert engine.asked[1:] == [(second, {"seed": 3}, False, 1)]


def test_both_answer_and_the_adapter_s_answer_goes_on() -> None:
    engine = Echo()
    session = Session(engine, {}, by="both")
    assert said(session, "Hello") == ["base: I am the base\nadapter: I am the adapter\n"]
    # The same messages and the same draws for both.
    assert engine.asked[0][0] == engine.asked[1][0]
    assert [asked[2:] for asked in engine.asked] == [(True, 0), (False, 0)]
    assert said(session, "/base", "And now?") == ["answers: base\n", "I am the base\n"]
    assert engine.asked[2][0][1]["content"] == "I am the adapter"
    assert said(session, "/adapter", "x") == ["answers: adapter\n", "I am the adapter\n"]


def test_reset_and_system_begin_anew() -> None:
    engine = Echo()
    session = Session(engine, {})
    said(session, "Hello", "/reset", "a", "/system Rhyme.", "b", "/reset", "c")
    lengths = [len(messages) for messages, *_ in engine.asked]
    assert lengths == [1, 1, 2, 2]
    assert engine.asked[3][0][0] == {"role": "system", "content": "Rhyme."}


def test_a_refused_message_is_not_part_of_the_conversation() -> None:
    engine = Echo()
    session = Session(engine, {})
    said(session, "Hello")
    engine.refuses = True
    with pytest.raises(ValueError, match="too long"):
        said(session, "no")
    engine.refuses = False
    said(session, "yes")
    assert [message["content"] for message in engine.asked[-1][0]] == [
        "Hello", "I am the adapter", "yes",
    ]  # fmt: skip


def test_options_are_set_and_shown() -> None:
    engine = Echo()
    session = Session(engine, {"temperature": 0.5})
    assert said(session, "/set top_k 7") == ["set: temperature=0.5, top_k=7\n"]
    said(session, "x")
    assert engine.asked[0][1] == {"temperature": 0.5, "top_k": 7}


def test_a_message_may_begin_with_a_slash() -> None:
    engine = Echo()
    said(Session(engine, {}), "//usr/bin")
    assert engine.asked[0][0] == [{"role": "user", "content": "/usr/bin"}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/bsae", "unknown command /bsae; did you mean /base?"),
        ("/xyzzy", "unknown command /xyzzy; /help lists all"),
        ("/set heat 3", "no option 'heat'; there are temperature, top_p"),
        ("/set top_k many", "top_k must be a number, got 'many'"),
        ("/set top_p 2", "top_p must be above 0 and at most 1, got 2.0"),
    ],
)
def test_commands_that_are_wrong(line: str, message: str) -> None:
    session = Session(Echo(), {})
    with pytest.raises(ValueError, match=message.replace("?", "[?]")):
        said(session, line)
    assert session.options == {}


def test_who_cannot_answer_is_refused() -> None:
    alone = Session(Echo(has_adapter=False), {})
    assert said(alone, "x") == ["I am the base\n"]
    for line in ("/adapter", "/both"):
        with pytest.raises(ValueError, match="no adapter here"):
            said(alone, line)
    with pytest.raises(ValueError, match="does not list the base"):
        said(Session(Echo(has_base=False), {}), "/base")
    with pytest.raises(ValueError, match="temperature must be 0 or above"):
        Session(Echo(), {"temperature": -1.0})


def test_quit_and_help() -> None:
    session = Session(Echo(), {})
    assert "/set NAME VALUE" in said(session, "/help")[0]
    with pytest.raises(Stopped):
        said(session, "/quit")
