"""The ``checkpoint`` section: where a run is saved and what it resumes from."""

import re
from dataclasses import dataclass
from typing import Literal

from megalora.config.checks import require
from megalora.paths import expand

ADAPTER_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
"""Pattern of the name of an adapter that is served: it is part of an id and of a path."""


@dataclass(frozen=True, kw_only=True)
class SnapshotConfig:
    """Snapshots in memory, from which ranks that are started again go on."""

    every: int = 1
    """Number of steps from one to the next."""
    replicate: int = 0
    """Number of steps from one replica at the neighbour node to the next, a multiple of ``every``:
    by it a run of several nodes goes on where one of them is lost. 0 makes none."""

    def __post_init__(self) -> None:
        require(
            self.every >= 1,
            f"checkpoint.snapshots.every must be at least 1, got {self.every}",
        )
        require(
            self.replicate >= 0 and self.replicate % self.every == 0,
            f"checkpoint.snapshots.replicate={self.replicate} must be a multiple of every="
            f"{self.every}, or 0: replicas are made of snapshots",
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    dir: str = "runs/default"
    """The run folder. One run writes to it; a second one is refused at its start."""
    every: int | Literal["auto"] = 0
    """Number of steps between checkpoints. 0 saves only at the end and on SIGTERM. ``auto`` begins
    one at every step where the last is on disk and saving has taken no more than a twentieth of the
    time since; it needs ``checkpoint.keep``."""
    keep: int = 0
    """Number of checkpoints to keep; older ones are deleted. 0 keeps all."""
    keep_best: bool = False
    """Whether to save a checkpoint at every evaluation with a new lowest loss, in addition to
    ``checkpoint.every``, and to keep the one of the lowest loss beside the ``checkpoint.keep``
    newest ones. The file ``best`` names it, so that ``RUN/best`` is an adapter to every command.
    Needs ``data.eval`` and ``train.eval_every``."""
    on_error: Literal["stop", "continue"] = "stop"
    """What a run does when a checkpoint cannot be written, such as on a full disk: ``stop`` with
    the reason, or ``continue`` with a line and try again at the next one. Earlier checkpoints stay
    whole. Where the last one of a run fails, the run fails."""
    snapshots: SnapshotConfig | None = None
    """Snapshots in host memory, by which ranks that have failed start again within seconds:
    ``{every: 1}`` takes one behind every step. A launcher that has imported everything holds them
    and forks the ranks; see docs/runs.md. ``{every: 1, replicate: 1}`` sends each to another node,
    too, for where a whole node is lost. Needs ``megalora train --max-restarts N``. null takes
    none."""
    resume: bool | str = False
    """true resumes from the newest checkpoint in ``checkpoint.dir`` if there is one; a path resumes
    from that checkpoint, or from the latest one of that run folder."""
    serve: str | None = None
    """URL of a running vLLM server, such as ``megalora serve`` starts. Each checkpoint is loaded
    there when it is saved and replaces the one before."""
    serve_name: str | None = None
    """Name that checkpoints are served under, which requests give as their model. null takes the
    name of the run folder."""

    def __post_init__(self) -> None:
        # A frozen dataclass has no other way to normalise its own fields.
        object.__setattr__(self, "dir", expand(self.dir, "checkpoint.dir"))
        if isinstance(self.resume, str):
            object.__setattr__(self, "resume", expand(self.resume, "checkpoint.resume"))
        require(
            self.serve is None or self.serve.startswith(("http://", "https://")),
            f"checkpoint.serve={self.serve} is not the URL of a server; write it as"
            " http://HOST:PORT",
        )
        require(
            self.serve_name is None or re.fullmatch(ADAPTER_NAME, self.serve_name) is not None,
            f"checkpoint.serve_name={self.serve_name!r} must be letters, digits, '.', '_' and '-',"
            " and begin with a letter or a digit",
        )
        for name in ("every", "keep"):
            value = getattr(self, name)
            require(
                value == "auto" or value >= 0,
                f"checkpoint.{name} must not be negative, got {value}",
            )
        require(
            self.every != "auto" or self.keep > 0,
            "checkpoint.every=auto saves as often as the disk allows: set checkpoint.keep, the"
            " number of checkpoints to keep",
        )
