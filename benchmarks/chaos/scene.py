"""Make what all faults are injected into: a tiny base, chats, and the config of a short run."""

import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from megalora.data.arithmetic import write_arithmetic
from megalora.tiny import make_tiny

RANKS = 2
STEPS = 100_000
"""More than any run here takes, so that each ends by a fault or a signal. The learning rate does
not depend on it."""


@dataclass(frozen=True)
class Scene:
    """Files that runs read."""

    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def chats(self) -> Path:
        return self.folder / "chats.jsonl"

    @property
    def config(self) -> Path:
        return self.folder / "run.yaml"

    def run(self, name: str) -> Path:
        """Where the run of this name saves."""
        return self.folder / name


def make_scene(folder: Path) -> Scene:
    """Write base, chats and config."""
    scene = Scene(folder)
    make_tiny(scene.base)
    write_arithmetic(scene.chats, 96, seed=0)
    config = {
        "model": {"path": str(scene.base), "dtype": "float32"},
        "parallel": {"ep": RANKS},
        "lora": {"rank": 4, "alpha": 8},
        "data": {"train": str(scene.chats), "max_length": 128},
        "train": {
            "steps": STEPS, "global_batch_size": 4, "micro_batch_size": 2, "lr": 1e-3,
            "schedule": "constant", "check_base": "off",
        },
        "checkpoint": {"dir": str(scene.run("run")), "every": 1, "keep": 3, "resume": True},
        "log": {"tensorboard": False, "progress": False},
    }  # fmt: skip
    scene.config.write_text(yaml.safe_dump(config))
    return scene


def steps_logged(run: Path) -> list[str]:
    """Records of finished steps, as they stand in ``metrics.jsonl``."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    # The last line may be half written.
    whole = path.read_text().rpartition("\n")[0].splitlines()
    return [line for line in whole if '"loss"' in line]


def step_of(record: str) -> int:
    """Number of the step of a record."""
    return int(json.loads(record)["step"])
