"""A model with its adapters switched off is the base, bit for bit, and has them again behind it."""

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megalora.config import LoRAConfig, RunConfig
from megalora.lora.switched_off import adapters_off
from megalora.objectives.sft import SFT
from megalora.parallel import parallel_groups
from megalora.train.assemble import build_for_training
from megalora.train.step import Stepper
from tests.distributed.ranks import run_ranks
from tests.parity.built import built, random_adapter
from tests.parity.models import ADAPTERS
from tests.parity.runs import make_config


def losses(config: RunConfig, weights: Path) -> dict[str, Tensor]:
    """Losses of every token of a row with the adapters on, off and on again, and of a model without
    any; a rank function."""
    with built(config, weights) as run:
        rows = [run.batches.first(0)] * config.parallel.round_multiple
        before = {p: p.data.data_ptr() for p in run.model.parameters}
        found = {"on": run.stepper.token_losses(rows)}
        with suppress(KeyError), adapters_off(run.model.chunks):
            found["off"] = run.stepper.token_losses(rows)
            raise KeyError("whatever happens in the block")
        found["again"] = run.stepper.token_losses(rows)
        # The very memory that the optimizer and the reductions know.
        assert {p: p.data.data_ptr() for p in run.model.parameters} == before
        assert all(p.abs().max() > 0 for p in run.model.parameters)
        shape = run.model.shape
    with parallel_groups(config.parallel, config.train.seed) as groups:
        bare = build_for_training(config, shape, [], groups)
        found["base"] = Stepper(bare.chunks, groups, SFT()).token_losses(rows)
        del bare
    return found


@pytest.mark.parametrize(
    ("parallel", "dtype"),
    [
        ({"ep": 2}, "float32"),
        pytest.param({"ep": 2}, "bfloat16", marks=pytest.mark.slow),
        pytest.param({"tp": 2, "pp": 2, "vpp": 2}, "float32", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_off_is_the_base(
    parallel: dict[str, int], dtype: str, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    check_off(ADAPTERS["router"], parallel, dtype, tiny, chats, tmp_path)


@pytest.mark.slow
def test_magnitudes_off_are_the_base(tiny: Path, chats: Path, tmp_path: Path) -> None:
    """In bfloat16 too, and of rows whose norms are sums over ranks."""
    lora = LoRAConfig(rank=4, target_modules=["q_proj", "v_proj", "o_proj"], use_dora=True)
    check_off(lora, {"tp": 2, "ep": 2}, "bfloat16", tiny, chats, tmp_path)


@pytest.mark.slow
def test_what_an_adapter_began_as_is_off_too(tiny: Path, chats: Path, tmp_path: Path) -> None:
    check_off(ADAPTERS["begun"], {"tp": 2, "ep": 2}, "bfloat16", tiny, chats, tmp_path)


@pytest.mark.slow
def test_biases_of_b_are_off_too(everything: Path, chats: Path, tmp_path: Path) -> None:
    check_off(ADAPTERS["lora bias"], {"tp": 2, "ep": 2}, "float32", everything, chats, tmp_path)


def check_off(
    lora: LoRAConfig, parallel: dict[str, int], dtype: str, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    config = make_config(tiny, chats, tmp_path, parallel, lora=lora, dtype=dtype)
    random_adapter(tmp_path / "start.safetensors", lora, tiny)
    world = 4 if "pp" in parallel else 2
    for found in run_ranks(losses, world, config, tmp_path / "start.safetensors"):
        assert torch.equal(found["off"], found["base"])
        assert torch.equal(found["on"], found["again"])
        assert (found["on"] - found["off"]).abs().max() > 0.1
