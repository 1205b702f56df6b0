"""Check a run before its ranks start, so that a mistake shows once, in a line, and at once. Needs
no torch."""

from collections.abc import Sequence
from pathlib import Path

from megalora.config import RunConfig
from megalora.config_file import load_config
from megalora.lora.spec import plan
from megalora.paths import check_paths


def check_run(path: str | Path, overrides: Sequence[str], num_ranks: int) -> RunConfig:
    """Read a run's config and check it against its files and the number of ranks.

    A base model that is only on the hub is left to the ranks, which download it.

    Raises:
        ValueError: the first thing that the ranks would refuse.
    """
    config = load_config(path, overrides)
    config.check_world(num_ranks)
    check_paths(config)
    base = Path(config.model.path)
    if base.is_dir():
        plan(config.lora, config.parallel, base)
    return config
