"""Run a conversation at a terminal, or from a pipe. No torch."""

import sys

from megalora.chat.session import Session, Stopped
from megalora.wording import printable


def write(text: str) -> None:
    """Print at once: an answer comes piece by piece."""
    # A model writes what it likes, and a server too.
    sys.stdout.write(printable(text))
    sys.stdout.flush()


def show(session: Session, line: str) -> None:
    """Print what a line brings: an answer, or why there is none."""
    try:
        for piece in session.say(line):
            write(piece)
    except ValueError as error:
        # The conversation goes on without this line.
        write(f"{error}\n")
    except KeyboardInterrupt:
        write("\n(stopped; the answer is forgotten)\n")


def talk(session: Session) -> None:
    """Read lines until there are no more."""
    prompt = ""
    if sys.stdin.isatty():
        # Importing it gives ``input`` a history and keys to edit with.
        import readline  # noqa: F401

        prompt = "> "
        write("/help lists commands; Ctrl-D ends\n")
    while True:
        try:
            show(session, input(prompt))
        except (EOFError, KeyboardInterrupt, Stopped):
            break
