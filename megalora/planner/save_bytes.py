"""Count what saving takes: host memory that a rank keeps, bytes that go to disk, and seconds.

A rank copies what it owns to host memory (``train/checkpoint/snapshot.py``), in two buffers that
take turns. Of P_o elements that it owns, and F frozen ones that it saves, with e bytes an element:

    buffer = 12 P_o + e F            float32 masters and two moments; frozen factors
           + e P_o                   the adapter at the run's start, where that is kept
           + 4 (P_o + F)             the average, likewise
           + states of generators

Of replicas the first saves, so this is the first rank of a stage; no other one has more. All ranks
together write every element once, and the first one the adapter's file.

Snapshots in memory (``checkpoint.snapshots``) take one buffer more, and two slots of the launcher;
with replicas on another node four, and two for a rank of the node before.
"""

from dataclasses import dataclass, replace

from megalora.config import ParallelConfig
from megalora.planner.adapter_count import adapter_parameters
from megalora.planner.layouts import ParallelLayout
from megalora.planner.microbatch import STATISTIC
from megalora.planner.state_bytes import STATE, frozen_elements, kept_elements, owned_elements
from megalora.planner.weights import Chunk, PlannedModel, stage_chunks
from megalora.planner.workload import Workload

BUFFERS = 2
"""Snapshots of a rank: one is filled while the other is written."""
SLOTS = 2
"""Of the launcher for each rank (``train/warm/memory.py``): one is whole while the other is
written."""
REPLICA_SLOTS = 4 + 2
"""The same where nodes hold replicas (``train/warm/rounds.py``): two slots more for the replicas
under way, and two for a rank of the node before."""
CPU_GENERATOR = 5056
"""Bytes of the state of a generator on the CPU, and of each of Megatron's there."""
GPU_GENERATOR = 16
TRACKED = 3
"""Generators that Megatron seeds for dropout."""
DISK_BYTES_PER_S = 1e9
"""Rate of the disk that all ranks write to together; an assumption."""
COPY_BYTES_PER_S = 25e9
"""Rate at which a GPU's memory is copied to page-locked host memory; an assumption."""


@dataclass(frozen=True)
class SavePlan:
    """What saving takes."""

    buffer_bytes: int
    """One snapshot of the rank with the largest one."""
    host_bytes: int
    """Host memory that it keeps for its snapshots."""
    disk_bytes: int
    """A checkpoint's tensors."""
    memory_bytes: int = 0
    """Host memory for a rank's snapshots in memory, beside ``host_bytes``; 0 without them."""
    slots: int = SLOTS
    """Snapshots in it that the launcher holds."""

    @property
    def copy_s(self) -> float:
        """Seconds for which the loop stands still."""
        return self.buffer_bytes / COPY_BYTES_PER_S

    @property
    def disk_s(self) -> float:
        """Seconds until files are written, while training goes on."""
        return self.disk_bytes / DISK_BYTES_PER_S

    def line(self) -> str:
        """For the user."""
        in_memory = ""
        if self.memory_bytes:
            in_memory = (
                f". checkpoint.snapshots takes {self.memory_bytes / 1e9:,.3f} GB more of a rank's"
                f" host memory: a buffer, and {self.slots} slots of the launcher"
            )
        return (
            f"host memory of a rank for checkpoints: {self.host_bytes / 1e9:,.3f} GB, {BUFFERS}"
            f" snapshots of {self.buffer_bytes / 1e9:,.3f} GB, page-locked in powers of two. A"
            " checkpoint has"
            f" {self.disk_bytes / 1e9:,.2f} GB of tensors: {self.disk_s:,.1f} s in the background"
            f" at {DISK_BYTES_PER_S / 1e9:g} GB/s to disk, for which the loop stands still"
            f" {self.copy_s:,.3f} s at {COPY_BYTES_PER_S / 1e9:g} GB/s to host memory (rates"
            f" assumed){in_memory}"
        )


def save_plan(model: PlannedModel, layout: ParallelLayout, work: Workload) -> SavePlan:
    """What a run of this layout needs to save its checkpoints."""
    stages = range(layout.parallel.pp)
    buffer = max(snapshot_bytes(model, layout, work, stage) for stage in stages)
    kept = _kept_bytes(buffer, work)
    slots = REPLICA_SLOTS if work.has_replicas else SLOTS
    in_memory = kept + slots * buffer if work.has_snapshots else 0
    return SavePlan(buffer, BUFFERS * kept, checkpoint_bytes(model, work), in_memory, slots)


def snapshot_bytes(model: PlannedModel, layout: ParallelLayout, work: Workload, stage: int) -> int:
    """Bytes of one snapshot of the first rank of a stage. With parameters shared out over
    data-parallel ranks, an upper bound: a share may be partly padding."""
    p = layout.parallel
    chunks = stage_chunks(model, p, stage)
    owned = 0
    for chunk in chunks:
        count = adapter_parameters(model, p, chunk)
        # A tied embedding's copy on the last stage is saved by the first.
        if stage > 0:
            count = replace(count, tied=0)
        owned += sum(owned_elements(count, layout))
    frozen = frozen_elements(model, p, chunks)
    return _state_bytes(owned, frozen, work) + generator_bytes(on_cpu=work.on_cpu)


def checkpoint_bytes(model: PlannedModel, work: Workload) -> int:
    """Bytes of all tensors of a checkpoint: every rank's file, but for generators, and PEFT's."""
    alone = ParallelConfig()
    chunks: list[Chunk] = stage_chunks(model, alone, 0)
    trained = sum(adapter_parameters(model, alone, chunk).elements for chunk in chunks)
    frozen = frozen_elements(model, alone, chunks)
    # A checkpoint's adapter is the sum of all cycles.
    adapter = (trained + frozen + kept_elements(model, alone, chunks)) * work.element_bytes
    files = 2 if work.averaged else 1
    return _state_bytes(trained, frozen, work) + files * adapter


def _state_bytes(owned: int, frozen: int, work: Workload) -> int:
    e = work.element_bytes
    total = 3 * STATE * owned + e * frozen
    if work.holds_start:
        total += e * owned
    if work.averaged:
        total += STATISTIC * (owned + frozen)
    return total


def generator_bytes(*, on_cpu: bool) -> int:
    """Bytes of the states of a rank's generators."""
    if on_cpu:
        return (1 + TRACKED) * CPU_GENERATOR
    return CPU_GENERATOR + (1 + TRACKED) * GPU_GENERATOR


def _kept_bytes(buffer: int, work: Workload) -> int:
    """Host memory of one buffer: torch takes page-locked memory in powers of two."""
    return buffer if work.on_cpu else 1 << (buffer - 1).bit_length()
