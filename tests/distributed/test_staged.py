"""Collectives staged through the host: what each delivers, where, and when; then whole trainings
over them."""

import inspect
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from megalora import host, staged
from megalora.config import LoRAConfig, RunConfig
from megalora.train.loop import train
from tests.distributed.device_tensor import on_device, on_devices, on_host
from tests.distributed.ranks import run_ranks
from tests.parity.runs import make_config
from tests.whole_state import whole_state


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Different on every rank; small integers, so that sums are exact in every dtype."""
    generator = torch.Generator().manual_seed(7 + dist.get_rank())
    return torch.randint(-8, 9, shape, generator=generator).to(dtype)


def even_collectives(place: Callable[[Tensor], Tensor], group: Any) -> dict[str, Tensor]:
    """Every collective that plain gloo has too; the results by name."""
    found: dict[str, Tensor] = {}
    n = dist.get_world_size()
    rank = dist.get_rank()
    # Adapters and losses, weights and activations, counts of tokens.
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        name = str(dtype).removeprefix("torch.")
        for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX):
            found[f"all_reduce {op} {name}"] = x = drawn(3, 5, dtype=dtype)
            dist.all_reduce(place(x), op=op, group=group)
        found[f"all_gather {name}"] = out = torch.zeros(n, 4, 3, dtype=dtype)
        dist.all_gather([place(part) for part in out], place(drawn(4, 3, dtype=dtype)), group=group)
        found[f"all_gather_into_tensor {name}"] = out = torch.zeros(4 * n, 3, dtype=dtype)
        dist.all_gather_into_tensor(place(out), place(drawn(4, 3, dtype=dtype)), group=group)
        found[f"reduce_scatter_tensor {name}"] = out = torch.zeros(2, 3, dtype=dtype)
        dist.reduce_scatter_tensor(place(out), place(drawn(2 * n, 3, dtype=dtype)), group=group)
        found[f"all_to_all_single {name}"] = out = torch.zeros(2 * n, 3, dtype=dtype)
        dist.all_to_all_single(place(out), place(drawn(2 * n, 3, dtype=dtype)), group=group)
        # Rank i sends i + j rows to rank j: nothing from the first to itself.
        sizes = list(range(rank, rank + n))
        found[f"uneven all_to_all_single {name}"] = out = torch.zeros(sum(sizes), 3, dtype=dtype)
        sent = drawn(sum(sizes), 3, dtype=dtype)
        dist.all_to_all_single(place(out), place(sent), sizes, sizes, group=group)
        found[f"broadcast {name}"] = x = drawn(4, dtype=dtype)
        dist.broadcast(place(x), src=n - 1, group=group)
        found[f"scatter {name}"] = out = torch.zeros(4, 3, dtype=dtype)
        parts = [place(drawn(4, 3, dtype=dtype) + other) for other in range(n)]
        dist.scatter(place(out), parts if rank == 1 else None, src=1, group=group)
        # Ones: on other ranks than the root nothing may be delivered, so they must stay.
        found[f"gather {name}"] = out = torch.ones(n, 4, 3, dtype=dtype)
        wanted = [place(part) for part in out] if rank == 1 else None
        dist.gather(place(drawn(4, 3, dtype=dtype)), wanted, dst=1, group=group)
        found[f"reduce {name}"] = x = drawn(4, dtype=dtype)
        before = x.clone()
        dist.reduce(place(x), dst=1, op=dist.ReduceOp.SUM, group=group)
        if rank != 1 and place is on_host:
            # Plain gloo leaves a partial sum here; NCCL does not.
            x.copy_(before)
        found[f"send {name}"] = out = torch.zeros(5, dtype=dtype)
        ring = [
            dist.P2POp(dist.isend, place(drawn(5, dtype=dtype)), (rank + 1) % n, group),
            dist.P2POp(dist.irecv, place(out), (rank - 1) % n, group),
        ]
        for work in dist.batch_isend_irecv(ring):
            work.wait()
    return found


def over_gloo_and_staged() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    staged.register()
    group = dist.new_group(backend=staged.BACKEND)
    return even_collectives(on_host, dist.group.WORLD), even_collectives(on_device, group)


@pytest.mark.parametrize("world", [2, 4])
def test_every_collective_delivers_what_gloo_delivers(world):
    for plain, through_copies in run_ranks(over_gloo_and_staged, world):
        # 12 collectives, all_reduce with two operations among them, in three dtypes.
        assert plain.keys() == through_copies.keys() and len(plain) == 36
        for name in plain:
            assert torch.equal(plain[name], through_copies[name]), name
            assert plain[name].count_nonzero(), f"{name} was not delivered"


def what_only_nccl_has() -> None:
    """Against sums written out here: every rank can draw what the others drew."""
    n = dist.get_world_size()
    rank = dist.get_rank()

    def of_every_rank(*shape: int) -> list[Tensor]:
        """Small integers, so that sums and their halves and quarters are exact in float32."""
        drawn = []
        for seed in range(50, 50 + n):
            generator = torch.Generator().manual_seed(seed)
            drawn.append(torch.randint(-8, 9, shape, generator=generator).float())
        return drawn

    given = of_every_rank(6)
    x = given[rank]
    average = torch.stack(given).mean(0)
    dist.all_reduce(on_device(x), op=dist.ReduceOp.AVG)
    assert torch.equal(x, average)

    # Rank i brings, or keeps, 2 i + 1 rows: uneven, as experts' tokens are. Gloo refuses that.
    sizes = list(range(1, 2 * n, 2))
    whole = torch.zeros(sum(sizes), 3)
    brought = []
    for rows, size in zip(of_every_rank(sum(sizes), 3), sizes, strict=True):
        brought.append(rows[:size])
    dist.all_gather(on_devices(whole.split(sizes)), on_device(brought[rank]))
    assert torch.equal(whole, torch.cat(brought))
    given = of_every_rank(sum(sizes), 3)
    parts = on_devices(given[rank].split(sizes))
    mine = torch.zeros(sizes[rank], 3)
    for op, divide in ((dist.ReduceOp.SUM, 1), (dist.ReduceOp.AVG, n)):
        mine.zero_()
        dist.reduce_scatter(on_device(mine), parts, op=op)
        expected = torch.stack(given).sum(0) / divide
        assert torch.equal(mine, expected.split(sizes)[rank]), op
    with pytest.raises(RuntimeError, match="can be summed or averaged"):
        dist.reduce_scatter(on_device(mine), parts, op=dist.ReduceOp.MAX)


def handles_and_views() -> None:
    """Asynchronous, of parts of tensors, many at once, and between ranks that wait for each other
    in turn."""
    n = dist.get_world_size()
    rank = dist.get_rank()
    delivered_when_waited_for(n)
    parts_of_tensors(n, rank)
    many_at_once(n)
    large_messages_in_turn(n, rank)


def delivered_when_waited_for(n: int) -> None:
    ones = torch.ones(3)
    tensor = on_device(ones)
    work = dist.all_reduce(tensor, async_op=True)
    assert torch.equal(ones, torch.ones(3)), "a result before the caller waits for it"
    # The collective has its copy already. Callers of NCCL may not write here, so no training
    # depends on it; here it shows when the copy is taken.
    ones.fill_(5)
    assert work.wait() and torch.equal(ones, torch.full((3,), float(n)))
    ones.fill_(7)
    assert work.wait() and torch.equal(ones, torch.full((3,), 7.0)), "a handle delivers once"


def parts_of_tensors(n: int, rank: int) -> None:
    # Columns of a matrix: neither contiguous nor at the beginning of their memory. What lies
    # between stays as it is.
    numbers = torch.arange(12.0).view(3, 4)
    matrix = numbers + rank
    dist.all_reduce(on_device(matrix[:, 1:3]))
    expected = numbers + rank
    # Over all ranks: n times the numbers, and 0 + 1 + ... + (n - 1).
    expected[:, 1:3] = n * numbers[:, 1:3] + n * (n - 1) / 2
    assert torch.equal(matrix, expected)
    # Every other row of a larger tensor is the output.
    received = torch.zeros(2 * n, 3)
    dist.all_gather_into_tensor(
        on_device(received.t()[:, ::2].t()), on_device(torch.full((1, 3), rank + 1.0))
    )
    assert torch.equal(received[::2, 0], torch.arange(1.0, n + 1)) and not received[1::2].any()


def many_at_once(n: int) -> None:
    """As Megatron's gradient buckets and parameter gathers do it."""
    parts = [torch.zeros(2), torch.zeros(3)]
    wholes = [torch.zeros(2 * n), torch.zeros(3 * n)]
    with dist._coalescing_manager(dist.group.WORLD, async_ops=True) as manager:
        for part, size in zip(parts, (2, 3), strict=True):
            dist.reduce_scatter_tensor(on_device(part), on_device(torch.ones(size * n)))
    manager.wait()
    with dist._coalescing_manager(dist.group.WORLD):
        for part, whole in zip(parts, wholes, strict=True):
            dist.all_gather_into_tensor(on_device(whole), on_device(part))
    # Every rank gave ones, summed over n ranks, then gathered.
    for whole in wholes:
        assert torch.equal(whole, torch.full_like(whole, n))
    # torch 2.11 gathers many at once without options.
    group: Any = dist.group.WORLD
    again = [torch.zeros_like(whole) for whole in wholes]
    group.allgather_into_tensor_coalesced(on_devices(again), on_devices(parts)).wait()
    for gathered, whole in zip(again, wholes, strict=True):
        assert torch.equal(gathered, whole)
    with dist._coalescing_manager(dist.group.WORLD):
        for part in parts:
            dist.all_reduce(on_device(part))
    # n after the reduction above, once more summed over n ranks.
    for part in parts:
        assert torch.equal(part, torch.full_like(part, n * n))


def large_messages_in_turn(n: int, rank: int) -> None:
    """Blocking sends of 4 MB, more than sockets hold, first to last rank and back: a send that
    waits for the wrong thread never ends."""
    big = torch.full((1_000_000,), -1.0)
    if rank == 0:
        dist.send(on_device(torch.arange(1e6)), n - 1)
        dist.recv(on_device(big), n - 1)
    elif rank == n - 1:
        dist.recv(on_device(big), 0)
        dist.send(on_device(big + 1), 0)
    if rank in (0, n - 1):
        assert torch.equal(big, torch.arange(1e6) + (rank == 0))


def groups_and_objects() -> float:
    """Objects, barriers and sub-groups; nothing that is not written out goes past the copies."""
    n = dist.get_world_size()
    rank = dist.get_rank()
    found: list[Any] = [None] * n
    dist.all_gather_object(found, {"rank": rank})
    assert found == [{"rank": other} for other in range(n)]
    said = ["from the last" if rank == n - 1 else None]
    dist.broadcast_object_list(said, src=n - 1)
    assert said == ["from the last"]
    dist.barrier()
    evens = dist.new_group(range(0, n, 2), timeout=timedelta(minutes=host.timeout_minutes()))
    if rank % 2 == 0:
        assert isinstance(evens, staged.StagedGroup)
        x = torch.ones(2)
        dist.all_reduce(on_device(x), group=evens)
        assert x[0] == len(range(0, n, 2))
    # Torch places the tensors of barriers and object collectives on a device of this list.
    assert dist.group.WORLD._device_types == [torch.device("cpu")]  # pyright: ignore
    return host.timeout_minutes()


def gradients_pass() -> None:
    """A collective on a leaf that wants a gradient, and inside an autograd function as ``comm.py``
    has them."""
    from megalora.comm import gather_seq

    n = dist.get_world_size()
    leaf = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        dist.all_reduce(leaf)
    assert (
        leaf.requires_grad
        and leaf.is_leaf
        and torch.equal(leaf.detach(), torch.full((3,), float(n)))
    )
    x = torch.ones(2, 2, requires_grad=True)
    gather_seq(x, dist.group.WORLD).sum().backward()  # pyright: ignore
    # The transpose of a gather is a sum: each of n ranks adds up the ones of all.
    assert torch.equal(x.grad, torch.full((2, 2), float(n)))  # pyright: ignore


@pytest.mark.parametrize(
    "check", [what_only_nccl_has, handles_and_views, groups_and_objects, gradients_pass]
)
def test_staged_groups_behave_as_nccl_s(check):
    staged.register()
    found = run_ranks(check, 4 if check is not gradients_pass else 2, backend=staged.BACKEND)
    # 30 minutes: torch's own limit for gloo.
    assert check is not groups_and_objects or found == [30.0] * 4


COLLECTIVES = (
    "allgather_coalesced",
    "alltoall",
    "gather",
    "recv_anysource",
    "reduce",
    "scatter",
)
"""What torch's process groups have beyond what every training needs."""


def _refuse(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("a collective that is not staged: gloo does not reach into device memory")


def train_as_on_a_gpu(config: RunConfig) -> Path | None:
    """With Megatron's own uneven gathers, which the CPU path replaces because gloo refuses them,
    and with no collective that the staged group lacks."""
    for name in COLLECTIVES:
        if name not in vars(staged.StagedGroup):
            setattr(staged.StagedGroup, name, _refuse)
    import megatron.core.tensor_parallel.mappings as mappings

    # What stands in their place keeps the originals as closures (megalora/megatron_patches.py).
    replaced = inspect.getclosurevars(mappings._gather_along_first_dim).nonlocals
    mappings._gather_along_first_dim = replaced["even_gather"]
    replaced = inspect.getclosurevars(mappings._reduce_scatter_along_first_dim).nonlocals
    mappings._reduce_scatter_along_first_dim = replaced["even_scatter"]
    return train(config)


@pytest.mark.parametrize(
    ("parallel", "recompute"),
    [
        pytest.param({"tp": 2, "ep": 2, "etp": 2}, "selective", marks=pytest.mark.slow),
        pytest.param({"pp": 2, "vpp": 2, "ep": 2}, "full", marks=pytest.mark.slow),
    ],
    ids=["tp2-ep2-etp2", "pp2-vpp2-ep2"],
)
def test_a_staged_training_has_the_bits_of_one_over_gloo(
    parallel, recompute, tiny, chats, tmp_path
):
    staged.register()
    written = []
    for backend, function in (("gloo", train), (staged.BACKEND, train_as_on_a_gpu)):
        out = tmp_path / backend
        config = make_config(
            tiny, chats, out, parallel, recompute, steps=2, lora=LoRAConfig(rank=4, dropout=0.1)
        )
        run_ranks(function, 4, config, backend=backend)
        adapter = load_file(out / "step_000002/adapter_model.safetensors")
        optimizer = whole_state(out / "step_000002")
        written.append({**adapter, **optimizer})
    # Copies move bits, and gloo does the sums in both: nothing may differ at all.
    plain, through_copies = written
    assert plain.keys() == through_copies.keys() and len(plain) > 100
    for name, t in plain.items():
        assert torch.equal(t, through_copies[name]), name
