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

    samples: int | list[str] = 0
    """Answers to generate at every evaluation, whether or not there is data for one: to the last
    questions of the first so many rows of the evaluation data, or of the training data where there
    is none; or to each message of a list, as in ``["What is 6 times 7?"]``. They are greedy, by the
    model as it is, and go to the log, ``answers.jsonl``, TensorBoard, W&B, MLflow and the report.
    Needs pp and cp of 1."""
    sample_tokens: int = 64
    """Tokens of such an answer, at most."""

    def __post_init__(self) -> None:
        require(self.every >= 1, f"log.every must be at least 1, got {self.every}")
        if isinstance(self.samples, int):
            require(self.samples >= 0, f"log.samples must not be negative, got {self.samples}")
        else:
            require(
                all(text.strip() for text in self.samples),
                "log.samples holds an empty message; write one, or leave it out",
            )
        require(
            self.sample_tokens >= 1,
            f"log.sample_tokens must be at least 1, got {self.sample_tokens}",
        )
        for name in ("wandb", "mlflow"):
            require(
                getattr(self, name) != "",
                f"log.{name} is empty: name where to log to, or leave it out",
            )
