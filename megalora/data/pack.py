"""Divide the samples of a global batch over ranks and rows.

A row is one microbatch: whole samples, one after another. Which samples a step trains on is decided
before (``order.py``), so that loss and gradient of a step do not depend on how they share rows.

    rows[rank][round]    numbers of the samples of one row

Every rank has the same number of rounds, because ranks meet in every MoE layer: expert parallelism
spans data parallelism.
"""

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Rows = list[list[list[int]]]
"""[rank][round] -> numbers of samples."""

EVEN_TOKENS = 8800
"""Length at which attention to earlier tokens costs a token as much as all linears, forward and
backward: 4 * 3.0e9 FLOPs a token against 7 * heads * head_dim * n * layers, for Qwen3-30B-A3B with
4,096 features of heads and 48 layers. Other models differ by a factor of two, which changes the
balance of rows little."""

BISECTIONS = 10
"""Steps in which the largest row is lowered towards the mean: to a thousandth of their
difference."""

PLACES = 128
"""Rows with room for a sample's cost that are asked for room for its tokens. To ask all of them
took time with the square of the samples: 10 s for 8,192, now 1 s."""


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
    # All ranks run as many rounds: one without samples left has rows of filler.
    per_round = micro_batch_size * num_ranks * multiple
    num_rounds = max(1, math.ceil(num_samples / per_round)) * multiple
    rows: Rows = [[] for _ in range(num_ranks)]
    for number in range(num_rounds):
        for rank in range(num_ranks):
            first = (number * num_ranks + rank) * micro_batch_size
            last = min(first + micro_batch_size, num_samples)
            rows[rank].append(list(range(first, last)))
    return rows


def rows_by_tokens(
    lengths: Sequence[int], capacity: int, num_ranks: int, multiple: int = 1, *,
    one_length: bool = False, cost: Callable[[int], float] = token_cost,
) -> Rows:  # fmt: skip
    """Rows of at most ``capacity`` tokens, in the fewest rounds that best fit decreasing finds.

    What counts is the sum over rounds of the round's most expensive row. Of that many rows the most
    expensive one is then made as cheap as bisection finds (MULTIFIT: Coffman, Garey and Johnson,
    1978), and rows are sorted by cost, so that those of one round are alike.

    Where all rows count as the longest of the step, a second search lowers the longest row along
    with the most expensive one. A few long samples cost as much as many short ones of more tokens,
    so that rows even in cost alone differ in length. 1,024 samples take 10 to 90 ms.

    Args:
        lengths: tokens of each sample.
        num_ranks, multiple: as in ``rows_by_count``.
        one_length: whether all rows count as the longest (``measure_fill``).
        cost: of a sample, by its length; grows with it.
    Raises:
        ValueError: a sample is longer than a row.
    """
    longest = max(lengths, default=0)
    if longest > capacity:
        raise ValueError(f"a sample of {longest:,} tokens does not fit a row of {capacity:,}")
    samples = _Samples.of(lengths, cost)
    # No loop over numbers of rounds: with samples of just over half a row it would take hundreds.
    fitted = _fewest(samples, capacity)
    rounds = max(1, math.ceil(len(fitted) / num_ranks))
    num_rows = math.ceil(rounds / multiple) * multiple * num_ranks
    fitted += [_Row([], 0, 0.0) for _ in range(num_rows - len(fitted))]
    rows = _evened(fitted, samples, capacity)
    if one_length:
        both = _evened(fitted, samples, capacity, lengths_too=True)
        # Ties go to rows of even cost. With long samples attention decides, and they often win.
        rows = min(rows, both, key=_longest_time)
    return _dealt(rows, num_ranks)


@dataclass(frozen=True)
class _Samples:
    """The samples of a step, longest first."""

    order: list[int]
    lengths: Sequence[int]
    costs: list[float]

    @classmethod
    def of(cls, lengths: Sequence[int], cost: Callable[[int], float]) -> "_Samples":
        # Ties go by the place in the step: the same on every rank.
        order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
        return cls(order, lengths, [cost(length) for length in lengths])


@dataclass
class _Row:
    """A row while it is filled."""

    samples: list[int]
    tokens: int
    cost: float

    def add(self, sample: int, samples: _Samples) -> None:
        self.samples.append(sample)
        self.tokens += samples.lengths[sample]
        self.cost += samples.costs[sample]


def _fewest(samples: _Samples, capacity: int) -> list[_Row]:
    """Put every sample into the row with the fewest free tokens that has room, a new one where none
    has."""
    rows: list[_Row] = []
    # (free tokens, number of the row), ascending
    free: list[tuple[int, int]] = []
    for sample in samples.order:
        length = samples.lengths[sample]
        place = bisect.bisect_left(free, (length, -1))
        if place == len(free):
            free.append((capacity, len(rows)))
            rows.append(_Row([], 0, 0.0))
        room, number = free.pop(place)
        rows[number].add(sample, samples)
        bisect.insort(free, (room - length, number))
    return rows


def _best_fit(samples: _Samples, num_rows: int, capacity: int, limit: float) -> list[_Row] | None:
    """Put every sample into the row that it brings nearest to ``limit``; None where one finds no
    room.

    Args:
        limit: most that a row may cost.
    """
    rows = [_Row([], 0, 0.0) for _ in range(num_rows)]
    # (cost of which the row still has room, number of the row), ascending
    rooms = [(limit, number) for number in range(num_rows)]
    for sample in samples.order:
        cost = samples.costs[sample]
        length = samples.lengths[sample]
        place = bisect.bisect_left(rooms, (cost, -1))
        last = min(place + PLACES, num_rows)
        # Short samples are cheap: a row may have room for their cost, but not for their tokens.
        while place < last and rows[rooms[place][1]].tokens + length > capacity:
            place += 1
        if place == last:
            # None of the nearest: the row with the most room, if it has enough.
            place = num_rows - 1
            room, number = rooms[place]
            if room < cost or rows[number].tokens > capacity - length:
                return None
        room, number = rooms.pop(place)
        rows[number].add(sample, samples)
        bisect.insort(rooms, (room - cost, number))
    return rows


def _evened(
    rows: list[_Row], samples: _Samples, capacity: int, *, lengths_too: bool = False
) -> list[_Row]:
    """As many rows of the same samples, of which the most expensive one is cheaper if possible.

    Args:
        lengths_too: lower the longest row as well, to the same excess over its mean.
    """
    mean_cost = sum(samples.costs) / len(rows)
    mean_tokens = sum(samples.lengths) / len(rows)
    if mean_cost == 0:
        return rows

    def excess(found: list[_Row]) -> float:
        """What the largest row has over the mean, as a share of the mean."""
        cost = max(row.cost for row in found) / mean_cost
        if lengths_too:
            cost = max(cost, max(row.tokens for row in found) / mean_tokens)
        return cost - 1

    # No arrangement can beat the mean.
    least = 0.0
    most = excess(rows)
    best = rows
    for _ in range(BISECTIONS):
        share = (least + most) / 2
        room = capacity
        if lengths_too:
            room = min(capacity, int(mean_tokens * (1 + share)))
        found = _best_fit(samples, len(rows), room, mean_cost * (1 + share))
        if found is None:
            least = share
        else:
            best = found
            most = excess(found)
    return best


def _longest_time(rows: list[_Row]) -> float:
    """Time of the longest row, were its attention that of the row with the most: linears run on all
    slots of a row, attention on its documents alone."""
    longest = max(row.tokens for row in rows)
    return longest + max(row.cost - row.tokens for row in rows)


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
    the step. Places that ranks compute or wait for: all of them meet in every MoE layer."""
    run: int
    """Tokens that the model is run on, filler included."""
    useful_time: float
    """Cost of all samples over ranks x cost of the most expensive row, summed over rounds."""


def measure_fill(
    rows: Rows, lengths: Sequence[int], *, one_length: bool = False, padded: bool = False,
    multiple_of: int = 1, cost: Callable[[int], float] = token_cost,
) -> Fill:  # fmt: skip
    """Count the slots that the rows of a step take, and what of them is used.

    Args:
        lengths: tokens of each sample.
        one_length: whether all rows of the step count as the longest (pipeline stages work on
            different rounds at a time, so that a long row holds up all of them).
        padded: whether every rank fills its rows up to its own longest (interleaved pipeline
            stages); else a row without samples alone has filler.
        multiple_of: what the length of a row is rounded up to.
    """
    num_ranks = len(rows)
    num_rounds = len(rows[0])
    tokens = 0
    run = 0
    spent = 0.0
    longest_of_round = [0] * num_rounds
    slowest_of_round = [0.0] * num_rounds
    for of_rank in rows:
        assert len(of_rank) == num_rounds, "ranks meet in every round"
        row_tokens = [sum(lengths[i] for i in row) for row in of_rank]
        row_costs = [sum(cost(lengths[i]) for i in row) for row in of_rank]
        tokens += sum(row_tokens)
        spent += sum(row_costs)
        # A row without samples is one token of filler.
        slots = [math.ceil(max(1, held) / multiple_of) * multiple_of for held in row_tokens]
        if padded:
            slots = [max(slots)] * num_rounds
        run += sum(slots)
        for i in range(num_rounds):
            longest_of_round[i] = max(longest_of_round[i], slots[i])
            # Filler is in short documents, which cost linears alone. What rounds a row up is little
            # and left out.
            filler = slots[i] - row_tokens[i] if padded else 0
            slowest_of_round[i] = max(slowest_of_round[i], row_costs[i] + filler)
    if one_length:
        longest_of_round = [max(longest_of_round)] * num_rounds
        slowest_of_round = [max(slowest_of_round)] * num_rounds
    paid = num_ranks * sum(slowest_of_round)
    return Fill(tokens, num_ranks * sum(longest_of_round), run, spent / paid if paid else 0.0)
