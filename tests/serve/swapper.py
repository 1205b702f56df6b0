"""Swap adapters from a process of its own, until its standard input is closed: ``python -m
tests.serve.swapper URL STORE FOLDER...``

It prints a JSON line per swap: id, when it began and when it was done. It imports neither torch nor
pytest, so that it starts at once.
"""

import json
import select
import sys
import time
from pathlib import Path

from megalora.serve.vllm import Client

EVERY_S = 1.0
"""Seconds from one swap's beginning to the next one's."""


def main(url: str, store: str, *folders: str) -> None:
    """Serve the folders in turn as ``math``."""
    with Client(url, store=Path(store)) as client:
        count = 0
        # Without a timeout select says at once whether there is anything to read, such as an end.
        while not select.select([sys.stdin], [], [], 0)[0]:
            # The time of day, which the process that asks has too.
            began = time.time()
            model = client.swap("math", folders[count % len(folders)])
            done = time.time()
            print(json.dumps({"model": model, "began": began, "done": done}), flush=True)
            count += 1
            time.sleep(max(0.0, began + EVERY_S - done))


if __name__ == "__main__":
    main(*sys.argv[1:])
