"""Fit samples to ``data.max_length``: leave longer ones out, cut them or split them.

This is a view of a token store, which holds every sample whole: another limit needs no new store.

    left_out         the sample is not trained on
    truncate_right   its first max_length tokens are
    truncate_left    its last max_length tokens are
    split            all of it is, in pieces of up to max_length tokens

A piece begins with the last token of the piece before it, because the first token of a sequence has
nothing before it to predict it. So every token in the loss of a sample that is split is predicted
once, as it would be in the whole sample, though without what stands before the piece.
"""

from dataclasses import dataclass

import numpy as np

from megalora.config import TooLong
from megalora.data.encode_rows import IN_LOSS
from megalora.data.samples import PIECE, StoredSamples
from megalora.data.tokens import TokenStore


@dataclass(frozen=True)
class Fit:
    """What became of samples that are too long, or have nothing to learn."""

    how: TooLong
    max_length: int
    longest: int = 0
    """Tokens in the longest sequence, whether or not it was left out."""
    num_too_long: int = 0
    """Number of samples with more than ``max_length`` tokens."""
    num_no_target: int = 0
    """Number of samples that were left out because they have no token in the loss."""
    num_pieces: int = 0
    """Number of pieces that are trained on of samples that were cut or split."""
    num_empty: int = 0
    """Number of such pieces that were left out because none of their tokens is in the loss."""
    num_cut: int = 0
    """Number of tokens that were cut off."""
    num_targets_cut: int = 0
    """Number of these that are in the loss."""

    @property
    def fate(self) -> str:
        """What became of samples that are too long, in two words."""
        return {"left_out": "left out", "split": "split"}.get(self.how, "cut")

    def notes(self) -> list[str]:
        """Lines for the user."""
        found = []
        if self.num_too_long:
            found.append(
                f"{self.num_too_long:,} longer than data.max_length={self.max_length} were"
                f" {self._what_happened()} (longest {self.longest:,})"
            )
        if self.num_cut:
            found.append(
                f"{self.num_cut:,} tokens were cut off, {self.num_targets_cut:,} of them in the"
                " loss"
            )
        if self.num_empty:
            found.append(
                f"{self.num_empty:,} of the pieces have no token in the loss and were left out"
            )
        if self.num_no_target:
            found.append(f"{self.num_no_target:,} without a token in the loss were left out")
        return found

    def _what_happened(self) -> str:
        if self.how == "left_out":
            return "left out"
        if self.how == "split":
            return f"split into {self.num_pieces + self.num_empty:,} pieces"
        side = "end" if self.how == "truncate_right" else "beginning"
        return f"cut at the {side}"


NOTHING_LEFT_OUT = Fit("left_out", 0)
"""For samples that a test or a benchmark made, and for those held out of others."""


def fit(
    store: TokenStore, max_length: int, how: TooLong, places: int = 0
) -> tuple[StoredSamples, Fit]:
    """The samples of a store that can be trained on, in its order, and what became of the others.

    Args:
        max_length: in tokens, at least 2.
        places: of each sequence that are none of its tokens, at its end.
    """
    limit = max_length + places
    whole = StoredSamples.whole(store)
    # Each sequence of a pair has the limit for itself.
    is_long = store.longest > limit
    # All its messages are context, or flagged out of the loss.
    no_target = whole.pieces["targets"] == 0
    if how == "left_out":
        no_target &= ~is_long
    kept = np.flatnonzero(~is_long & ~no_target)
    counts = {
        "longest": int(store.longest.max()) - places,
        "num_too_long": int(is_long.sum()),
        "num_no_target": int(no_target.sum()),
    }
    if how == "left_out" or not is_long.any():
        return StoredSamples(whole.stores, whole.pieces[kept]), Fit(how, max_length, **counts)
    to_cut = np.flatnonzero(is_long & ~no_target)
    # Only these are read, to see where their targets stand.
    cut = [_pieces(store, int(number), limit, how) for number in to_cut]
    pieces = np.concatenate([np.zeros(0, PIECE), *cut])
    learned = pieces[pieces["targets"] > 0]
    # Pieces take the place of their sample, in their order.
    together = np.concatenate([whole.pieces[kept], learned])
    together = together[np.argsort(together["sample"], kind="stable")]
    counts |= {"num_pieces": len(learned), "num_empty": len(pieces) - len(learned)}
    # Splitting cuts nothing off, for no target lies in a piece that is left out.
    if how != "split":
        targets = whole.pieces["targets"][to_cut].sum()
        counts["num_cut"] = int((store.lengths[to_cut] - limit).sum())
        counts["num_targets_cut"] = int(targets - learned["targets"].sum())
    return StoredSamples(whole.stores, together), Fit(how, max_length, **counts)


def _pieces(store: TokenStore, number: int, max_length: int, how: TooLong) -> np.ndarray:
    """[pieces] PIECE: the parts of a sample of more than ``max_length`` tokens to train on."""
    length = int(store.lengths[number])
    if how == "truncate_right":
        begins = np.array([0])
    elif how == "truncate_left":
        begins = np.array([length - max_length])
    else:
        # Each piece predicts max_length - 1 tokens, and there are length - 1 to predict.
        begins = np.arange(0, length - 1, max_length - 1)
    ends = np.minimum(begins + max_length, length)
    # Tokens in the loss before each place; a piece does not predict its first token.
    in_loss = store.packed(number)[:length] >= IN_LOSS
    before = np.concatenate([[0], np.cumsum(in_loss)])
    pieces = np.zeros(len(begins), PIECE)
    pieces["sample"] = number
    pieces["begin"] = begins
    pieces["length"] = ends - begins
    pieces["targets"] = before[ends] - before[begins + 1]
    return pieces
