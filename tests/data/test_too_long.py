"""Check what becomes of samples over ``data.max_length``, and that no target is lost in silence."""

import numpy as np
import pytest

from megalora.data.build_tokens import Recipe
from megalora.data.samples import StoredSamples, digest_of_samples
from megalora.data.splits import load_split, split_off_eval
from megalora.data.token_cache import stored_tokens
from megalora.data.too_long import fit
from tests.jsonl import write_jsonl


def chats(count):
    """Conversations of 1 to 6 short answers: tokens in the loss stand in several places."""
    rows = []
    for k in range(count):
        messages = []
        for turn in range(1 + k % 6):
            messages.append({"role": "user", "content": f"What is {k} + {turn}?" * (1 + k % 3)})
            messages.append({"role": "assistant", "content": f"The answer is {k + turn}"})
        rows.append({"messages": messages})
    return rows


@pytest.fixture
def store(tmp_path, make_tokenizer):
    write_jsonl(tmp_path / "a.jsonl", chats(24))
    return stored_tokens(Recipe(str(tmp_path / "a.jsonl"), make_tokenizer(), "auto"), tmp_path)


def predictions(samples):
    """Every prediction that is in the loss: (number of the sample, place of the token)."""
    found = []
    for piece, sample in zip(samples.pieces, samples, strict=True):
        places = np.flatnonzero(sample.loss_mask[1:]) + 1 + piece["begin"]
        found += [(int(piece["sample"]), int(place)) for place in places]
    return found


# A limit below all samples, one in the middle, one that only the longest exceeds, one above all.
LIMITS = (2, 17, 100, -1, 10_000)


def limit_of(store, limit):
    """Limits below zero are meant from the longest sample."""
    return int(store.lengths.max()) + limit if limit < 0 else limit


@pytest.mark.parametrize("limit", LIMITS)
def test_split_loses_no_target(store, limit):
    whole = StoredSamples.whole(store)
    limit = limit_of(store, limit)
    samples, found = fit(store, limit, "split")
    # Each prediction of the whole samples is made, once.
    made = predictions(samples)
    assert len(set(made)) == len(made)
    assert sorted(made) == sorted(predictions(whole))
    assert found.num_targets_cut == found.num_cut == 0
    for piece, sample in zip(samples.pieces, samples, strict=True):
        # The very tokens that stand there, and counts that the arrays hold without reading any.
        begin = piece["begin"]
        tokens = whole[piece["sample"]].input_ids[begin : begin + piece["length"]]
        assert sample.input_ids.tolist() == tokens.tolist()
        assert 2 <= len(sample.input_ids) <= limit
        assert sample.num_target_tokens == piece["targets"] > 0
        assert not (begin and sample.loss_mask[0])
    # Each sample takes as many pieces as cover its predictions, limit - 1 at a time.
    long = store.lengths[store.lengths > limit]
    assert found.num_too_long == len(long)
    assert found.num_pieces + found.num_empty == sum(-(-(n - 1) // (limit - 1)) for n in long)
    assert len(samples) == len(store.lengths) - len(long) + found.num_pieces


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_truncation_counts_what_it_cuts(store, limit, side):
    whole = StoredSamples.whole(store)
    limit = limit_of(store, limit)
    samples, found = fit(store, limit, f"truncate_{side}")
    kept = {}
    for piece, sample in zip(samples.pieces, samples, strict=True):
        kept[int(piece["sample"])] = sample
        assert sample.num_target_tokens == piece["targets"] > 0
    num_targets = 0
    num_empty = 0
    for number, sample in enumerate(whole):
        ids = sample.input_ids
        expected = ids[:limit] if side == "right" else ids[-limit:]
        mask = sample.loss_mask[:limit] if side == "right" else sample.loss_mask[-limit:]
        num_targets += sample.num_target_tokens - int(mask[1:].sum())
        if not mask[1:].any():
            num_empty += 1
            assert number not in kept
            continue
        assert kept[number].input_ids.tolist() == expected.tolist()
        assert kept[number].loss_mask[1:].tolist() == mask[1:].tolist()
        # A sample that lost targets at its end does not end with an end of turn.
        has_end = side == "left" or not sample.loss_mask[limit:].any()
        assert kept[number].stops == has_end
    assert (found.num_targets_cut, found.num_empty) == (num_targets, num_empty)
    assert found.num_cut == int(np.maximum(store.lengths - limit, 0).sum())
    assert len(kept) == len(samples) == len(store.lengths) - num_empty


def test_what_is_said_of_it(tmp_path, make_tokenizer):
    source = str(tmp_path / "a.jsonl")
    write_jsonl(tmp_path / "a.jsonl", chats(24))

    def load(how, limit=100):
        return load_split(source, make_tokenizer(), format="auto", max_length=limit, too_long=how)

    longest = load("split").fit.longest
    left_out, right, left, split = (
        load(how).left_out() for how in ("left_out", "truncate_right", "truncate_left", "split")
    )
    first = f"longer than data.max_length=100 were {{}} (longest {longest})"
    assert left_out[0].endswith(first.format("left out")) and len(left_out) == 1
    assert right[0].endswith(first.format("cut at the end"))
    assert "tokens were cut off, " in right[1]
    # All that lost their end, and none else.
    assert right[2] == f"{right[0].split()[0]} have no end-of-turn token in the loss behind the" + (
        " last answer: the model will not learn to stop there"
    )
    assert left[0].endswith(first.format("cut at the beginning")) and len(left) == 2
    found = load("split").fit
    num_pieces = found.num_pieces + found.num_empty
    assert split == [
        f"16 {first.format(f'split into {num_pieces} pieces')}",
        "1 of the pieces have no token in the loss and were left out",
    ]
    # Other tokens are trained on, of the same store.
    ways = [("left_out", 100), ("truncate_right", 100), ("truncate_left", 100), ("split", 100)]
    digests = set()
    for how, limit in [*ways, ("split", 99), ("split", 10_000)]:
        digests.add(digest_of_samples(load(how, limit).samples))
    assert len(digests) == 6


def test_pieces_of_a_sample_are_held_out_together(tmp_path, make_tokenizer):
    source = str(tmp_path / "a.jsonl")
    write_jsonl(tmp_path / "a.jsonl", chats(24))
    split = load_split(source, make_tokenizer(), format="auto", max_length=60, too_long="split")
    assert len(split.samples) > 40
    train, held_out = split_off_eval(split, 5, seed=3)
    trained = set(train.samples.pieces["sample"].tolist())
    evaluated = set(held_out.samples.pieces["sample"].tolist())
    assert len(evaluated) == 5 and len(trained) == 19 and not trained & evaluated
    assert len(train.samples) + len(held_out.samples) == len(split.samples)
    # The same samples as without a limit.
    whole = load_split(source, make_tokenizer(), format="auto", max_length=10_000)
    chosen = split_off_eval(whole, 5, seed=3)[1].samples.pieces["sample"].tolist()
    assert sorted(evaluated) == chosen
