"""The ``checkpoint`` section: where a run is saved, and what it goes on from."""

from dataclasses import dataclass

from megalora.config.checks import require
from megalora.paths import expand


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    dir: str = "runs/default"
    """The run folder."""
    every: int = 0
    """Steps between checkpoints; 0 saves only at the end and on SIGTERM."""
    keep: int = 0
    """How many of the newest checkpoints to keep; 0 keeps all."""
    resume: bool | str = False
    """true: continue from the newest checkpoint in dir if there is one; a path: from that
    checkpoint."""
    serve: str | None = None
    """URL of a running vLLM server, such as ``megalora serve`` starts: every checkpoint is loaded
    there, in place of the last."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "dir", expand(self.dir, "checkpoint.dir"))
        if isinstance(self.resume, str):
            object.__setattr__(self, "resume", expand(self.resume, "checkpoint.resume"))
        require(
            self.serve is None or self.serve.startswith(("http://", "https://")),
            f"checkpoint.serve={self.serve} is no URL of a server; write it as http://HOST:PORT",
        )
        for name in ("every", "keep"):
            require(
                getattr(self, name) >= 0,
                f"checkpoint.{name} must not be negative, got {getattr(self, name)}",
            )
