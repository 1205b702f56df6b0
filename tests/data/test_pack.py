"""Check how the samples of a step are divided over ranks and rows."""

import itertools
import math
import statistics

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megalora.data import pack
from megalora.data.pack import Rows, measure_fill, rows_by_count, rows_by_tokens, token_cost


def samples_of(rows: Rows) -> list[int]:
    """Samples of all ranks and rounds, sorted."""
    found = []
    for rank_rows in rows:
        found.extend(itertools.chain.from_iterable(rank_rows))
    return sorted(found)


def tokens_of(row: list[int], lengths: list[int]) -> int:
    return sum(lengths[i] for i in row)


def cost_of(row: list[int], lengths: list[int]) -> float:
    return sum(token_cost(lengths[i]) for i in row)


@pytest.mark.parametrize("dp", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 3])
def test_rows_by_count_deal_samples_out_in_their_order(dp: int, micro: int) -> None:
    # 24 samples are a multiple of every micro * dp here.
    rows = rows_by_count(24, micro, dp)
    # The rule, sample by sample: k counts samples of a row first, then ranks, then rounds.
    for k in range(24):
        assert rows[(k // micro) % dp][k // (micro * dp)][k % micro] == k
    assert set(map(len, rows)) == {24 // (micro * dp)}


# A prime number of samples, which fits nowhere; rounds of three rows, as an interleaved pipeline
# needs them; one that fits exactly with dp=1, 2 and 4; fewer samples than ranks.
@pytest.mark.parametrize("dp", [1, 2, 4])
@pytest.mark.parametrize(
    ("num_samples", "micro", "multiple"), [(13, 2, 1), (13, 2, 3), (16, 4, 1), (1, 1, 2)]
)
def test_rows_by_count_hold_every_sample_once_in_lockstep(
    num_samples: int, micro: int, multiple: int, dp: int
) -> None:
    rows = rows_by_count(num_samples, micro, dp, multiple)
    # All ranks take part in as many collectives, so all have as many rounds.
    (num_rounds,) = set(map(len, rows))
    assert num_rounds % multiple == 0
    assert max(map(len, itertools.chain.from_iterable(rows))) <= micro
    assert samples_of(rows) == list(range(num_samples))
    # Without its last ``multiple`` rounds a sample would be missing: none is filler alone.
    assert (num_rounds - multiple) * micro * dp < num_samples


@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=60),
    num_ranks=st.sampled_from([1, 2, 3, 8]),
    multiple=st.sampled_from([1, 2, 4]),
    room=st.integers(0, 300),
)
def test_rows_by_tokens_hold_every_sample_once_and_none_overflows(
    lengths: list[int], num_ranks: int, multiple: int, room: int
) -> None:
    capacity = max(lengths) + room
    rows = rows_by_tokens(lengths, capacity, num_ranks, multiple)
    (num_rounds,) = set(map(len, rows))
    assert len(rows) == num_ranks
    assert num_rounds % multiple == 0
    assert samples_of(rows) == list(range(len(lengths)))
    for row in itertools.chain.from_iterable(rows):
        assert tokens_of(row, lengths) <= capacity
        # In the order of the step, so that a row does not depend on how the search went.
        assert row == sorted(row)
    # Never worse than one sample a row.
    enough = math.ceil(math.ceil(len(lengths) / num_ranks) / multiple) * multiple
    assert num_rounds <= enough
    # Deterministic: every rank divides the step by itself.
    assert rows == rows_by_tokens(lengths, capacity, num_ranks, multiple)


def test_rows_of_a_round_are_alike() -> None:
    # Eight long samples and many short ones on two ranks: both get as much of each in a round.
    lengths = [90] * 8 + [10] * 72
    rows = rows_by_tokens(lengths, 100, 2)
    # 1,440 tokens fit 14.4 rows of 100: at least eight rounds of two.
    assert len(rows[0]) == 8
    # Sorted by cost, rows of a round differ by a short sample at most.
    for mine, other in zip(*rows, strict=True):
        difference = cost_of(mine, lengths) - cost_of(other, lengths)
        assert abs(difference) <= token_cost(10) + 1e-9


def test_the_most_expensive_row_is_near_the_mean() -> None:
    # 300 samples of 1 to 300 tokens in rows of 1,000: 45,150 tokens, 48 rows on 8 ranks, which have
    # 941 on average. Best fit alone would fill the first rows to 1,000.
    lengths = list(range(1, 301))
    rows = rows_by_tokens(lengths, 1000, 8)
    assert len(rows[0]) == 6
    fill = measure_fill(rows, lengths, one_length=True)
    assert fill.tokens == sum(lengths)
    assert fill.useful_time > 0.98


def test_a_pipeline_s_longest_row_is_lowered_with_the_most_expensive() -> None:
    # Like GSM8K's: a log-normal of 358 tokens on average, up to 1,080.
    normal = statistics.NormalDist()
    lengths = [round(335 * math.exp(0.37 * normal.inv_cdf((i + 0.5) / 1024))) for i in range(1024)]
    fills = []
    for one_length in (False, True):
        rows = rows_by_tokens(lengths, 2048, 8, one_length=one_length)
        fills.append(measure_fill(rows, lengths, one_length=True))
    even_cost, both = fills
    used = [fill.tokens / fill.slots for fill in fills]
    # Found: 97.5 % of slots where cost alone is even, 98.4 % with lengths; time 99.0 and 98.4 %.
    assert used[0] < 0.976 and used[1] > 0.983
    assert both.useful_time > even_cost.useful_time - 0.007


@given(
    lengths=st.lists(st.integers(1, 10_000), min_size=1, max_size=40),
    num_ranks=st.sampled_from([1, 2, 4]),
)
# Rows of even cost alone take 10,742 here, with even lengths 10,795.
@example(lengths=[300, 2000, 1600, 4000, 5000, 1600], num_ranks=2)
def test_a_search_that_lowers_lengths_costs_no_time(lengths: list[int], num_ranks: int) -> None:
    def time_of(rows: Rows) -> float:
        """Linears on the longest row, and the most attention that a row has."""
        longest = 0
        attention = 0.0
        for row in itertools.chain.from_iterable(rows):
            tokens = tokens_of(row, lengths)
            longest = max(longest, tokens)
            attention = max(attention, cost_of(row, lengths) - tokens)
        return longest + attention

    alone = rows_by_tokens(lengths, 12_000, num_ranks)
    both = rows_by_tokens(lengths, 12_000, num_ranks, one_length=True)
    assert samples_of(both) == list(range(len(lengths)))
    assert len(both[0]) == len(alone[0])
    for row in itertools.chain.from_iterable(both):
        assert tokens_of(row, lengths) <= 12_000
    assert time_of(both) <= time_of(alone) * (1 + 1e-9)


def test_samples_of_over_half_a_row_take_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    # The sum of tokens allows for 513 rounds; each sample needs one of its own. All numbers of
    # rounds in between were once tried, which took 50 s.
    fits = []
    best_fit = pack._best_fit
    monkeypatch.setattr(pack, "_best_fit", lambda *a: fits.append(1) or best_fit(*a))
    rows = rows_by_tokens([2100 + i % 200 for i in range(1024)], 4096, 1)
    assert len(rows[0]) == 1024
    assert len(fits) <= pack.BISECTIONS


def test_rows_of_a_long_evaluation_do_not_take_the_square_of_its_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = 0

    class Watched(pack._Row):
        def __getattribute__(self, name: str) -> object:
            nonlocal looks
            looks += name == "tokens"
            return super().__getattribute__(name)

    monkeypatch.setattr(pack, "_Row", Watched)
    # Samples of 1 to 4,000 tokens. Found: 474 looks at a row's tokens for each sample; 2,268 where
    # all rows are asked for room, and twice as many with twice the samples.
    lengths = [1 + i * 7919 % 4000 for i in range(4000)]
    rows = rows_by_tokens(lengths, 4096, 1)
    assert looks < 1000 * len(lengths)
    # Best fit decreasing leaves 1 % of the slots empty at most.
    assert len(rows[0]) < sum(lengths) / 4096 * 1.01


def test_a_row_ends_at_its_last_token() -> None:
    # Two documents of 1,000 cost less than one of 2,000, so that tokens alone close the row.
    assert rows_by_tokens([1000, 1000], 2000, 1) == [[[0, 1]]]
    assert rows_by_tokens([1001, 1000], 2000, 1) == [[[0], [1]]]


@given(lengths=st.lists(st.integers(1, 100), min_size=4, max_size=60))
def test_rounds_come_in_falling_order_of_cost(lengths: list[int]) -> None:
    rows = rows_by_tokens(lengths, 100, 2)
    costs = []
    for of_round in zip(*rows, strict=True):
        for row in of_round:
            costs.append(cost_of(row, lengths))
    assert costs == sorted(costs, reverse=True)


def test_a_sample_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="a sample of 101 tokens does not fit a row of 100"):
        rows_by_tokens([5, 101], 100, 2)


def test_slots_are_counted_as_ranks_times_the_longest_row() -> None:
    lengths = [5, 3, 4, 4, 6]
    # [rank][round]: rank 0 has rows of 5 and 7 tokens, rank 1 of 4 and 6.
    rows = [[[0], [1, 2]], [[3], [4]]]
    fill = measure_fill(rows, lengths)
    assert fill.tokens == 22
    assert fill.slots == 2 * (5 + 7)
    # Every row of a step that passes through a pipeline takes the time of its longest.
    assert measure_fill(rows, lengths, one_length=True).slots == 2 * (7 + 7)
    # What is computed is each row's own: nothing is filled but what cuts them needs.
    assert fill.run == 22
    assert measure_fill(rows, lengths, one_length=True).run == 22
    # Interleaved, each rank's rows are as long as its own longest, of 7 and of 6.
    padded = measure_fill(rows, lengths, one_length=True, padded=True, cost=float)
    assert padded.run == 2 * 7 + 2 * 6
    assert padded.slots == 4 * 7
    # The filler of rank 0's first row takes time, and its rows of 7 hold up the others.
    assert padded.useful_time == pytest.approx(22 / 28)
    # Rows of 5 and 7 are rounded up to 8 each.
    rounded = measure_fill(rows, lengths, multiple_of=4)
    assert rounded.slots == 2 * (8 + 8)
    assert rounded.run == 8 + 8 + 4 + 8
    # Time by a cost that is the length itself: 22 of 24.
    assert measure_fill(rows, lengths, cost=float).useful_time == pytest.approx(22 / 24)
