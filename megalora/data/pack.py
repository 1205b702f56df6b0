"""Divide the samples of a global batch over ranks and rows.

A row is one microbatch: whole samples, one after another. Which samples a step trains on is decided
before (``order.py``), so that loss and gradient of a step do not depend on how they share rows.

    rows[rank][round]    numbers of the samples of one row

Every rank has the same number of rounds, because ranks meet in every MoE layer: expert parallelism
spans data parallelism.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Rows = list[list[list[int]]]
"""[rank][round] -> numbers of samples."""

EVEN_TOKENS = 8800
"""Length at which attention to earlier tokens costs a token as much as all linears, forward and
backward: 4 * 3.0e9 FLOPs a token against 7 * heads * head_dim * n * layers, for Qwen3-30B-A3B with
4,096 features of heads and 48 layers. Other models differ by a factor of two, which changes the
balance of rows little."""


def token_cost(length: int) -> float:
    """Time of a sample, in that of one token among its linears."""
    return length + length * length / EVEN_TOKENS


def rows_by_count(
    num_samples: int, micro_batch_size: int, num_ranks: int, multiple: int = 1
) -> Rows:
    """Rows of ``micro_batch_size`` samples in their order; the last ones may have fewer, or none.

    Sample k goes to round k // (size * ranks) of rank (k // size) % ranks.

    Args:
        num_ranks: data-parallel ranks.
        multiple: the number of rounds is rounded up to it (pipeline stages, for the interleaved
            schedule).
    """
    per_round = micro_batch_size * num_ranks * multiple
    num_rounds = max(1, -(-num_samples // per_round)) * multiple
    rows: Rows = [[] for _ in range(num_ranks)]
    for number in range(num_rounds):
        for rank in range(num_ranks):
            first = (number * num_ranks + rank) * micro_batch_size
            last = min(first + micro_batch_size, num_samples)
            rows[rank].append(list(range(first, last)))
    return rows


def rows_by_tokens(
    lengths: Sequence[int], capacity: int, num_ranks: int, multiple: int = 1,
    cost: Callable[[int], float] = token_cost,
) -> Rows:  # fmt: skip
    """Rows of at most ``capacity`` tokens, in the fewest rounds that a greedy search finds.

    What counts is the sum over rounds of the round's most expensive row. Rows are filled longest
    sample first, each into the cheapest row with room; then they are sorted by cost, so that those
    of one round are alike.

    Args:
        lengths: tokens of each sample.
        num_ranks, multiple: as in ``rows_by_count``.
        cost: of a sample, by its length.
    Raises:
        ValueError: a sample is longer than a row.
    """
    longest = max(lengths, default=0)
    if longest > capacity:
        raise ValueError(f"a sample of {longest:,} tokens does not fit a row of {capacity:,}")
    # At least as many as if samples could be cut.
    rounds = max(1, -(-sum(lengths) // (capacity * num_ranks)))
    filled = None
    while filled is None:
        rounds += -rounds % multiple
        filled = _fill(lengths, rounds * num_ranks, capacity, cost)
        rounds += 1
    return _dealt(filled, num_ranks)


@dataclass
class _Row:
    """A row while it is filled."""

    samples: list[int]
    tokens: int
    cost: float


def _fill(
    lengths: Sequence[int], num_rows: int, capacity: int, cost: Callable[[int], float]
) -> list[_Row] | None:
    """Put every sample into a row; None where one finds no room."""
    rows = [_Row([], 0, 0.0) for _ in range(num_rows)]
    # (cost so far, number of the row): ties go to the first row, the same on every rank.
    cheapest = [(0.0, number) for number in range(num_rows)]
    for sample in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        passed = []
        while cheapest and rows[cheapest[0][1]].tokens + lengths[sample] > capacity:
            passed.append(heapq.heappop(cheapest))
        if not cheapest:
            return None
        _, number = heapq.heappop(cheapest)
        row = rows[number]
        row.samples.append(sample)
        row.tokens += lengths[sample]
        row.cost += cost(lengths[sample])
        heapq.heappush(cheapest, (row.cost, number))
        # A row without room for this sample may have some for a shorter one.
        for entry in passed:
            heapq.heappush(cheapest, entry)
    return rows


def _dealt(rows: list[_Row], num_ranks: int) -> Rows:
    """Rows in descending order of cost, dealt out to the ranks like cards."""
    for row in rows:
        row.samples.sort()
    rows.sort(key=lambda row: (-row.cost, row.samples[:1]))
    dealt: Rows = []
    for rank in range(num_ranks):
        dealt.append([row.samples for row in rows[rank::num_ranks]])
    return dealt


@dataclass(frozen=True)
class Fill:
    """How well the rows of a step are filled."""

    tokens: int
    """Tokens of all samples."""
    slots: int
    """Ranks x longest row, summed over rounds; a pipeline's rounds all have the longest row of
    the step."""
    useful_time: float
    """Cost of all samples over ranks x cost of the most expensive row, summed over rounds."""


def measure_fill(
    rows: Rows, lengths: Sequence[int], *, one_length: bool = False, multiple_of: int = 1,
    cost: Callable[[int], float] = token_cost,
) -> Fill:  # fmt: skip
    """Count the slots that the rows of a step take, and what of them is used.

    Args:
        lengths: tokens of each sample.
        one_length: whether all rows of the step are as long as the longest (pipeline stages work on
            different rounds at a time, so that a long row holds up all of them).
        multiple_of: what the length of a row is rounded up to.
    """
    num_ranks = len(rows)
    longest_of_round = []
    slowest_of_round = []
    tokens = 0
    spent = 0.0
    for round_rows in zip(*rows, strict=True):
        row_tokens = []
        row_costs = []
        for row in round_rows:
            row_tokens.append(sum(lengths[i] for i in row))
            row_costs.append(sum(cost(lengths[i]) for i in row))
        tokens += sum(row_tokens)
        spent += sum(row_costs)
        # A row without samples is one of filler.
        longest = max(1, *row_tokens)
        longest_of_round.append(-(-longest // multiple_of) * multiple_of)
        slowest_of_round.append(max(row_costs))
    if one_length:
        longest_of_round = [max(longest_of_round)] * len(longest_of_round)
        slowest_of_round = [max(slowest_of_round)] * len(slowest_of_round)
    slots = num_ranks * sum(longest_of_round)
    paid = num_ranks * sum(slowest_of_round)
    return Fill(tokens, slots, spent / paid if paid else 0.0)
