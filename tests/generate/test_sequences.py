"""Which sequences a pass reads, and where its row puts their keys."""

import pytest
import torch

from megalora.generate.choose import Draws
from megalora.generate.options import Sampling
from megalora.generate.row import lay_out
from megalora.generate.sequences import Active, Prompt, Sequences


def test_a_row_of_a_prompt_a_next_token_and_filler() -> None:
    beginning = Active(0, slot=2, tokens=[5, 6, 7], num_prompt=3, draws=Draws(0, 0))
    going_on = Active(1, slot=0, tokens=[1, 2, 3, 4], num_prompt=2, draws=Draws(0, 1), num_cached=3)
    row = lay_out([beginning, going_on], num_slots=3, length=10, multiple_of=3)
    documents = row.documents
    # Two tokens of filler make 6, a multiple of 3.
    assert row.tokens.tolist() == [5, 6, 7, 4, 0, 0]
    assert documents.positions.tolist() == [0, 1, 2, 3, 0, 1]
    # Slots of 10 rows; filler behind all three.
    assert documents.write.tolist() == [20, 21, 22, 3, 30, 31]
    assert documents.read.tolist() == [20, 21, 22, 0, 1, 2, 3, 30, 31]
    assert row.last.tolist() == [2, 3]
    (chunk,) = documents.chunks
    assert chunk.query_ends == (0, 3, 4, 6)
    assert chunk.key_ends == (0, 3, 7, 9)
    assert (chunk.first_key, chunk.stop, chunk.stop - chunk.start) == (0, 9, 6)
    assert [bound.tolist() for bound in documents.bounds[0]] == [[0, 3, 4, 6], [0, 3, 7, 9]]
    assert documents.bounds[0][0].dtype == torch.int32


def test_a_row_without_sequences_is_filler() -> None:
    row = lay_out([], num_slots=0, length=4, multiple_of=2)
    assert row.tokens.tolist() == [0, 0]
    assert row.documents.write.tolist() == [0, 1]
    assert row.last.tolist() == [0]


def lengths_of_passes(sequences: Sequences, token: int = 1) -> list[list[int]]:
    """New tokens of each sequence of each pass, when every one chooses ``token``."""
    passes = []
    while sequences.busy:
        active = sequences.of_next_pass()
        passes.append([len(sequence.new_tokens) for sequence in active])
        sequences.take(active, [token] * len(active), [-1.0] * len(active))
    return passes


def test_a_free_slot_goes_to_the_next_prompt() -> None:
    prompts = [Prompt(place, place, [9] * length) for place, length in enumerate((3, 5, 2))]
    sequences = Sequences(prompts, Sampling(max_new_tokens=2), (), num_slots=2, pass_tokens=99)
    assert lengths_of_passes(sequences) == [[3, 5], [1, 1], [2], [1]]
    assert sorted(sequences.free) == [0, 1]
    assert {place: answer.tokens for place, answer in sequences.answers.items()} == {
        0: [1, 1], 1: [1, 1], 2: [1, 1],
    }  # fmt: skip


def test_a_pass_reads_no_more_tokens_than_it_may() -> None:
    prompts = [Prompt(place, place, [9] * length) for place, length in enumerate((7, 4, 3, 12))]
    sequences = Sequences(prompts, Sampling(max_new_tokens=9), (1,), num_slots=4, pass_tokens=8)
    # 7 and 4 are more than 8; 12 are too, and come alone.
    assert lengths_of_passes(sequences) == [[7], [4, 3], [12]]


def test_a_stop_token_ends_an_answer_and_is_its_last() -> None:
    sequences = Sequences(
        [Prompt(0, 0, [9])], Sampling(max_new_tokens=5), (4,), num_slots=1, pass_tokens=9
    )
    for token in (3, 4):
        sequences.take(sequences.of_next_pass(), [token], [-0.5])
    answer = sequences.answers[0]
    assert (answer.tokens, answer.logprobs, answer.ended) == ([3, 4], [-0.5, -0.5], True)
    assert not sequences.busy


def test_logits_that_are_no_numbers_are_an_error() -> None:
    sequences = Sequences([Prompt(3, 0, [9, 9])], Sampling(), (), num_slots=1, pass_tokens=9)
    with pytest.raises(ValueError, match="prompt 3: the logits behind token 2 are NaN"):
        sequences.take(sequences.of_next_pass(), [0], [float("nan")])
