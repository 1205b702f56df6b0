"""Do something on the first rank for all: what it returns, or why it failed, reaches every rank."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError


def on_first_rank[T](action: Callable[[], T], failure: str) -> T:
    """What ``action`` returns on rank 0, on every rank; every rank raises ``ValueError`` if it failed there."""
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = action()
        except ValueError as error:
            answer[1] = str(error)
        except (OSError, SafetensorError) as error:
            answer[1] = f"{failure} ({error})"
    dist.broadcast_object_list(answer, src=0)
    if answer[1]:
        raise ValueError(answer[1])
    return answer[0]
