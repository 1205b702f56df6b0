"""Do something on the first rank, or on each, for all ranks, which get its result or its error."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from megalora import host


def is_first_rank() -> bool:
    """Whether this is the world's first rank, or a process without a world."""
    return not dist.is_initialized() or dist.get_rank() == 0


def on_first_rank[T](
    action: Callable[[], T], failure: str, group: dist.ProcessGroup | None = None
) -> T:
    """Run ``action`` on rank 0 and return its result on every rank. Collective over the world.

    Args:
        failure: what it means that a file cannot be read or written, for the message.
        group: a group of the world's ranks to do it over; None for the world's own.
    Raises:
        ValueError: on every rank, if the action raised one or met such a file.
        RuntimeError: on the other ranks, if it raised anything else; rank 0 raises that itself.
    """
    # The result, a user's mistake, any other error.
    answer: list[Any] = [None, None, None]
    raised: Exception | None = None
    if is_first_rank():
        answer, raised = _try(action, failure, "the first rank")
    if dist.is_initialized():
        dist.broadcast_object_list(answer, src=0, group=group)
    return _result(answer, raised)


def on_every_rank[T](
    action: Callable[[], T], failure: str, group: dist.ProcessGroup | None = None
) -> list[T]:
    """Run ``action`` on every rank and return all results, by rank, on every rank. Collective.

    Args:
        failure, group: as in ``on_first_rank``.
    Raises:
        ValueError, RuntimeError: on every rank, likewise, if one rank fails; of several the first.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    answer, raised = _try(action, failure, f"rank {rank}")
    answers: list[Any] = [answer]
    if dist.is_initialized():
        answers = [None] * dist.get_world_size()
        dist.all_gather_object(answers, answer, group=group)
    results: list[T] = []
    for other, found in enumerate(answers):
        results.append(_result(found, raised if other == rank else None))
    return results


def _try(action: Callable[[], Any], failure: str, where: str) -> tuple[list[Any], Exception | None]:
    """(result, a user's mistake, any other error) of an action, and what it raised of its own."""
    answer: list[Any] = [None, None, None]
    raised: Exception | None = None
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
        answer[2] = f"{type(error).__name__} on {where}: {error}"
    return answer, raised


def _result(answer: list[Any], raised: Exception | None) -> Any:
    result, mistake, crash = answer
    # On its own rank, with its own traceback.
    if raised is not None:
        raise raised
    if mistake is not None:
        raise ValueError(mistake)
    if crash is not None:
        raise RuntimeError(crash)
    return result


def any_rank(flags: list[bool]) -> list[bool]:
    """Each flag, true where it is so on any rank; the same on every rank. Collective."""
    if not dist.is_initialized():
        return flags
    # One message, and one wait for the device where there is one.
    seen = torch.tensor(flags, dtype=torch.int32, device=host.device())
    dist.all_reduce(seen, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in seen.tolist()]


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
