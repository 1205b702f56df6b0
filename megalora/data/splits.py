"""Read, check and tokenise a source, and count the samples that cannot be used."""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from megalora.config import DataConfig
from megalora.data.chat import Encoded, encode_conversation
from megalora.data.columns import resolve_columns, to_conversation, used_columns
from megalora.data.sources import Row, read_rows
from megalora.data.template import ChatTemplate
from megalora.wording import first_few

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PARTICULARS = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\d+""")
"""Quoted texts and numbers in a reason, by which reasons of one kind differ."""
_NUM_NAMED = 5
"""Rows that are named of those refused for the same reason."""


@dataclass(frozen=True)
class Split:
    """The samples of one source that can be trained on, and how many cannot."""

    source: str
    max_length: int
    """Limit in tokens; longer samples are left out, never cut."""
    samples: list[Encoded]
    num_too_long: int = 0
    """Number of samples that were left out because they are longer."""
    num_no_target: int = 0
    """Number of samples that were left out because they have no token in the loss."""
    longest: int = 0
    """Tokens in the longest sample of the source, whether or not it was left out."""
    lengths: tuple[int, ...] = ()
    """Tokens in each sample of the source, those left out included."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column that each part of the conversation is read from."""
    unused_columns: tuple[str, ...] = ()
    """Columns of the source that nothing is read from."""

    @property
    def num_tokens(self) -> int:
        return sum(len(sample.input_ids) for sample in self.samples)

    @property
    def num_target_tokens(self) -> int:
        return sum(sample.num_target_tokens for sample in self.samples)

    def summary(self) -> str:
        """One line for the log: how much data there is, and what was left out."""
        line = f"{self.source}: {len(self.samples):,} samples, "
        line += f"{_short(self.num_tokens)} tokens ({_short(self.num_target_tokens)} in the loss)"
        return "; ".join([line, *self.left_out()])

    def left_out(self) -> list[str]:
        """What was left out and why, and what the user should know of the rest."""
        reasons = []
        if self.num_too_long:
            limit = f"data.max_length={self.max_length}"
            reasons.append(
                f"{self.num_too_long:,} longer than {limit} were left out (longest"
                f" {self.longest:,})"
            )
        if self.num_no_target:
            reasons.append(f"{self.num_no_target:,} without a token in the loss were left out")
        reasons += _template_notes(self.samples)
        if self.unused_columns:
            reasons.append(f"columns not used: {', '.join(self.unused_columns)}")
        return reasons


def _template_notes(samples: list[Encoded]) -> list[str]:
    """What the chat template leaves out of samples, or does not let the model learn."""
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
    notes = []
    for kind, count in kinds.items():
        notes.append(f"{count:,} lost their {kind} to the chat template (data.allow_left_out)")
    if num_endless:
        notes.append(
            f"{num_endless:,} have no end-of-turn token in the loss behind the last answer: "
            "the model will not learn to stop there"
        )
    if num_open:
        notes.append(
            f"{num_open:,} have no end-of-turn token in the loss behind an answer before the"
            " last: the model will not learn to stop there"
        )
    if num_unmarked:
        notes.append(
            f"{num_unmarked:,} answers are not learned, or not whole, because the chat template"
            " does not mark them as generated ({% generation %})"
        )
    return notes


def _short(count: int) -> str:
    """A count in millions or billions where it is that large."""
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:,}"


def load_data(
    data: DataConfig, tokenizer: "PreTrainedTokenizerBase", *, every_refusal: bool = False
) -> tuple[Split, Split | None]:
    """The training samples and, where asked for, the evaluation samples; see ``load_split``."""

    def load(source: str) -> Split:
        return load_split(
            source,
            tokenizer,
            format=data.format,
            max_length=data.max_length,
            allow_left_out=data.allow_left_out,
            every_refusal=every_refusal,
        )

    train = load(data.train)
    if data.eval is None:
        return train, None
    if isinstance(data.eval, str):
        return train, load(data.eval)
    # A number or fraction of the training samples, held out.
    return split_off_eval(train, data.eval, data.seed)


def load_split(
    source: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    format: str | Mapping[str, str],
    max_length: int,
    allow_left_out: Collection[str] = (),
    every_refusal: bool = False,
) -> Split:
    """Read and tokenise a source.

    Args:
        source: see ``read_rows``.
        tokenizer: a fast tokenizer with a chat template.
        format: see ``resolve_columns``; its columns are looked up in the first row.
        max_length: in tokens, of the whole conversation.
        allow_left_out: see ``DataConfig``.
        every_refusal: try all rows and name all that are refused, instead of the first alone.
    Raises:
        ValueError: a row that cannot be read or tokenised, or of which something would be left out
            (with its number), or no sample is left.
    """
    rows = read_rows(source)
    try:
        # The first row decides for all, so that no row is read otherwise than the one before.
        columns = resolve_columns(format, rows[0].keys())
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    encoded = _encode_rows(source, rows, columns, tokenizer, allow_left_out, every_refusal)
    split = replace(
        _fitting(source, encoded, max_length),
        columns=columns,
        unused_columns=_unused_columns(rows, used_columns(columns)),
    )
    if not split.samples:
        raise ValueError(_nothing_is_left(split, len(rows)))
    return split


def _fitting(source: str, encoded: list[Encoded], max_length: int) -> Split:
    """The samples that can be trained on, and counts of the others."""
    lengths: list[int] = []
    samples: list[Encoded] = []
    num_too_long = 0
    num_no_target = 0
    for sample in encoded:
        length = len(sample.input_ids)
        lengths.append(length)
        if length > max_length:
            num_too_long += 1
        # All its messages are context, or flagged out of the loss.
        elif not sample.num_target_tokens:
            num_no_target += 1
        else:
            samples.append(sample)
    return Split(
        source,
        max_length,
        samples,
        num_too_long=num_too_long,
        num_no_target=num_no_target,
        longest=max(lengths),
        lengths=tuple(lengths),
    )


def _unused_columns(rows: list[Row], used: set[str]) -> tuple[str, ...]:
    """Columns of any row that are not used, in the order in which they first occur."""
    # Rows of a JSONL file may have different columns. A dict keeps the order, as a set would not.
    unused: dict[str, None] = {}
    for row in rows:
        for column in row:
            if column not in used:
                unused[column] = None
    return tuple(unused)


def _nothing_is_left(split: Split, num_rows: int) -> str:
    fix = "Look at the rows and at the model's chat template."
    if split.num_too_long:
        fix = "Raise data.max_length."
    reasons = "; ".join(split.left_out())
    return f"{split.source}: none of the {num_rows:,} samples is left: {reasons}.\n  {fix}"


def _encode_rows(
    source: str,
    rows: list[Row],
    columns: Mapping[str, str],
    tokenizer: "PreTrainedTokenizerBase",
    allow_left_out: Collection[str],
    every_refusal: bool,
) -> list[Encoded]:
    """Tokenise every row; raises ``ValueError`` with the numbers of the rows that are refused."""
    encoded: list[Encoded] = []
    refused: dict[int, str] = {}
    try:
        template = ChatTemplate(tokenizer)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    for number, row in enumerate(rows, 1):
        try:
            conversation = to_conversation(row, columns, allow_left_out)
            encoded.append(encode_conversation(conversation, template, allow_left_out))
        except ValueError as error:
            refused[number] = str(error)
        except RecursionError:
            refused[number] = "nested too deeply to be read"
        if refused and not every_refusal:
            break
    if refused:
        raise ValueError(f"{source}: {_refusals(refused, len(rows))}")
    return encoded


def _refusals(refused: Mapping[int, str], num_rows: int) -> str:
    """Why rows are refused: the reason of a single row, or each kind of reason with its first rows.

    Reasons are of one kind if they differ only in quoted texts and numbers.
    """
    if len(refused) == 1:
        ((number, reason),) = refused.items()
        return f"row {number}: {reason}"
    kinds: dict[str, list[int]] = {}
    for number, reason in refused.items():
        kinds.setdefault(_PARTICULARS.sub("#", reason), []).append(number)
    lines = [f"{len(refused):,} of {num_rows:,} rows are refused"]
    # The most frequent kind first; its first row gives the reason word for word.
    for numbers in sorted(kinds.values(), key=len, reverse=True):
        first = first_few(numbers, _NUM_NAMED)
        reason = refused[numbers[0]].replace("\n", "\n  ")
        lines.append(f"  {len(numbers):,} (rows {first}): {reason}")
    return "\n".join(lines)


def split_off_eval(split: Split, eval: float, seed: int) -> tuple[Split, Split]:
    """Hold out samples for evaluation: (train, eval), each in the order of the source.

    Args:
        split: at least two samples.
        eval: how many samples (int) or which fraction of them (float between 0 and 1; at least one
            sample).
        seed: seed of the choice.
    Raises:
        ValueError: one of the two would have no sample.
    """
    num_samples = len(split.samples)
    # True is an int for isinstance.
    if isinstance(eval, bool) or (isinstance(eval, float) and not 0 < eval < 1):
        raise ValueError(
            f"data.eval={eval} is neither a count (integer) nor a fraction between 0 and 1"
        )
    num_eval = int(eval)
    if isinstance(eval, float):
        num_eval = max(1, round(eval * num_samples))
    if not 1 <= num_eval < num_samples:
        raise ValueError(
            f"data.eval={eval} would hold out {num_eval} of the {num_samples} samples of"
            f" {split.source}.\n  Choose between 1 and {num_samples - 1}, or name another file."
        )
    # The third word keeps this choice apart from the order of any epoch.
    held_out = set(permutation(num_samples, seed, 0, 1)[:num_eval].tolist())
    kept: list[Encoded] = []
    eval_samples: list[Encoded] = []
    for index, sample in enumerate(split.samples):
        if index in held_out:
            eval_samples.append(sample)
        else:
            kept.append(sample)
    name = f"{split.source} (held out)"
    held = Split(name, split.max_length, eval_samples, longest=split.longest)
    return replace(split, samples=kept), held


def permutation(num_samples: int, seed: int, *stream: int) -> np.ndarray:
    """[num_samples] int64: a random order; each seed and stream of numbers has its own."""
    if seed < 0:
        raise ValueError(f"data.seed must not be negative, got {seed}")
    # By sorting raw bits, because numpy freezes its bit generators across versions, but not
    # ``Generator.permutation``.
    return np.argsort(np.random.PCG64([seed, *stream]).random_raw(num_samples), kind="stable")
