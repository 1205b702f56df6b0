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
    """Whether to show a progress bar on the terminal. Without one, and where there is no terminal,
    each logged step is a line with the time that is left and the first rank's memory."""
    wandb: str | None = None
    """Project of Weights & Biases to log to, beside the run folder. Needs the package
    (``megalora[wandb]``); key, entity and mode come from its own environment variables."""
    mlflow: str | None = None
    """Experiment of MLflow to log to, likewise (``megalora[mlflow]``); the server is the one that
    MLFLOW_TRACKING_URI names."""

    def __post_init__(self) -> None:
        require(self.every >= 1, f"log.every must be at least 1, got {self.every}")
        for name in ("wandb", "mlflow"):
            require(
                getattr(self, name) != "",
                f"log.{name} is empty: name where to log to, or leave it out",
            )
