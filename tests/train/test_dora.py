"""Train DoRA as ``train`` does: what a checkpoint holds, what decays, and how a run is resumed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megalora.adapters.export import export
from megalora.config import CheckpointConfig, LoRAConfig, ObjectiveConfig, RunConfig
from megalora.config.train import Relora
from megalora.train.loop import train
from tests.distributed.ranks import run_ranks
from tests.parity.built import built
from tests.parity.runs import make_config, records
from tests.whole_state import whole_state

DORA = LoRAConfig(
    rank=4, alpha=12.0, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], use_dora=True
)
ON_EXPERTS = LoRAConfig(rank=4, alpha=12.0, use_dora=True)
IN_PARTS = LoRAConfig(rank=4, alpha=12.0, use_dora=["q_proj", "up_proj", "down_proj"])
WEIGHTS = "adapter_model.safetensors"


def resumed(config: RunConfig, out: Path, at: Path) -> RunConfig:
    return replace(config, checkpoint=CheckpointConfig(dir=str(out), resume=str(at)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lora", "parallel", "rest"),
    [
        (DORA, {}, {"tp": 2, "ep": 2}),
        (DORA, {"tp": 2, "pp": 2}, {"pp": 2, "vpp": 2}),
        # Experts: each rank has others, and parts of the rows of gate and up.
        (ON_EXPERTS, {"tp": 2, "ep": 2, "etp": 2}, {"ep": 2}),
        (IN_PARTS, {}, {"tp": 2, "etp": 2}),
    ],
)
def test_a_run_goes_on_in_another_layout(
    lora: LoRAConfig,
    parallel: dict[str, int],
    rest: dict[str, int],
    tiny: Path,
    chats: Path,
    tmp_path: Path,
) -> None:
    """From the saved magnitudes, and from the norms of the saved A and B, which no file has."""
    config = make_config(tiny, chats, tmp_path / "whole", parallel, lora=lora, steps=3, lr=1e-2)
    checkpoint = CheckpointConfig(dir=str(tmp_path / "whole"), every=2)
    run_ranks(train, 4 if "tp" in parallel else 1, replace(config, checkpoint=checkpoint))
    other = make_config(tiny, chats, tmp_path / "rest", rest, lora=lora, steps=3, lr=1e-2)
    run_ranks(train, 2, resumed(other, tmp_path / "rest", tmp_path / "whole/step_000002"))
    # Sums in another order; the norms of before the steps would be 1e-3 and more off.
    found = records(tmp_path / "rest", "loss")
    assert found == pytest.approx(records(tmp_path / "whole", "loss")[2:], rel=3e-6)
    whole = load_file(tmp_path / "whole/step_000003" / WEIGHTS)
    for name, tensor in load_file(tmp_path / "rest/step_000003" / WEIGHTS).items():
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=2e-5)


@pytest.mark.slow
def test_magnitudes_are_float32_in_a_bfloat16_run(tiny: Path, chats: Path, tmp_path: Path) -> None:
    config = make_config(
        tiny, chats, tmp_path, {"tp": 2, "ep": 2}, lora=DORA, steps=1, lr=1e-5, dtype="bfloat16"
    )
    run_ranks(train, 2, config)
    tensors = load_file(tmp_path / "step_000001" / WEIGHTS)
    masters = whole_state(tmp_path / "step_000001")
    magnitudes = 0
    for name, tensor in tensors.items():
        if not name.endswith("lora_magnitude_vector"):
            assert tensor.dtype == torch.bfloat16
            continue
        magnitudes += 1
        assert torch.equal(tensor, masters[f"param.{name}"])
        # A step of 1e-5 is far below what bfloat16 can tell apart.
        assert not torch.equal(tensor, tensor.bfloat16().float())
    assert magnitudes == 16
    # A checkpoint is exported with its masters, and PEFT's file has them, too.
    export(tmp_path / "step_000001", tmp_path / "out", engine="peft")
    for name, tensor in load_file(tmp_path / "out" / WEIGHTS).items():
        assert torch.equal(tensor, tensors[name]), name


def decays(config: RunConfig) -> dict[str, float]:
    """Weight decay by the kind of parameter; a rank function."""
    found: dict[str, float] = {}
    with built(config) as run:
        names: dict[Any, str] = {}
        for chunk in run.model.chunks:
            names |= {parameter: name for name, parameter in chunk.named_parameters()}
        for part in run.optimizer.chained_optimizers:
            for parameter in part.model_param_group_index_map:
                group, _ = part.model_param_group_index_map[parameter]
                settings = part.optimizer.param_groups[group]
                kind = names[parameter].split(".lora_")[1][0]
                found[kind] = settings["weight_decay"] * settings["wd_mult"]
    return found


def test_decay_and_the_rate_of_b(tiny: Path, chats: Path, tmp_path: Path) -> None:
    config = make_config(tiny, chats, tmp_path, {}, lora=DORA, weight_decay=0.1)
    assert run_ranks(decays, 1, config)[0] == {"A": 0.1, "B": 0.1, "M": 0.0}


def test_what_dora_cannot_be_beside_is_refused(tiny: Path, chats: Path, tmp_path: Path) -> None:
    dpo = ObjectiveConfig(name="dpo", reference="start")
    with pytest.raises(ValueError, match=r"objective.reference=start, .* use_dora"):
        make_config(tiny, chats, tmp_path, {}, lora=DORA, objective=dpo)
    config = make_config(tiny, chats, tmp_path, {}, lora=DORA)
    served = CheckpointConfig(dir=str(tmp_path), serve="http://127.0.0.1:8000")
    with pytest.raises(ValueError, match=r"checkpoint.serve: vLLM does not load DoRA"):
        replace(config, checkpoint=served)
    merging = replace(config.train, relora=Relora(every=1))
    with pytest.raises(ValueError, match=r"lora.use_dora: train.relora adds up B A"):
        replace(config, train=merging)
    averaging = replace(config.train, ema_decay=0.9)
    with pytest.raises(ValueError, match=r"lora.use_dora: train.ema_decay averages"):
        replace(config, train=averaging)
