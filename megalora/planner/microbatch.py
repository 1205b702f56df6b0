"""Sizes of one microbatch on one rank, from which bytes and work are counted."""

import math
from dataclasses import dataclass

from megalora.config import ParallelConfig
from megalora.planner.layouts import ParallelLayout
from megalora.planner.weights import PlannedModel
from megalora.planner.workload import Workload

STATISTIC = 4
"""Bytes of a float32: a norm's rms, a log-sum-exp, a probability."""
INT = 4
"""Bytes of an int32 index."""
PAIR = 8
"""Bytes that travel beside the rows for each pair of token and expert: a float32 probability and
an int32 place."""


@dataclass(frozen=True)
class Microbatch:
    """Sizes of one microbatch on one rank, in elements."""

    samples: float
    """B: documents of the row."""
    sequence: float
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
    sent: int
    """Rows that this rank sends: a token once to each rank that has experts of it."""
    received: int
    """N: rows that this rank's experts gather theirs from."""
    element_bytes: int
    """e: bytes of a weight or an activation."""
    mask_bytes: int
    """Bytes of an element of a dropout mask: torch's fused kernel keeps booleans, its form for the
    CPU a factor in the activations' dtype."""
    balanced: bool = False
    """Whether routing adds to the loss."""

    def dropped(self, elements: int, live: bool) -> int:
        """Bytes that dropout before an A keeps: the dropped-out copy, for the gradient of A, and
        the mask, where the input needs a gradient (``live``)."""
        return elements * (self.element_bytes + live * self.mask_bytes)

    @classmethod
    def of(
        cls, model: PlannedModel, layout: ParallelLayout, work: Workload, typical: bool = False
    ) -> "Microbatch":
        """A full row, which decides about memory, or a ``typical`` one, by which time is counted.
        Its samples are of full length, or packed ones taken for equal."""
        p = layout.parallel
        row = layout.capacity(work)
        sequence = float(work.sequence_length)
        if typical and work.packing is not None:
            row = round(layout.use(work).row_tokens)
            sequence = work.packing.attended
        key = ("batch", p.tp, p.cp, p.ep, p.etp, row, sequence, work)
        if key not in model.memo:
            model.memo[key] = cls._of_row(model, p, work, row, sequence)
        return model.memo[key]

    @classmethod
    def _of_row(
        cls, model: PlannedModel, p: ParallelConfig, work: Workload, row: int, sequence: float
    ) -> "Microbatch":
        """Sizes of a row of so many tokens, in documents of ``sequence``."""
        samples = row / sequence
        row += -row % p.row_multiple
        tokens = row // p.cp
        own = tokens // p.tp
        # Each token goes to k experts. ETP ranks hold slices of the same experts, so each of them
        # needs the rows of all: n times as many.
        rows = own * model.shape.top_k * p.etp
        sent = own
        received = own * p.etp
        # A rank that holds every expert gets the same number of rows, however uneven the routing.
        if p.ep > 1:
            rows = math.ceil(rows * work.imbalance)
            spread = work.ranks_per_token
            if spread is None:
                spread = ranks_per_token(model.shape.num_experts, model.shape.top_k, p.ep)
            sent = round(own * spread)
            # No rank receives a token twice.
            received = min(math.ceil(sent * p.etp * work.imbalance), own * p.etp * p.ep)
        return cls(
            samples, sequence, row, tokens, own, rows, sent, received,
            work.element_bytes, work.element_bytes if work.on_cpu else 1, work.balanced,
        )  # fmt: skip


def ranks_per_token(num_experts: int, top_k: int, ep: int) -> float:
    """Ranks that have experts of a token, on average, if every choice of k experts is as likely:
    ``ep (1 - C(E - E / ep, k) / C(E, k))``."""
    elsewhere = num_experts - num_experts // ep
    missed = math.comb(elsewhere, top_k) / math.comb(num_experts, top_k)
    return ep * (1 - missed)
