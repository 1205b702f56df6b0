"""Say how the samples of a step fill rows, by their lengths."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megalora.config import ParallelConfig, RunConfig
from megalora.config.checks import require
from megalora.data.pack import measure_fill, rows_by_count, rows_by_tokens
from megalora.data.sources import locate


@dataclass(frozen=True)
class RowUse:
    """How the rows of a step are filled."""

    num_rounds: int
    """Rows of each data-parallel rank."""
    row_tokens: float
    """Tokens of a row, filler up to the longest of its round included: a mean."""
    used: float
    """Share of all slots that hold tokens of samples."""


# Compared by identity: a workload is looked up often, and its lengths are many.
@dataclass(frozen=True, eq=False)
class Packing:
    """The samples of a typical step, which are packed into rows."""

    lengths: tuple[int, ...]
    """Tokens of each as the model's input."""
    source: str
    """Where the lengths are from, for messages."""
    sequences: int = 1
    """Sequences of each, taken for equal."""
    num_samples: int | None = None
    """Samples of the whole data set; None where only a mean length is known."""
    known: dict[tuple[int, ...], RowUse] = field(default_factory=dict, repr=False)

    @property
    def mean(self) -> float:
        """Tokens of a sample."""
        return sum(self.lengths) / len(self.lengths)

    @property
    def attended(self) -> float:
        """Length of the document that a token is in, a mean over tokens: attention costs as much as
        over documents of this length."""
        return sum(n * n for n in self.lengths) / sum(self.lengths) / self.sequences

    def use(
        self, capacity: int, dp: int, parallel: ParallelConfig, per_row: int | None = None
    ) -> RowUse:
        """Rows of at most ``capacity`` tokens on ``dp`` ranks, as training fills them.

        Args:
            per_row: samples of a row, where it is ``train.micro_batch_size`` that fills it.

        Raises:
            ValueError: a sample is longer than a row.
        """
        multiple = parallel.round_multiple
        row_multiple = parallel.row_multiple
        # In any pipeline rounds overlap, and the longest row holds up all.
        one_length = parallel.pp > 1
        key = (capacity, dp, multiple, one_length, row_multiple, per_row or 0)
        if key not in self.known:
            if per_row is None:
                rows = rows_by_tokens(self.lengths, capacity, dp, multiple, one_length=one_length)
            else:
                rows = rows_by_count(len(self.lengths), per_row, dp, multiple)
            fill = measure_fill(rows, self.lengths, one_length=one_length, multiple_of=row_multiple)
            num_rounds = len(rows[0])
            self.known[key] = RowUse(
                num_rounds, fill.slots / (dp * num_rounds), fill.tokens / fill.slots
            )
        return self.known[key]

    def times(self, number: int) -> "Packing":
        """The samples of ``number`` such steps in one."""
        return replace(self, lengths=self.lengths * number, known={})


def packing_of(config: RunConfig, mean_length: float | None) -> Packing | None:
    """Lengths of samples: of the mean, if it is given, else of the data and tokenizer of a config
    where both are on this machine; None where neither is known.

    Raises:
        ValueError: no sample can be that long on average.
    """
    batch = config.train.global_batch_size
    sequences = config.objective.sequences
    longest = sequences * config.data.max_length
    if mean_length is not None:
        require(
            2 <= mean_length <= longest,
            f"--mean-length {mean_length:g}: must lie between 2 and"
            f" {'twice ' * (sequences - 1)}data.max_length={config.data.max_length}",
        )
        return Packing((round(mean_length),) * batch, "--mean-length", sequences)
    if not is_here(config):
        return None
    # Late: a plan without data needs no tokenizer, whose import takes seconds.
    from megalora.data.splits import load_data
    from megalora.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(Path(config.model.path))
    split, _ = load_data(config.data, tokenizer, objective=config.objective)
    ordered = sorted(split.row_lengths.tolist())
    lengths = []
    for i in range(batch):
        # From the middle of each of as many equal parts of the data: a step like all steps.
        lengths.append(max(1, ordered[(2 * i + 1) * len(ordered) // (2 * batch)]))
    return Packing(tuple(lengths), split.source, sequences, len(ordered))


def is_here(config: RunConfig) -> bool:
    """Whether tokenizer and data are files of this machine."""
    if not (Path(config.model.path) / "tokenizer_config.json").is_file():
        return False
    for source in config.data.sources:
        try:
            found: Any = locate(source.path)
        except ValueError:
            # Data that has yet to come here: a plan is made before it.
            return False
        if found.file is None:
            return False
    return True
