"""Sizes of one microbatch on one rank, from which bytes and work are counted."""

import math
from dataclasses import dataclass

from megalora.planner.layouts import ParallelLayout, Workload
from megalora.planner.weights import PlannedModel

STATISTIC = 4
"""Bytes of a float32: a norm's rms, a log-sum-exp, a probability."""
INT = 4
"""Bytes of an int32 index."""


@dataclass(frozen=True)
class Microbatch:
    """Sizes of one microbatch on one rank, in elements."""

    samples: int
    """B: documents of the row."""
    sequence: int
    """S: tokens of each."""
    row_tokens: int
    """c T: the row, filled up to a multiple of what cuts it. Attention gathers its keys and
    values."""
    tokens: int
    """T: this rank's part of the row."""
    own_tokens: int
    """T / t: between attention and experts each rank holds its part of the sequence."""
    rows: int
    """M: rows of this rank's experts."""
    element_bytes: int
    """e: bytes of a weight or an activation."""

    @classmethod
    def of(cls, model: PlannedModel, layout: ParallelLayout, work: Workload) -> "Microbatch":
        p = layout.parallel
        samples = layout.micro_batch_size
        row = samples * work.sequence_length
        row += -row % p.row_multiple
        tokens = row // p.cp
        own = tokens // p.tp
        # Each token goes to k experts. ETP ranks hold slices of the same experts, so each of them
        # needs the rows of all: n times as many.
        rows = own * model.shape.top_k * p.etp
        # A rank that holds every expert gets the same number of rows, however uneven the routing.
        if p.ep > 1:
            rows = math.ceil(rows * work.imbalance)
        return cls(samples, work.sequence_length, row, tokens, own, rows, work.element_bytes)
