"""``torchrun --nproc-per-node N -m megalora.train CONFIG.yaml [section.key=value ...]``"""

import sys
from typing import Any

from megalora.train.on_ranks import on_ranks
from megalora.user_error import guarded


def main(arguments: list[str]) -> None:
    on_ranks(arguments, "megalora.train", begin)


def begin() -> Any:
    """What a rank calls, with all that it imports."""
    from megalora.train.loop import train

    return train


if __name__ == "__main__":
    guarded(main, sys.argv[1:])
