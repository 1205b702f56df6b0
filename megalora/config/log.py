"""The ``log`` section: what a run reports while it trains."""

from dataclasses import dataclass

from megalora.config.checks import require


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    every: int = 1
    """Number of steps between lines in ``metrics.jsonl``."""
    tensorboard: bool = True
    """Whether to write TensorBoard files to ``tensorboard/`` in the run folder."""
    progress: bool = True
    """Whether to show a progress bar on the terminal."""

    def __post_init__(self) -> None:
        require(self.every >= 1, f"log.every must be at least 1, got {self.every}")
