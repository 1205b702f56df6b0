"""A run that goes on in another layout."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megalora.config import LoRAConfig
from megalora.train.loop import train
from tests.distributed.ranks import run_ranks
from tests.parity.everything import config_of
from tests.parity.runs import records


def resume_elsewhere(
    base: Path, chats: Path, out: Path, lora: LoRAConfig, **options: Any
) -> tuple[str, Path]:
    """Train four steps at EP 2, and the last two of them again at TP 2 x ETP 2 with the same
    losses; returns the checkpoint in the middle and the last one of the second layout."""
    config = config_of(base, chats, out / "whole", {"ep": 2}, lora, **options)
    run_ranks(train, 2, replace(config, checkpoint=replace(config.checkpoint, every=2)))
    other = config_of(base, chats, out / "rest", {"tp": 2, "etp": 2}, lora, **options)
    start = str(out / "whole/step_000002")
    run_ranks(train, 2, replace(other, checkpoint=replace(other.checkpoint, resume=start)))
    # Sums in another order: the limit of the grid for a loss in float32.
    assert records(out / "rest", "loss") == pytest.approx(
        records(out / "whole", "loss")[2:], rel=1e-6
    )
    return start, out / "rest/step_000004"
