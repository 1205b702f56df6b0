"""Say what a step trains on, whatever the layout."""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal

from megalora.config import RunConfig
from megalora.config.checks import require
from megalora.model.held import Held
from megalora.planner.crossings import NO_TABLE, Crossings
from megalora.planner.packing import Packing
from megalora.planner.teacher import PlannedTeacher, teacher_of


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The training of a model, whatever the layout."""

    sequence_length: int
    """Tokens per sequence: the longest, which decides whether memory suffices."""
    global_batch_size: int
    """Samples per optimizer step."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of weights, adapters and activations."""
    imbalance: float = 1.0
    """Rows of the fullest expert-parallel rank over the mean. Assumed: only routing knows."""
    ranks_per_token: float | None = None
    """Expert-parallel ranks that have experts of a token, on average. None: as many as if a token
    chose among all experts alike."""
    sequences: int = 1
    """Sequences of a sample: 2 where it is a pair of answers."""
    references: int = 0
    """Passes without gradients in a step, before its own."""
    balanced: bool = False
    """Whether a loss keeps experts evenly used."""
    holds_start: bool = False
    """Whether the adapter that the run began with is kept beside the one in training."""
    asks_base: bool = False
    """Whether steps have passes of the base, for which the base's own values of what is trained
    whole are kept."""
    averaged: bool = False
    """Whether a moving average of the adapter is kept in float32."""
    has_snapshots: bool = False
    """Whether snapshots are held in memory (``checkpoint.snapshots``)."""
    has_replicas: bool = False
    """Whether another node holds them, too (``checkpoint.snapshots.replicate``)."""
    teacher: PlannedTeacher | None = None
    """Whose next-token distributions are learned."""
    packing: Packing | None = None
    """Lengths of the samples, which are then packed; None: all are of full length."""
    crossings: Crossings = NO_TABLE
    """From how many rows per expert the GPU runs experts on torch's grouped GEMM, with adapters
    beside the weights."""
    held: Held | None = None
    """Weights that stay codes in memory; None: all lie there in ``dtype``."""
    on_cpu: bool = False
    """Whether ranks compute on the CPU, where a dropout mask is as wide as an activation."""

    @cached_property
    def _hash(self) -> int:
        # A search looks up millions of results by the workload, among other keys, and hashing all
        # fields each time was a tenth of it.
        return hash(tuple(getattr(self, one.name) for one in fields(self)))

    def __hash__(self) -> int:
        return self._hash

    def __post_init__(self) -> None:
        require(
            self.sequence_length >= 2,
            f"a sample needs at least 2 tokens, got {self.sequence_length}",
        )
        require(
            self.global_batch_size >= 1,
            f"a step needs at least 1 sample, got {self.global_batch_size}",
        )
        require(
            self.imbalance >= 1,
            f"imbalance is the fullest over the mean, so at least 1, got {self.imbalance}",
        )

    @classmethod
    def of(cls, config: RunConfig, imbalance: float = 1.0) -> "Workload":
        """The workload of a run's config."""
        return cls(
            sequence_length=config.data.max_length,
            global_batch_size=config.train.global_batch_size,
            dtype=config.model.dtype,
            imbalance=imbalance,
            sequences=config.objective.sequences,
            references=config.objective.num_references,
            balanced=config.train.router_aux_loss_coef > 0,
            holds_start=config.objective.holds_start,
            asks_base=config.objective.asks_base,
            averaged=config.train.ema_decay > 0,
            has_snapshots=config.checkpoint.snapshots is not None,
            has_replicas=bool(
                config.checkpoint.snapshots and config.checkpoint.snapshots.replicate
            ),
            teacher=teacher_of(config.objective),
        )

    @property
    def sample_tokens(self) -> int:
        """Tokens of the longest sample."""
        return self.sequences * self.sequence_length

    @property
    def called(self) -> str:
        """What a sample is, in the plural."""
        return "pairs" if self.sequences > 1 else "samples"

    @property
    def in_words(self) -> str:
        """What a step trains on."""
        batch = f"{self.global_batch_size:,}"
        if self.sequences > 1:
            return f"{batch} pairs of sequences of {self.sequence_length:,} tokens a step"
        return f"{batch} samples of {self.sequence_length:,} tokens a step"

    @property
    def element_bytes(self) -> int:
        return 2 if self.dtype == "bfloat16" else 4
