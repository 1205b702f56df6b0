"""A process that calls rewards, one after the other: ``python -m megalora.rl.rewards.worker``.

It is started anew and not forked, because the training process has threads and a GPU, and it
imports what the rewards need alone. Requests come on its standard input and answers go to its
standard output, each a pickle behind its length. Functions are called on the main thread, where
SIGALRM works.
"""

import os
import pickle
import queue
import signal
import struct
import threading
from typing import Any, BinaryIO

from megalora.rl.rewards.load import Reward, as_number, load_reward

LENGTH = struct.Struct("<Q")


def pack(message: Any) -> bytes:
    """A message as it is sent."""
    content = pickle.dumps(message)
    return LENGTH.pack(len(content)) + content


def main() -> None:
    """Load the rewards that the first message names, then answer requests until the end of the
    input."""
    requests, answers = _own_streams()
    paths = _receive(requests)
    rewards: dict[str, Reward] = {}
    try:
        for path in paths:
            rewards[path] = load_reward(path)
    except ValueError as error:
        answers.write(pack(str(error)))
        return
    # All are loaded: from here on calls have a time-out.
    answers.write(pack(None))
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    # Only the reading happens there: calls are made one at a time, on this thread.
    threading.Thread(target=_read, args=(requests, waiting), daemon=True).start()
    while True:
        answers.write(pack(_answer(rewards, *waiting.get())))


def _own_streams() -> tuple[BinaryIO, BinaryIO]:
    """Input and output of this process, out of reach of what the user's functions read and print:
    they print to the standard error."""
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return requests, answers


def _read(requests: BinaryIO, waiting: "queue.SimpleQueue[Any]") -> None:
    """Pass requests on; when the run is gone, go too, whatever is being computed."""
    try:
        while True:
            waiting.put(_receive(requests))
    finally:
        # The group is this process and those that the user's functions have started.
        os.killpg(os.getpgrp(), signal.SIGKILL)


def _receive(stream: BinaryIO) -> Any:
    # Fewer bytes than asked for are the end of the stream.
    header = stream.read(LENGTH.size)
    if len(header) < LENGTH.size:
        raise EOFError
    return pickle.loads(stream.read(*LENGTH.unpack(header)))


def _answer(
    rewards: dict[str, Reward], path: str, arguments: tuple[str, str, str, dict[str, Any]]
) -> tuple[float | None, str]:
    """(what the reward gives, "") or (None, what went wrong)."""
    reward = rewards[path]
    try:
        # The only line that may take long, or for ever.
        value = reward.judge(*arguments)
    # sys.exit in a reward must not end the process, which others wait for.
    except (Exception, SystemExit) as error:
        return None, reward.why(error)
    try:
        return as_number(value), ""
    except ValueError as error:
        return None, str(error)


if __name__ == "__main__":
    main()
