"""Do something on the first rank for all ranks, which get its result or its error."""

from collections.abc import Callable, Hashable
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError


def on_first_rank[T](action: Callable[[], T], failure: str) -> T:
    """Run ``action`` on rank 0 and return its result on every rank. Collective over the world.

    Args:
        failure: what it means that a file cannot be read or written, for the message.
    Raises:
        ValueError: on every rank, if the action raised one or met such a file.
        RuntimeError: on the other ranks, if it raised anything else; rank 0 raises that itself.
    """
    # The result, a user's mistake, any other error.
    answer: list[Any] = [None, None, None]
    raised: Exception | None = None
    if dist.get_rank() == 0:
        try:
            answer[0] = action()
        except ValueError as error:
            raised = error
            answer[1] = str(error)
        except (OSError, SafetensorError) as error:
            answer[1] = f"{failure} ({error})"
        except Exception as error:
            # Whatever it is, the other ranks must not wait for ever.
            raised = error
            answer[2] = f"{type(error).__name__} on the first rank: {error}"
    dist.broadcast_object_list(answer, src=0)
    result, mistake, crash = answer
    # On rank 0, with its own traceback.
    if raised is not None:
        raise raised
    if mistake is not None:
        raise ValueError(mistake)
    if crash is not None:
        raise RuntimeError(crash)
    return result


def check_agreement(name: str, value: Hashable) -> None:
    """Raise ``ValueError`` unless every rank has the same value: files may differ between
    machines."""
    values: list[Hashable] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    if len(set(values)) > 1:
        raise ValueError(
            f"ranks disagree about the {name}: {sorted(set(values), key=str)}. Data and"
            " checkpoint.dir must be the same files on every machine."
        )
