"""The ``log`` section: what a run writes down."""

from dataclasses import dataclass

from megalora.config.checks import require


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    every: int = 1
    """Steps between lines in metrics.jsonl."""
    tensorboard: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        require(self.every >= 1, f"log.every must be at least 1, got {self.every}")
