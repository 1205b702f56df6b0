"""Check what ``megalora logits`` is asked for, and run it on the ranks of torchrun.

torchrun --nproc-per-node N -m megalora.train.logits_command OUT K CONFIG [section.key=value ...]
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megalora.config import RunConfig
from megalora.config.checks import require
from megalora.data.logits_header import is_logits_folder
from megalora.user_error import guarded

LARGEST_K = 1024


@dataclass(frozen=True)
class LogitsRequest:
    """What ``megalora logits`` is asked for."""

    config: RunConfig
    out: Path
    k: int

    def check(self) -> None:
        """Raise ``ValueError`` for what can be found wrong without torch."""
        objective = self.config.objective
        p = self.config.parallel
        require(
            objective.name == "distill" and objective.teacher_model is not None,
            "megalora logits asks the model of objective.teacher: the config needs"
            f" objective.name=distill and the folder or hub name of a model; it has"
            f" objective.name={objective.name}, objective.teacher={objective.teacher}",
        )
        require(
            not is_logits_folder(objective.teacher_model or ""),
            f"objective.teacher={objective.teacher} is a folder of logits, not a model",
        )
        # A row's target tokens are gathered in order; what is written is read under any layout.
        require(p.cp == 1, f"megalora logits needs parallel.cp=1, got {p.cp}")
        require(1 <= self.k <= LARGEST_K, f"--k must be from 1 to {LARGEST_K}, got {self.k}")


def main(arguments: Sequence[str]) -> None:
    from megalora.config.file import load_config
    from megalora.environment import set_defaults

    if len(arguments) < 3:
        raise ValueError("usage: megalora logits CONFIG.yaml --out FOLDER; see megalora logits -h")
    out, k, path, *overrides = arguments
    config = load_config(path, overrides)
    set_defaults(Path(out))  # before torch is imported
    from megalora import host

    # Here too: on several nodes nothing else looks before the ranks start.
    LogitsRequest(config, Path(out), int(k)).check()
    config.check_world(host.world_size())
    host.install()
    import torch.distributed as dist

    from megalora.train.write_logits import write_logits

    with host.process_group(config.train.timeout_minutes):
        write_logits(config, Path(out), int(k))
        if dist.get_rank() == 0:
            print(f"wrote {out}", flush=True)


if __name__ == "__main__":
    guarded(main, sys.argv[1:])
