"""Samples of token stores as a sequence that reads each one when it is asked for.

What is asked of all samples (lengths, target tokens, digest, notes) comes from arrays. The same
functions take lists of ``Encoded``, as tests and benchmarks make them.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import overload

import numpy as np

from megalora.config.checks import require
from megalora.data.chat import Encoded
from megalora.data.encode_rows import digest_of, pack
from megalora.data.tokens import TokenStore

PIECE = np.dtype(
    [("store", "u2"), ("sample", "i8"), ("begin", "i4"), ("length", "i4"), ("targets", "i4")]
)
"""A part of a stored sample: number of the store, of the sample in it, the first token, the number
of tokens, and how many of these are in the loss and have a token before them."""


class StoredSamples(Sequence[Encoded]):
    """Samples of one or more stores, or pieces of them, in any order."""

    def __init__(self, stores: Sequence[TokenStore], pieces: np.ndarray) -> None:
        """
        Args:
            stores: what ``store`` of a piece counts.
            pieces: [samples] PIECE.
        """
        self.stores = tuple(stores)
        self.pieces = pieces

    @classmethod
    def whole(cls, store: TokenStore) -> "StoredSamples":
        """All samples of a store."""
        pieces = np.zeros(store.num_samples, PIECE)
        pieces["sample"] = np.arange(store.num_samples)
        pieces["length"] = store.lengths
        pieces["targets"] = store.records["targets"]
        return cls((store,), pieces)

    def __len__(self) -> int:
        return len(self.pieces)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> "StoredSamples": ...
    def __getitem__(self, index: int | slice) -> "Encoded | StoredSamples":
        if isinstance(index, slice):
            return StoredSamples(self.stores, self.pieces[index])
        piece = self.pieces[index]
        # The whole sample is read and checked, though only a part of it may be asked for.
        store = self.stores[piece["store"]]
        number = int(piece["sample"])
        sample = store.sample(number)
        begin = int(piece["begin"])
        end = begin + int(piece["length"])
        if begin == 0 and end == store.lengths[number]:
            return sample
        return _cut(sample, begin, end)

    def record_of(self, name: str) -> np.ndarray:
        """[samples] a field of SAMPLE, of the sample that each piece belongs to."""
        found = np.zeros(len(self), self.stores[0].records.dtype[name])
        for number, store in enumerate(self.stores):
            # Pieces of this store, wherever they stand.
            mine = self.pieces["store"] == number
            found[mine] = store.records[name][self.pieces["sample"][mine]]
        return found


def _cut(sample: Encoded, begin: int, end: int) -> Encoded:
    """Tokens ``begin`` to ``end`` of a sample."""
    mask = sample.loss_mask[begin:end].copy()
    # Nothing stands before the first token of a piece to predict it.
    if begin:
        mask[0] = False
    # Whether the end of the last turn is still there.
    stops = sample.stops and not sample.loss_mask[end:].any()
    floats = {name: values[begin:end] for name, values in sample.floats.items()}
    ids = sample.input_ids[begin:end]
    return replace(sample, input_ids=ids, loss_mask=mask, stops=stops, floats=floats)


def select(samples: Sequence[Encoded], indices: np.ndarray) -> Sequence[Encoded]:
    """The samples of these indices, in their order."""
    if isinstance(samples, StoredSamples):
        return StoredSamples(samples.stores, samples.pieces[indices])
    return [samples[i] for i in indices]


def concatenate(parts: Sequence[Sequence[Encoded]]) -> Sequence[Encoded]:
    """The samples of several sequences, one sequence behind the other."""
    stores: list[TokenStore] = []
    pieces: list[np.ndarray] = []
    listed: list[Encoded] = []
    for part in parts:
        if not isinstance(part, StoredSamples):
            listed += part
            continue
        moved = part.pieces.copy()
        # Its stores get the numbers behind those of the parts before it.
        moved["store"] += len(stores)
        pieces.append(moved)
        stores += part.stores
    assert not (pieces and listed), "samples of stores and samples in memory are not mixed"
    for store in stores:
        require(
            store.floats == stores[0].floats,
            f"{store.header.source} has {', '.join(store.floats) or 'no numbers'} for its tokens,"
            f" and {stores[0].header.source} {', '.join(stores[0].floats) or 'none'}; all sources"
            " of data.train need the same columns",
        )
    return StoredSamples(stores, np.concatenate(pieces)) if pieces else listed


def lengths_of(samples: Sequence[Encoded]) -> np.ndarray:
    """[samples] int64: tokens in each sample."""
    if isinstance(samples, StoredSamples):
        return samples.pieces["length"].astype(np.int64)
    return np.array([len(sample.input_ids) for sample in samples], np.int64)


def targets_of(samples: Sequence[Encoded]) -> np.ndarray:
    """[samples] int64: tokens of each sample that are in the loss."""
    if isinstance(samples, StoredSamples):
        return samples.pieces["targets"].astype(np.int64)
    return np.array([sample.num_target_tokens for sample in samples], np.int64)


def values_of(samples: Sequence[Encoded]) -> np.ndarray:
    """[samples] float64: the label, the value or the margin of each sample."""
    if isinstance(samples, StoredSamples):
        return samples.record_of("value")
    return np.array([sample.value for sample in samples], np.float64)


def floats_of(samples: Sequence[Encoded]) -> tuple[str, ...]:
    """Names of the numbers that each token has, the same for all samples."""
    if isinstance(samples, StoredSamples):
        return samples.stores[0].floats
    return tuple(samples[0].floats) if len(samples) else ()


def digest_of_samples(samples: Sequence[Encoded]) -> str:
    """Digest of what is trained on, in order: tokens, and which of them are in the loss.

    It changes with the tokenizer, the chat template and our own code, too. Of stored samples no
    token is read: a store has their digests.
    """
    digest = hashlib.sha256()
    if isinstance(samples, StoredSamples):
        digests = samples.record_of("digest")
        bounds = np.stack([samples.pieces["begin"], samples.pieces["length"]], axis=1)
    else:
        found = b"".join(digest_of(pack(sample)) for sample in samples)
        digests = np.frombuffer(found, np.uint8)
        lengths = lengths_of(samples)
        bounds = np.stack([np.zeros_like(lengths), lengths], axis=1)
    # The digests are of whole samples; the bounds say which part of each is trained on.
    digest.update(digests.tobytes())
    digest.update(bounds.astype("<i8").tobytes())
    values = values_of(samples)
    # Digests of samples without any stay as they were.
    if values.any():
        digest.update(values.astype("<f8").tobytes())
    return f"samples:{digest.hexdigest()}"


@dataclass(frozen=True)
class TemplateCounts:
    """What the chat template leaves out of samples, or does not let the model learn."""

    left_out: Counter[str]
    """Samples that lost such a part; the part that is lost first stands first."""
    num_endless: int = 0
    """Samples whose last learned turn has no end."""
    num_open: int = 0
    """Samples of which another learned turn has none."""
    num_unmarked: int = 0
    """Answers that the template's own marks leave out."""


def template_counts(samples: Sequence[Encoded]) -> TemplateCounts:
    """Count samples by their flags; the pieces of a sample that was split count once."""
    if isinstance(samples, StoredSamples):
        return _counted(samples)
    kinds: Counter[str] = Counter()
    num_endless = 0
    num_open = 0
    num_unmarked = 0
    for sample in samples:
        kinds.update(sample.left_out)
        num_unmarked += sample.num_unmarked
        if not sample.stops:
            num_endless += 1
        # A sample is counted once, with the graver of the two.
        elif sample.num_open:
            num_open += 1
    return TemplateCounts(kinds, num_endless, num_open, num_unmarked)


def _counted(samples: StoredSamples) -> TemplateCounts:
    pieces = samples.pieces
    numbers = sample_numbers(samples)
    # The last piece of each sample, and the tokens in the loss of all its pieces.
    is_last = np.append(np.diff(numbers) > 0, True)[: len(pieces)]
    once = StoredSamples(samples.stores, pieces[is_last])
    targets = np.bincount(numbers, weights=pieces["targets"], minlength=len(once))
    # Where the end was cut off, so was the end of the last turn, unless all targets are there: the
    # end of a sample may be a line break.
    ends = once.pieces["begin"] + once.pieces["length"]
    has_end = (ends == once.record_of("length")) | (targets == once.record_of("targets"))
    stops = once.record_of("stops") & has_end
    kinds: Counter[str] = Counter()
    for values, count in _left_out(once):
        for kind in values:
            kinds[kind] += count
    return TemplateCounts(
        kinds,
        num_endless=int((~stops).sum()),
        num_open=int((stops & (once.record_of("open") > 0)).sum()),
        num_unmarked=int(once.record_of("unmarked").sum()),
    )


def sample_numbers(samples: Sequence[Encoded]) -> np.ndarray:
    """[samples] int64: 0 for the first, the same for pieces of one sample, else one more.

    Pieces of one sample stand side by side in any selection that keeps the order of the source.
    """
    if not isinstance(samples, StoredSamples):
        return np.arange(len(samples))
    pieces = samples.pieces
    is_next = np.zeros(len(pieces), bool)
    for name in ("store", "sample"):
        is_next[1:] |= pieces[name][1:] != pieces[name][:-1]
    return np.cumsum(is_next)


def _left_out(samples: StoredSamples) -> Iterator[tuple[list[str], int]]:
    """Each value of ``left_out`` with its number of samples, in the order of first occurrence."""
    # Every store has a list of its own.
    # Both in one number: the store above, the index into its list in the lowest 16 bits.
    keys = samples.pieces["store"].astype(np.int64) << 16 | samples.record_of("left_out")
    values, first, counts = np.unique(keys, return_index=True, return_counts=True)
    for at in np.argsort(first):
        store, index = divmod(int(values[at]), 1 << 16)
        yield samples.stores[store].header.left_out[index], int(counts[at])
