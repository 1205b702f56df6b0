"""Make process groups from a ``ParallelConfig``; only this reads Megatron's ``parallel_state``."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megalora import host
from megalora.config import ParallelConfig


@dataclass(frozen=True)
class Groups:
    """This rank's process groups.

    tp   tensor parallel of attention and dense layers (also sequence parallel)
    pp   pipeline stages
    cp   ranks that share out the tokens of a row
    dp   replicas of attention and dense parameters that have samples of their own
    dp_cp  all replicas of attention and dense parameters, over which gradients are summed
    ep   ranks that share out the experts
    etp  ranks that share one expert
    edp  replicas of expert parameters
    ends   the first and the last pipeline stage, which both have a tied embedding
    """

    tp: dist.ProcessGroup
    pp: dist.ProcessGroup
    cp: dist.ProcessGroup
    dp: dist.ProcessGroup
    dp_cp: dist.ProcessGroup
    ep: dist.ProcessGroup
    etp: dist.ProcessGroup
    edp: dist.ProcessGroup
    ends: dist.ProcessGroup
    experts_reduce_separately: bool
    """Whether expert parameters have another data-parallel group than the rest (EP > 1, or ETP
    differs from TP)."""

    @property
    def sequence_parallel(self) -> bool:
        """Whether activations between layers are split along the sequence: always with TP."""
        return self.tp.size() > 1

    def named(self, name: str) -> dist.ProcessGroup:
        """The group of a name such as ``edp``, as ``lora/spec.py`` has them."""
        return getattr(self, name)


def init_groups(config: ParallelConfig, seed: int = 0) -> Groups:
    """Divide the initialised world as ``config`` says; raises ``ValueError`` if it does not
    divide."""
    # Raises before Megatron does, whose message names none of the options.
    config.data_parallel_sizes(dist.get_world_size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tp,
        pipeline_model_parallel_size=config.pp,
        context_parallel_size=config.cp,
        # Megatron takes any number as a wish for the interleaved schedule.
        virtual_pipeline_model_parallel_size=config.vpp if config.vpp > 1 else None,
        expert_model_parallel_size=config.ep,
        expert_tensor_parallel_size=config.etp,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=host.timeout_minutes(),  # pyright: ignore[reportArgumentType]
    )
    host.seed_rng(seed, dist.get_rank())
    state: Any = parallel_state
    return Groups(
        tp=state.get_tensor_model_parallel_group(),
        pp=state.get_pipeline_model_parallel_group(),
        cp=state.get_context_parallel_group(),
        dp=state.get_data_parallel_group(),
        dp_cp=state.get_data_parallel_group(with_context_parallel=True),
        ep=state.get_expert_model_parallel_group(),
        etp=state.get_expert_tensor_parallel_group(),
        edp=state.get_expert_data_parallel_group(),
        # On the stages between them a group that they never use.
        ends=state.get_embedding_group(check_initialized=False),
        experts_reduce_separately=config.ep > 1 or config.etp != config.tp,
    )


def megatron_groups() -> ProcessGroupCollection:
    """The same groups in the form Megatron's modules take."""
    return ProcessGroupCollection.use_mpu_process_groups()


@contextmanager
def first_rank_alone() -> Iterator[dist.ProcessGroup | None]:
    """A group of the world's first rank only, over its host; None on the other ranks. Collective
    over the world."""
    group: Any = dist.new_group([0], backend="gloo")
    mine = dist.get_rank() == 0
    try:
        yield group if mine else None
    finally:
        if mine:
            dist.destroy_process_group(group)


@contextmanager
def host_group() -> Iterator[dist.ProcessGroup | None]:
    """A group of the whole world over its hosts, which works beside all others in a thread; None
    for a world of one. Collective over the world."""
    if dist.get_world_size() == 1:
        yield None
        return
    # As long as torch's own default at least: it waits for disks, not for devices.
    minutes = max(30.0, host.timeout_minutes())
    group: Any = dist.new_group(backend="gloo", timeout=timedelta(minutes=minutes))
    yield group
    # Only here: behind an error a thread may still be waiting in it.
    dist.destroy_process_group(group)


def destroy_groups() -> None:
    """Forget all groups, also those that Megatron's own function leaves behind."""
    parallel_state.destroy_model_parallel()
    # A group that something still holds keeps its threads, which would outlive the world.
    for name, value in list(vars(parallel_state).items()):
        if isinstance(value, dist.ProcessGroup):
            setattr(parallel_state, name, None)


@contextmanager
def parallel_groups(config: ParallelConfig, seed: int = 0) -> Iterator[Groups]:
    """The process groups of a layout, for as long as the block runs."""
    try:
        yield init_groups(config, seed)
    finally:
        destroy_groups()
