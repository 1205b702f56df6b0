"""Run collectives of device tensors over gloo, through copies in host memory.

So several ranks can share one GPU: NCCL refuses two ranks on a device, and gloo cannot read device
memory. Every tensor is copied to the host, gloo moves the copy, and the result is
copied back into the caller's tensor: slow, but every layout runs on one GPU with its real kernels,
and only NCCL itself is left to several GPUs. ``register()`` gives torch this back end under the
name ``BACKEND``; a process group made with it is a ``StagedGroup``. Callers, Megatron too, do not
change.

Averages, and gathers and reduce-scatters of unequal parts, which NCCL has and gloo refuses, are
composed here of what gloo has.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions

BACKEND = "megalora_staged"


def register() -> None:
    """Make ``BACKEND`` known to torch. Idempotent."""
    # torch refuses to register a name twice, and has no public list of the names.
    if BACKEND.upper() not in dist.Backend._plugins:
        # Object collectives are made of CPU tensors.
        dist.Backend.register_backend(BACKEND, StagedGroup, devices=["cpu", "cuda"])


class StagedWork(dist.Work):
    """Waits for gloo and then copies the results to where the caller wants them, once."""

    def __init__(self, parts: Sequence[Any], deliver: Callable[[], None]) -> None:
        super().__init__()
        # gloo returns None where there is nothing to do.
        self._parts = [part for part in parts if part is not None]
        self._deliver: Callable[[], None] | None = deliver

    def wait(self, timeout: timedelta | None = None) -> bool:
        for part in self._parts:
            part.wait() if timeout is None else part.wait(timeout)
        # Once: the caller may have changed the tensors since the first time.
        if self._deliver is not None:
            self._deliver()
        self._deliver = None
        return True

    def is_completed(self) -> bool:
        """Whether the results are in place; delivers them if gloo has finished."""
        return all(part.is_completed() for part in self._parts) and self.wait()


class StagedGroup(dist.ProcessGroup):
    """A process group over gloo whose tensors may lie on any device.

    The methods are those that ``torch.distributed`` calls, under their names of torch 2.13 and, as
    aliases at the end, of torch 2.11. A collective that is missing here raises for device tensors.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)  # pyright: ignore[reportCallIssue]
        self._gloo: Any = dist.ProcessGroupGloo(store, rank, size, timeout)
        # Torch asks a back end for the group's name, its timeout and its end. Only CPU tensors have
        # one: of device tensors nothing goes past the copies.
        gloo = dist.ProcessGroup.BackendType.GLOO
        self._register_backend(torch.device("cpu"), gloo, self._gloo)

    def getBackendName(self) -> str:
        return BACKEND

    def barrier(self, opts: Any = None) -> Any:
        if opts is None:
            opts = dist.BarrierOptions()
        return self._gloo.barrier(opts)

    # Reductions.

    def allreduce(self, tensors: list[Tensor], opts: Any) -> StagedWork:
        return self._reduce(self._gloo.allreduce, tensors, opts)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any) -> StagedWork:
        return self._reduce(self._gloo.allreduce_coalesced, tensors, opts)

    def reduce(self, tensors: list[Tensor], opts: Any) -> StagedWork:
        at_root = opts.rootRank == self.rank()
        divide = self._average_as_sum(opts)
        staged = _all_to_host(tensors)
        work = self._gloo.reduce(staged, opts)

        def deliver() -> None:
            # On other ranks gloo leaves partial sums in the copies; the callers' tensors stay.
            if at_root:
                _deliver(tensors, staged, divide)

        return StagedWork([work], deliver)

    def _reduce(self, collective: Any, tensors: list[Tensor], opts: Any) -> StagedWork:
        divide = self._average_as_sum(opts)
        staged = _all_to_host(tensors)
        work = collective(staged, opts)
        return StagedWork([work], lambda: _deliver(tensors, staged, divide))

    def reduce_scatter_single(self, output: Tensor, given: Tensor, opts: Any) -> StagedWork:
        return self.reduce_scatter_single_coalesced([output], [given], opts)

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], given: list[Tensor], opts: Any
    ) -> StagedWork:  # fmt: skip
        divide = self._average_as_sum(opts)
        staged = _all_like_on_host(outputs)
        works = []
        for mine, whole in zip(staged, given, strict=True):
            works.append(self._gloo._reduce_scatter_base(mine, _to_host(whole), opts))
        return StagedWork(works, lambda: _deliver(outputs, staged, divide))

    def reduce_scatter(
        self, outputs: list[Tensor], given: list[list[Tensor]], opts: Any
    ) -> StagedWork:  # fmt: skip
        """Reduce-scatter a list of parts, one for each rank, which may differ in size."""
        divide = self._average_as_sum(opts)
        (output,) = outputs
        (parts,) = given
        sizes = [part.numel() for part in parts]
        sent = torch.cat([part.reshape(-1) for part in _all_to_host(parts)])
        # Equal parts are what gloo can do.
        if len(set(sizes)) == 1:
            mine = sent.new_empty(output.numel())
            work = self._gloo._reduce_scatter_base(mine, sent, opts)
            return StagedWork([work], lambda: _deliver([output], [mine], divide))
        if opts.reduceOp != dist.ReduceOp.SUM:
            raise RuntimeError(
                f"{BACKEND}: unequal parts can be summed or averaged, not {opts.reduceOp}"
            )
        # This rank's part from every rank; summed here, in the order of the ranks.
        received = sent.new_empty(self.size(), output.numel())
        work = self._exchange(received.view(-1), sent, [output.numel()] * self.size(), sizes)
        return StagedWork([work], lambda: _deliver([output], [received.sum(0)], divide))

    def _average_as_sum(self, opts: Any) -> int:
        """Turn an average into a sum, in place; return what to divide the sum by."""
        if opts.reduceOp != dist.ReduceOp.AVG:
            return 1
        opts.reduceOp = dist.ReduceOp.SUM
        return self.size()

    # What moves and does not change.

    def all_gather_single(self, output: Tensor, given: Tensor, opts: Any) -> StagedWork:
        return self.all_gather_single_coalesced([output], [given], opts)

    def all_gather_single_coalesced(
        self, outputs: list[Tensor], given: list[Tensor], opts: Any = None
    ) -> StagedWork:  # fmt: skip
        # torch 2.11 calls this without options.
        if opts is None:
            opts = AllgatherOptions()
        staged = _all_like_on_host(outputs)
        works = []
        for whole, mine in zip(staged, given, strict=True):
            works.append(self._gloo._allgather_base(whole, _to_host(mine), opts))
        return StagedWork(works, lambda: _deliver(outputs, staged))

    def allgather(
        self, outputs: list[list[Tensor]], given: list[Tensor], opts: Any
    ) -> StagedWork:  # fmt: skip
        """All-gather into a list of tensors, one from each rank, which may differ in size."""
        (wanted,) = outputs
        (tensor,) = given
        mine = _to_host(tensor)
        sizes = [tensor.numel() for tensor in wanted]
        if len(set(sizes)) == 1:
            staged = _all_like_on_host(wanted)
            work = self._gloo.allgather([staged], [mine], opts)
            return StagedWork([work], lambda: _deliver(wanted, staged))
        # An all-to-all in which this rank sends all it has to every rank.
        received = mine.new_empty(sum(sizes))
        sent = mine.reshape(-1).repeat(self.size())
        work = self._exchange(received, sent, sizes, [mine.numel()] * self.size())
        return StagedWork([work], lambda: _deliver(wanted, received.split(sizes)))

    def all_to_all_single(
        self,
        output: Tensor,
        given: Tensor,
        output_sizes: list[int],
        given_sizes: list[int],
        opts: Any,
    ) -> StagedWork:
        staged = _like_on_host(output)
        work = self._gloo.alltoall_base(staged, _to_host(given), output_sizes, given_sizes, opts)
        return StagedWork([work], lambda: _deliver([output], [staged]))

    def _exchange(
        self, received: Tensor, sent: Tensor, received_sizes: list[int], sent_sizes: list[int]
    ) -> Any:  # fmt: skip
        """All-to-all of flat tensors, with the elements for and from each rank."""
        options = dist.AllToAllOptions()
        return self._gloo.alltoall_base(received, sent, received_sizes, sent_sizes, options)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> StagedWork:
        staged = _all_to_host(tensors)
        work = self._gloo.broadcast(staged, opts)
        return StagedWork([work], lambda: _deliver(tensors, staged))

    # Bridge hands out the parts of a base weight over tensor-parallel ranks with a scatter.
    def scatter(
        self, outputs: list[Tensor], given: list[list[Tensor]], opts: Any
    ) -> StagedWork:  # fmt: skip
        staged = _all_like_on_host(outputs)
        # One list of parts on the root, none on the others.
        parts = [_all_to_host(parts) for parts in given]
        work = self._gloo.scatter(staged, parts, opts)
        return StagedWork([work], lambda: _deliver(outputs, staged))

    def gather(self, outputs: list[list[Tensor]], given: list[Tensor], opts: Any) -> StagedWork:
        # One list of tensors on the root, none on the others.
        wanted = outputs[0] if outputs else []
        staged = _all_like_on_host(wanted)
        mine = _all_to_host(given)
        work = self._gloo.gather([staged] if outputs else [], mine, opts)
        return StagedWork([work], lambda: _deliver(wanted, staged))

    def send(self, tensors: list[Tensor], to: int, tag: int) -> StagedWork:
        staged = _all_to_host(tensors)
        work = self._gloo.send(staged, to, tag)
        return StagedWork([work], lambda: None)

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> StagedWork:
        staged = _all_like_on_host(tensors)
        work = self._gloo.recv(staged, source, tag)
        return StagedWork([work], lambda: _deliver(tensors, staged))

    # Names of torch 2.11.
    _allgather_base = all_gather_single  # pyright: ignore
    allgather_into_tensor_coalesced = all_gather_single_coalesced  # pyright: ignore
    _reduce_scatter_base = reduce_scatter_single  # pyright: ignore
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced  # pyright: ignore
    alltoall_base = all_to_all_single  # pyright: ignore


def _to_host(tensor: Tensor) -> Tensor:
    """A contiguous copy in host memory, made now: the caller may write to ``tensor`` afterwards."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _all_to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [_to_host(tensor) for tensor in tensors]


def _like_on_host(tensor: Tensor) -> Tensor:
    """Contiguous host memory for a result of this shape and dtype."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def _all_like_on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [_like_on_host(tensor) for tensor in tensors]


def _deliver(tensors: Sequence[Tensor], staged: Sequence[Tensor], divide: int = 1) -> None:
    """Copy results into the caller's tensors, each divided by ``divide``."""
    for tensor, result in zip(tensors, staged, strict=True):
        if divide > 1:
            result = result / divide
        tensor.detach().copy_(result.view(tensor.shape))


def uneven_all_gather(x: Tensor, group: dist.ProcessGroup, sizes: list[int]) -> Tensor:
    """All-gather on dim 0, CPU tensors over plain gloo, where rank i brings ``sizes[i]`` rows."""
    out = x.new_empty(sum(sizes), *x.shape[1:])
    # An all-to-all in which each rank sends all it has to every rank.
    x = x.contiguous()
    sent = torch.cat([x] * len(sizes))
    dist.all_to_all_single(out, sent, sizes, [x.shape[0]] * len(sizes), group=group)
    return out


def uneven_reduce_scatter(x: Tensor, group: dist.ProcessGroup, sizes: list[int]) -> Tensor:
    """Reduce-scatter on dim 0 where rank i keeps ``sizes[i]`` rows; summed in rank order."""
    mine = sizes[group.rank()]
    # This rank's rows from every rank, one behind the other.
    out = x.new_empty(mine * len(sizes), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), [mine] * len(sizes), sizes, group=group)
    return out.view(len(sizes), mine, *x.shape[1:]).sum(0)
