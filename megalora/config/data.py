"""The ``data`` section: what is trained on."""

from dataclasses import dataclass, field
from typing import Literal

from megalora.config.checks import require
from megalora.paths import expand

LeftOutOfText = Literal["reasoning", "name", "tools", "documents"]
"""What a chat template may leave out of the text where ``data.allow_left_out`` names it."""
LeftOut = Literal[
    LeftOutOfText,
    "system", "system_prompt", "input", "instruction", "context", "history", "functions",
    "chat_template_kwargs", "thinking", "reasoning_content", "images", "image", "videos", "audios",
]  # fmt: skip
"""What ``data.allow_left_out`` may name: parts of a conversation, and columns that belong to it."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    train: str
    """JSONL, JSON or Parquet file, or hub data set NAME[:SPLIT]; may end in a slice such as
    [:200]."""
    eval: str | int | float | None = None
    """Another source, or how much of train to hold out: a count (int) or a fraction (float)."""
    format: str | dict[str, str] = "auto"
    """auto (messages, ShareGPT's conversations, prompt and completion, Alpaca's instruction, input
    and output) or a column mapping: {messages: COLUMN} or {prompt: COLUMN, completion: COLUMN}, and
    where they have other names: input, system, tools, functions, documents,
    chat_template_kwargs."""
    allow_left_out: list[LeftOut] = field(default_factory=list)
    """What may be missing from the text all the same, counted and reported: parts that the chat
    template does not print (reasoning, name, tools, documents), or columns by name (input, ...)."""
    max_length: int = 4096
    """In tokens. Longer samples are left out, counted and reported."""
    seed: int = 0
    """Of the order of samples, and of the hold-out."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "train", expand(self.train, "data.train"))
        if isinstance(self.eval, str):
            object.__setattr__(self, "eval", expand(self.eval, "data.eval"))
        require(
            self.max_length >= 2,
            f"data.max_length must be at least 2 tokens, got {self.max_length}",
        )
