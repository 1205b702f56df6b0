"""Go on from a checkpoint that the version before format 2 has saved, to its bits."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megalora.config import CheckpointConfig, LoRAConfig
from megalora.train.loop import train
from tests.distributed.ranks import run_ranks
from tests.parity.runs import make_config, records
from tests.whole_state import INDEX

STEP_3 = 6.946774253362341
"""Loss of the third step of the run that made it."""


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_goes_on(world: int, tiny: Path, chats: Path, tmp_path: Path) -> None:
    """On one rank with its dropout; on two, masks are drawn anew, and the line says so."""
    shutil.copytree(Path(__file__).parent / "format_1", tmp_path / "run")
    lora = LoRAConfig(
        rank=2, alpha=6.0, target_modules=["q_proj", "o_proj"], layers=[1], dropout=0.1
    )
    config = make_config(
        tiny, chats, tmp_path / "run", {"tp": world}, lora=lora, steps=3, ema_decay=0.5,
        global_batch_size=4,
    )  # fmt: skip
    config = replace(config, checkpoint=CheckpointConfig(dir=str(tmp_path / "run"), resume=True))
    run_ranks(train, world, config)
    [loss] = records(tmp_path / "run", "loss")
    # Another dropout moves it by as much as a step does.
    assert loss == pytest.approx(STEP_3, rel=1e-9 if world == 1 else 1e-2)
    assert (tmp_path / "run/step_000003" / INDEX).is_file()
