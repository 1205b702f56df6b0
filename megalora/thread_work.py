"""Have a thread of its own do some work."""

import threading
from collections.abc import Callable
from concurrent.futures import Future


def in_thread[T](work: Callable[[], T], name: str) -> "Future[T]":
    """The result of ``work``, which a new thread does.

    Unlike a thread of ``ThreadPoolExecutor`` it keeps no process from ending: whoever waits for a
    server that hangs would otherwise be waited for.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except Exception as error:
            # Whoever waits raises it.
            done.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return done
