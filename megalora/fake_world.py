"""Make this process a rank of any world, without the other ranks: for building what one has."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def fake_world(rank: int, num_ranks: int) -> Iterator[None]:
    """Make this process rank ``rank`` of ``num_ranks`` while the block runs, over torch's fake
    process group: collectives return at once and move nothing."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megalora import host

    host.install()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
