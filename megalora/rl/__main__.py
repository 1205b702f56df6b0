"""``torchrun --nproc-per-node N -m megalora.rl CONFIG.yaml [section.key=value ...]``"""

import sys
from functools import partial
from typing import Any

from megalora.train.on_ranks import on_ranks
from megalora.user_error import guarded


def main(arguments: list[str]) -> None:
    on_ranks(arguments, "megalora.rl", _begin)


def _begin() -> Any:
    from megalora.rl.feed import sampling_feed
    from megalora.rl.play import playing
    from megalora.train.loop import train

    return partial(train, feed=sampling_feed(playing))


if __name__ == "__main__":
    guarded(main, sys.argv[1:])
