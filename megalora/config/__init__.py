"""The config of a run as frozen dataclasses, one section per file, with its checks.

Checks that need no model run in ``__post_init__``; checks against the world size and the model's
shape are methods, so that they run before any process group or weight exists. ``file.py`` reads and
writes YAML.
"""

from megalora.config.checkpoint import CheckpointConfig
from megalora.config.data import DataConfig, LeftOut, LeftOutOfText, Source, TooLong
from megalora.config.log import LogConfig
from megalora.config.lora import LoRAConfig
from megalora.config.model import ModelConfig
from megalora.config.objective import ObjectiveConfig
from megalora.config.parallel import ParallelConfig
from megalora.config.recompute import LEVELS, Level, Recompute, RecomputeLayers
from megalora.config.rl import RLConfig
from megalora.config.run import RunConfig
from megalora.config.train import SkipSpikes, TrainConfig

__all__ = [
    "LEVELS",
    "CheckpointConfig",
    "DataConfig",
    "LeftOut",
    "LeftOutOfText",
    "Level",
    "LoRAConfig",
    "LogConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "ParallelConfig",
    "RLConfig",
    "Recompute",
    "RecomputeLayers",
    "RunConfig",
    "SkipSpikes",
    "Source",
    "TooLong",
    "TrainConfig",
]
