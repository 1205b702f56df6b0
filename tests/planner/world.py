"""A world of any size of which this process is one rank, for building without communicating."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def fake_world(rank: int, num_ranks: int) -> Iterator[None]:
    """Rank ``rank`` of ``num_ranks``, over torch's fake process group: collectives return at once and move nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
