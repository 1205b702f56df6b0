"""Hold a conversation: what was said, who answers, and the commands that change it. No torch."""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

from megalora.generate.options import Sampling

Message = dict[str, str]
By = Literal["adapter", "base", "both"]
"""Who answers."""
HELP = """\
/adapter, /base, /both   who answers from now on; of both, the adapter's answer goes on
/reset                   forget the conversation
/system TEXT             begin anew with this system message
/set NAME VALUE          change how tokens are chosen: {options}
/set                     show what is set
/help                    this text
/quit                    end, as Ctrl-D does; Ctrl-C stops an answer
A line that begins with // is a message that begins with /."""
_TYPES = {field.name: field.type for field in dataclasses.fields(Sampling)}


class Engine(Protocol):
    """What computes answers."""

    @property
    def has_adapter(self) -> bool:
        """Whether there is an adapter, or the base alone."""
        ...

    @property
    def has_base(self) -> bool:
        """Whether the base can answer, too."""
        ...

    def stream(
        self, messages: Sequence[Message], options: Mapping[str, Any], *, by_base: bool, number: int
    ) -> Iterator[str]:
        """Pieces of the answer to the last message.

        Args:
            options: fields of ``Sampling`` that were set; the engine has defaults for the others.
            number: how many answers were asked for before, so that each has draws of its own.
        Raises:
            ValueError: the messages are refused, such as by the chat template or by the length.
        """
        ...


class Stopped(Exception):
    """The user has said that it is over."""


class Session:
    """One conversation with an engine. Output is text in pieces, for a terminal to print."""

    def __init__(
        self, engine: Engine, options: Mapping[str, Any], *, by: By | None = None, system: str = ""
    ) -> None:
        """
        Args:
            by: who answers; by default the adapter, or the base where there is no adapter.
            system: system message; empty for none.
        """
        # Checked before the first answer, not in it.
        Sampling(**options)
        self.engine = engine
        self.options = dict(options)
        self.messages: list[Message] = []
        self.system = system
        self.number = 0
        # A name that was asked for and cannot answer is refused, not replaced.
        self.by: By = "adapter" if engine.has_adapter else "base"
        if by is not None:
            self._answer_by(by)
        self._reset()

    def say(self, line: str) -> Iterator[str]:
        """What the terminal shows for a line of the user: an answer, or what a command did.

        Raises:
            ValueError: an unknown command, a wrong value, or a refused message; the conversation
                is as it was before the line.
            Stopped: the line was ``/quit``.
        """
        if line.startswith("/") and not line.startswith("//"):
            command, _, rest = line[1:].partition(" ")
            yield self._do(command, rest.strip())
        elif line.strip():
            yield from self._answer(line.removeprefix("/") if line.startswith("//") else line)

    def _answer(self, text: str) -> Iterator[str]:
        # A copy: the message joins the conversation only once it is answered.
        asked = [*self.messages, {"role": "user", "content": text}]
        said = ""
        for by_base in self._answering():
            if self.by == "both":
                yield f"{'base' if by_base else 'adapter'}: "
            # The last one's answer stays, and that is the adapter's.
            said = ""
            for piece in self.engine.stream(
                asked, self.options, by_base=by_base, number=self.number
            ):
                said += piece
                yield piece
            yield "\n"
        # Only now: a message that was refused is not part of the conversation.
        self.number += 1
        self.messages = [*asked, {"role": "assistant", "content": said}]

    def _answering(self) -> tuple[bool, ...]:
        """For every answer, whether the base gives it; the adapter's is the last."""
        return {"base": (True,), "adapter": (False,), "both": (True, False)}[self.by]

    def _do(self, command: str, rest: str) -> str:
        """Run a command; returns what it says."""
        match command:
            case "base" | "adapter" | "both":
                self._answer_by(command)
                return f"answers: {self.by}\n"
            case "reset":
                self._reset()
                return "the conversation is empty\n"
            case "system":
                self.system = rest
                self._reset()
                return "the conversation is empty, but for the system message\n"
            case "set":
                return self._set(*rest.split(maxsplit=1))
            case "help":
                return HELP.format(options=", ".join(_TYPES)) + "\n"
            case "quit" | "exit":
                raise Stopped
        known = ("base", "adapter", "both", "reset", "system", "set", "help", "quit")
        near = difflib.get_close_matches(command, known, n=1)
        hint = f"; did you mean /{near[0]}?" if near else "; /help lists all"
        raise ValueError(f"unknown command /{command}{hint}")

    def _answer_by(self, by: By) -> None:
        if by != "base" and not self.engine.has_adapter:
            raise ValueError("there is no adapter here; the base answers")
        if by != "adapter" and not self.engine.has_base:
            raise ValueError("the server does not list the base; only the adapter answers")
        self.by = by

    def _reset(self) -> None:
        self.messages = []
        if self.system:
            self.messages.append({"role": "system", "content": self.system})

    def _set(self, name: str = "", value: str = "") -> str:
        """Set an option, or show what is set."""
        if name:
            if name not in _TYPES:
                raise ValueError(f"no option {name!r}; there are {', '.join(_TYPES)}")
            # float or int: what the line holds is text.
            kind: Any = _TYPES[name]
            try:
                number = kind(value)
            except ValueError:
                raise ValueError(f"{name} must be a number, got {value!r}") from None
            changed = {**self.options, name: number}
            # Raises where the value is out of range.
            Sampling(**changed)
            self.options = changed
        shown = [f"{option}={number}" for option, number in self.options.items()]
        return f"set: {', '.join(shown) or 'nothing; the model has its own defaults'}\n"
