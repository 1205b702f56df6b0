"""Check which tokens of a row a rank holds, and what its attention computes of them, against plain
attention with an explicit mask in float64."""

import math
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor

from megalora.model.attention import (
    CUDNN_FROM,
    CUDNN_MULTIPLE,
    MAX_FILLER,
    attend_reference,
    suits_cudnn,
)
from megalora.model.documents import Chunk, local_chunks, positions_of, unzigzag, zigzag

# Documents that end inside, at the end of, and before a chunk's first token; one of a single token;
# one document alone; documents of one size, which are computed in one call.
ROWS = [(5, 1, 10), (16,), (8, 8), (4, 4, 4, 4), (1, 15), (3, 6, 2, 5)]
SIZES = [1, 2, 4]


def ends_of(lengths: tuple[int, ...]) -> tuple[int, ...]:
    return (0, *accumulate(lengths))


@pytest.mark.parametrize("lengths", ROWS)
@pytest.mark.parametrize("size", SIZES)
def test_parts_of_a_row_are_the_row(lengths: tuple[int, ...], size: int) -> None:
    row = torch.arange(16)
    parts = [zigzag(row, rank, size) for rank in range(size)]
    assert torch.equal(unzigzag(torch.cat(parts), size), row)
    # A rank's chunks say which part it is.
    for rank, part in enumerate(parts):
        places = []
        for chunk in local_chunks(ends_of(lengths), rank, size):
            places.extend(range(chunk.start, chunk.stop))
        assert part.tolist() == places


def test_positions_start_anew_in_every_document() -> None:
    assert positions_of((0, 3, 4, 6)).tolist() == [0, 1, 2, 0, 0, 1]


def test_an_early_chunk_comes_with_a_late_one() -> None:
    # Rank 0 of 2 holds chunks 0 and 3. The second begins inside the document that starts at 5.
    assert local_chunks((0, 5, 16), 0, 2) == (
        Chunk(0, 4, 0, (0, 4), (0, 4)),
        Chunk(12, 16, 5, (0, 4), (0, 11)),
    )
    # Rank 1 holds chunks 1 and 2; document 0 ends after the first query of chunk 1.
    assert local_chunks((0, 5, 16), 1, 2) == (
        Chunk(4, 8, 0, (0, 1, 4), (0, 5, 8)),
        Chunk(8, 12, 5, (0, 4), (0, 7)),
    )


def test_a_row_must_divide_into_chunks() -> None:
    with pytest.raises(ValueError, match="a row of 10 tokens does not divide into 4 chunks"):
        local_chunks((0, 10), 0, 2)


def with_mask(q: Tensor, k: Tensor, v: Tensor, ends: tuple[int, ...], scale: float) -> Tensor:
    """Attention of a whole row [T, heads, d] with a mask of which tokens share a document."""
    num_tokens, num_heads, _ = q.shape
    document = torch.repeat_interleave(torch.tensor(ends).diff())
    allowed = document[:, None] == document[None]
    allowed &= torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    # Neighbouring query heads share a key/value head.
    k = k.repeat_interleave(num_heads // k.shape[1], 1)
    v = v.repeat_interleave(num_heads // v.shape[1], 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    weights = scores.masked_fill(~allowed, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


@pytest.mark.parametrize("lengths", ROWS)
@pytest.mark.parametrize("size", SIZES)
def test_attention_of_all_ranks_is_that_of_the_masked_row(
    lengths: tuple[int, ...], size: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    ends = ends_of(lengths)
    # 6 query heads share 2 key/value heads.
    q, k, v = (
        torch.randn(16, heads, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (6, 2, 2)
    )
    upstream = torch.randn(16, 6, 8, generator=generator, dtype=torch.float64)
    expected = with_mask(q, k, v, ends, 0.3)
    expected_gradients = torch.autograd.grad(expected, (q, k, v), upstream)
    parts = []
    for rank in range(size):
        for chunk in local_chunks(ends, rank, size):
            keys = slice(chunk.first_key, chunk.stop)
            out = attend_reference(q[chunk.start : chunk.stop], k[keys], v[keys], chunk, 0.3)
            parts.append((chunk.start, out))
    # In the order of the row, whichever rank has computed what.
    found = torch.cat([out for _, out in sorted(parts, key=lambda part: part[0])])
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(found, (q, k, v), upstream)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("lengths", ROWS)
def test_the_longest_pieces_are_those_of_a_chunk(lengths: tuple[int, ...]) -> None:
    # Flash attention is told the longest piece: too small a number cuts pieces short.
    for chunk in local_chunks(ends_of(lengths), 1, 2):
        assert chunk.longest_query == max(b - a for a, b in pairwise(chunk.query_ends))
        assert chunk.longest_key == max(b - a for a, b in pairwise(chunk.key_ends))
        assert chunk.query_ends[-1] == chunk.stop - chunk.start
        assert chunk.key_ends[-1] == chunk.stop - chunk.first_key


LONG = CUDNN_FROM - 1


@pytest.mark.parametrize(
    ("lengths", "size", "expected"),
    [
        ((LONG,), 1, [True]),
        ((LONG, LONG), 1, [True]),
        # With filler behind, up to what a multiple of tokens may ask for.
        ((LONG, LONG, 2), 1, [True]),
        ((LONG, LONG, MAX_FILLER), 1, [False]),
        # Of two lengths; too short to earn back a plan; of a length that few samples have.
        ((2 * LONG + 1, LONG), 1, [False]),
        ((CUDNN_MULTIPLE - 1, CUDNN_MULTIPLE - 1), 1, [False]),
        ((LONG + 1, LONG + 1), 1, [False]),
        ((5, 5), 1, [False]),
        # Chunks 0 and 3 of a row, LONG + 1 tokens each; inside of a document keys are more.
        ((LONG, 3 * LONG + 4), 2, [True, False]),
        ((3 * LONG + 3, LONG, 1), 2, [False, True]),
    ],
    ids=str,
)
def test_samples_cut_at_one_length_suit_cudnn(
    lengths: tuple[int, ...], size: int, expected: list[bool]
) -> None:
    assert [suits_cudnn(chunk) for chunk in local_chunks(ends_of(lengths), 0, size)] == expected
