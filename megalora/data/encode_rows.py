"""Tokenise a chunk of rows into arrays: what each process that builds a token store does.

A token is one 32-bit number: its id, and in the highest bit whether it is in the loss. So ids and
loss mask can neither get apart nor need a second file. Behind the tokens of a sample stand the
numbers that each of them has, such as log-probabilities, as many float32 for each name.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np

from megalora.data.chat import Encoded, encode_conversation
from megalora.data.chunk import Chunk
from megalora.data.columns import to_conversation
from megalora.data.labelled import label_of, without_label
from megalora.data.pairs import is_of_pairs, joined_pair, to_pair
from megalora.data.rollouts import BY_TOKEN, rollout_of
from megalora.data.scored import Scoring, scored_sample
from megalora.data.template import ChatTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKEN = np.dtype("<u4")
IN_LOSS = np.uint32(1 << 31)
DIGEST_BYTES = 16
SAMPLE = np.dtype(
    [
        ("length", "<i4"),
        ("targets", "<i4"),
        ("left_out", "<u2"),
        ("stops", "?"),
        ("open", "<i4"),
        ("unmarked", "<i4"),
        ("second", "<i4"),
        ("value", "<f8"),
        ("reward", "<f8"),
        ("group", "<u8"),
        ("version", "<i8"),
        ("truncated", "?"),
        ("largest", "<i4"),
        ("digest", f"V{DIGEST_BYTES}"),
    ]
)
"""What is kept of a sample beside its tokens. ``left_out`` is an index into a list of the different
values of ``Encoded.left_out``; ``largest`` is the largest token id, ``digest`` that of the tokens'
bytes."""


def pack(sample: Encoded) -> np.ndarray:
    """[n (1 + C)] tokens of a sample, with the loss mask in the highest bits, and C numbers of
    each."""
    # No vocabulary has 2**31 tokens, so that the highest bit of an id is free.
    packed = sample.input_ids.astype(TOKEN)
    packed[sample.loss_mask] |= IN_LOSS
    floats = [values.astype("<f4").view(TOKEN) for values in sample.floats.values()]
    return np.concatenate([packed, *floats])


def unpack(
    packed: np.ndarray, names: Sequence[str] = ()
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """[n] int32 ids, [n] bool loss mask and [n] float32 of each name; all are new arrays."""
    tokens, *numbers = np.split(packed, 1 + len(names))
    floats: dict[str, np.ndarray] = {}
    for name, values in zip(names, numbers, strict=True):
        floats[name] = values.view("<f4").astype(np.float32)
    return (tokens & ~IN_LOSS).astype(np.int32), tokens >= IN_LOSS, floats


def names_of_floats(columns: Mapping[str, str]) -> tuple[str, ...]:
    """Names of the numbers that each token of a sample has, where these are the columns of its
    rows."""
    return tuple(name for name in BY_TOKEN if name in columns)


def digest_of(packed: np.ndarray) -> bytes:
    """Digest of a sample's tokens and of which are in the loss, the same on every machine."""
    return blake2b(packed.tobytes(), digest_size=DIGEST_BYTES).digest()


@dataclass
class EncodedChunk:
    """The samples of a chunk, one behind the other."""

    tokens: np.ndarray
    """What ``pack`` makes of each sample; TOKEN."""
    samples: np.ndarray
    """[samples] SAMPLE; ``left_out`` is an index into this chunk's list."""
    left_out: list[tuple[str, ...]]
    num_rows: int
    columns: dict[str, None] = field(default_factory=dict)
    """Columns of any row, in the order in which they first occur. Rows of a JSONL file may have
    different ones."""
    refused: dict[int, str] = field(default_factory=dict)
    """Why rows are refused, by their numbers."""


class RowEncoder:
    """Tokenises rows with one tokenizer and one mapping of columns."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        columns: Mapping[str, str],
        allow_left_out: Collection[str],
        every_refusal: bool,
        scoring: Scoring | None = None,
        rollouts: bool = False,
    ) -> None:
        """Raises ``ValueError`` for a tokenizer that cannot be used; see ``ChatTemplate``."""
        self.template = ChatTemplate(tokenizer)
        self.columns = columns
        self.allow_left_out = allow_left_out
        self.every_refusal = every_refusal
        self.scoring = scoring
        self.rollouts = rollouts

    def encode(self, chunk: Chunk) -> EncodedChunk:
        """Tokenise a chunk, up to its first refused row unless every refusal is asked for.

        Raises:
            ValueError: a row cannot be read at all.
        """
        encoded: list[Encoded] = []
        # A dict keeps the order, as a set would not.
        columns: dict[str, None] = {}
        refused: dict[int, str] = {}
        number = chunk.first - 1
        # Reading is outside of ``try``: a line that is not JSON ends the build, with its number.
        for number, row in enumerate(chunk.rows(), chunk.first):
            columns |= dict.fromkeys(row)
            try:
                encoded.append(self._sample(row))
            except ValueError as error:
                refused[number] = str(error)
            # A template, or json, calls itself for each level.
            except RecursionError:
                refused[number] = "nested too deeply to be read"
            if refused and not self.every_refusal:
                break
        num_rows = number + 1 - chunk.first
        return _joined(encoded, num_rows, columns, refused)

    def _sample(self, row: Mapping[str, Any]) -> Encoded:
        """Raises ``ValueError`` for a row that is refused."""
        if self.scoring is not None:
            return scored_sample(
                row, self.columns, self.template, self.allow_left_out, self.scoring
            )
        if self.rollouts:
            return rollout_of(row, self.columns, self.template, self.allow_left_out)
        if "label" in self.columns:
            conversation = to_conversation(row, without_label(self.columns), self.allow_left_out)
            encoded = encode_conversation(conversation, self.template, self.allow_left_out)
            return replace(encoded, value=label_of(row, self.columns))
        if not is_of_pairs(self.columns):
            conversation = to_conversation(row, self.columns, self.allow_left_out)
            return encode_conversation(conversation, self.template, self.allow_left_out)
        sides: list[Encoded] = []
        for conversation in to_pair(row, self.columns, self.allow_left_out):
            sides.append(encode_conversation(conversation, self.template, self.allow_left_out))
        return joined_pair(*sides)


def _joined(
    encoded: list[Encoded], num_rows: int, columns: dict[str, None], refused: dict[int, str]
) -> EncodedChunk:
    samples = np.zeros(len(encoded), SAMPLE)
    # The different values of left_out, with their indices.
    kinds: dict[tuple[str, ...], int] = {}
    # An empty part, or a chunk whose rows are all refused would have none to concatenate.
    packed = [np.zeros(0, TOKEN)]
    for at, sample in enumerate(encoded):
        tokens = pack(sample)
        packed.append(tokens)
        samples[at] = (
            len(sample.input_ids),
            sample.num_target_tokens,
            kinds.setdefault(sample.left_out, len(kinds)),
            sample.stops,
            sample.num_open,
            sample.num_unmarked,
            sample.second,
            sample.value,
            sample.rollout.reward,
            sample.rollout.group,
            sample.rollout.version,
            sample.rollout.truncated,
            sample.input_ids.max(initial=0),
            digest_of(tokens),
        )
    return EncodedChunk(np.concatenate(packed), samples, list(kinds), num_rows, columns, refused)
