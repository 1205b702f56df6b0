"""The ``data`` section: the samples that a run trains on."""

import math
from dataclasses import dataclass, field
from typing import Literal

from megalora.config.checks import require
from megalora.paths import expand

LeftOutOfText = Literal["reasoning", "name", "tools", "documents"]
"""Parts of a conversation that a chat template may leave out if ``data.allow_left_out`` says so."""
LeftOut = Literal[
    LeftOutOfText,
    "system", "system_prompt", "input", "instruction", "context", "history", "functions",
    "chat_template_kwargs", "thinking", "reasoning_content", "images", "image", "videos", "audios",
]  # fmt: skip
"""Values of ``data.allow_left_out``: parts of a conversation, and columns that belong to one."""

TooLong = Literal["left_out", "truncate_right", "truncate_left", "split"]
"""Values of ``data.too_long``."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One of several sources of training data."""

    path: str
    """A file or a hub data set, as ``data.train`` names one."""
    weight: float | None = None
    """Share of the samples that are trained on, in relation to the weights of the other sources."""
    format: str | dict[str, str] | None = None
    """Columns of this source, where they are not those of ``data.format``."""

    def __post_init__(self) -> None:
        require(
            bool(self.path.strip()),
            "a path in data.train is empty; name a file or a hub data set",
        )
        object.__setattr__(self, "path", expand(self.path, "data.train"))
        is_weight = self.weight is None or (0 < self.weight < math.inf)
        require(
            is_weight, f"the weight of {self.path} in data.train must be above 0, got {self.weight}"
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    train: str | list[Source]
    """Training data: a JSONL, JSON or Parquet file, or a hub data set NAME[:SPLIT]. May end in a
    slice such as ``[:200]``. Or a list of ``{path: SOURCE, weight: NUMBER, format: COLUMNS}``:
    samples are taken from the sources in the ratio of their weights, all through the run, and each
    source is shuffled and repeated by itself; needs ``train.steps``. Without weights, the sources
    are trained on as if they were one file. A source without ``format`` has ``data.format``."""
    eval: str | int | float | None = None
    """Evaluation data: another source, or the part of ``data.train`` to hold out, as a number of
    samples (int) or a fraction (float)."""
    format: str | dict[str, str] = "auto"
    """Columns of the data. ``auto`` recognises chat messages, ShareGPT conversations, prompt and
    completion, and Alpaca's instruction, input and output. A mapping names them instead:
    ``{messages: COLUMN}`` or ``{prompt: COLUMN, completion: COLUMN}``; it may also map input,
    system, tools, functions, documents and chat_template_kwargs."""
    allow_left_out: list[LeftOut] = field(default_factory=list)
    """Parts of a row that may be missing from the text: parts that the chat template does not print
    (reasoning, name, tools, documents) or columns by name (input, ...). They are counted and
    reported; any other part that would be lost is an error."""
    max_length: int = 4096
    """Maximum length of a sample in tokens, see ``data.too_long``."""
    too_long: TooLong = "left_out"
    """What becomes of samples of more than ``data.max_length`` tokens, which are counted and
    reported in any case. ``left_out``: they are not trained on; ``truncate_right`` and
    ``truncate_left``: their end or their beginning is cut off; ``split``: they become several
    samples, without a token in the loss being lost. A part without any is left out."""
    cache: str | None = None
    """Folder for tokenised samples. They are kept there by content of data, tokenizer, chat
    template and the options above, and used by every later run. Default: ``$MEGALORA_CACHE``, else
    ``megalora/tokens`` in ``$HF_HOME``, else in ``$XDG_CACHE_HOME`` or ``~/.cache``. Any folder in
    it may be removed at any time; ``megalora data CONFIG --stores`` lists them, and
    ``--remove-unused DAYS`` removes those that were not used for so long."""
    workers: int | None = None
    """Processes that tokenise data for which there are no samples in the cache. Default: as many as
    there are cores, and rows for."""
    seed: int = 0
    """Seed for the order of samples and for the choice of held-out samples."""

    def __post_init__(self) -> None:
        # Frozen, so not by assignment.
        if isinstance(self.train, str):
            object.__setattr__(self, "train", expand(self.train, "data.train"))
        weights = [source.weight for source in self.sources]
        # Before anything counts sources: an empty list would train on nothing.
        require(bool(weights), "data.train is an empty list; name a source")
        require(
            None not in weights or not any(weights),
            "data.train: some sources have a weight and some have none; give each one, or none",
        )
        # A number says how many samples, or which part of them, to hold out.
        if isinstance(self.eval, str):
            object.__setattr__(self, "eval", expand(self.eval, "data.eval"))
        # An empty text is not the default, which is to leave the key out.
        require(self.cache != "", "data.cache is empty: name a folder, or leave it out")
        if self.cache is not None:
            object.__setattr__(self, "cache", expand(self.cache, "data.cache"))
        require(
            self.workers is None or self.workers >= 1,
            f"data.workers must be at least 1, got {self.workers}",
        )
        # n tokens give n - 1 predictions.
        require(
            self.max_length >= 2,
            f"data.max_length must be at least 2 tokens, got {self.max_length}",
        )

    @property
    def sources(self) -> list[Source]:
        """The sources of training data: one where ``train`` is a text."""
        if isinstance(self.train, str):
            return [Source(path=self.train)]
        return self.train

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of each source; empty where they have none."""
        return tuple(source.weight for source in self.sources if source.weight is not None)
