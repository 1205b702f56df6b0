"""A model with its adapters switched off is the base, bit for bit, and has them again behind it."""

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megalora.config import LoRAConfig, RunConfig
from megalora.lora.switched_off import adapters_off
from tests.distributed.ranks import run_ranks
from tests.parity.built import built, random_adapter
from tests.parity.models import ADAPTERS
from tests.parity.runs import make_config


def losses(config: RunConfig, weights: Path, base: RunConfig) -> dict[str, Tensor]:
    """Losses of every token of a row with the adapters on, off and on again, and of a base without
    any; a rank function."""
    with built(config, weights) as run:
        row = [run.batches.first(0)] * config.parallel.round_multiple
        before = {p: p.data for p in run.model.parameters}
        found = {"on": run.stepper.token_losses(row)}
        with suppress(KeyError), adapters_off(run.model.chunks):
            found["off"] = run.stepper.token_losses(row)
            raise KeyError("whatever happens in the block")
        found["again"] = run.stepper.token_losses(row)
        # The very tensors that the optimizer and the reductions know.
        assert all(p.data is before[p] or p.data.data_ptr() == before[p].data_ptr() for p in before)
        assert all(p.abs().max() > 0 for p in run.model.parameters)
    with built(base) as run:
        # A fresh B is zero.
        found["base"] = run.stepper.token_losses(row)
    return found


@pytest.mark.parametrize(
    "parallel",
    [{"ep": 2}, pytest.param({"tp": 2, "pp": 2, "vpp": 2}, marks=pytest.mark.slow)],
    ids=str,
)
def test_off_is_the_base(parallel: dict[str, int], tiny: Path, chats: Path, tmp_path: Path) -> None:
    lora: LoRAConfig = ADAPTERS["router"]
    config = make_config(tiny, chats, tmp_path, parallel, lora=lora)
    random_adapter(tmp_path / "start.safetensors", lora, tiny)
    world = 4 if "tp" in parallel else 2
    for found in run_ranks(losses, world, config, tmp_path / "start.safetensors", config):
        assert torch.equal(found["off"], found["base"])
        assert torch.equal(found["on"], found["again"])
        assert (found["on"] - found["off"]).abs().max() > 0.1
