"""The moving average of the adapter: its values, its files, resumption, memory, refusals."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from megalora.adapters.files import AVERAGE_KEY
from megalora.config import CheckpointConfig, TrainConfig
from megalora.config.train import Relora
from megalora.hf.json_file import read_hf_config
from megalora.lora.init import initial_a
from megalora.model.fields import model_shape
from megalora.planner.layouts import ParallelLayout
from megalora.planner.memory import memory_of
from megalora.planner.workload import Workload
from megalora.train.average import average_of
from megalora.train.loop import train
from tests.distributed.ranks import run_ranks
from tests.parity.built import built
from tests.parity.runs import make_config
from tests.whole_state import INDEX, sum_anew, tensors_of, whole_state

DECAY = 0.7
STEPS = 4


def run(
    base: Path, chats: Path, out: Path, world: int, parallel: dict[str, Any], **options
) -> Path:
    """A training that keeps the checkpoint of every step."""
    resume = options.pop("resume", False)
    config = make_config(
        base, chats, out, parallel, lr=1e-2, ema_decay=DECAY, **{"steps": STEPS, **options}
    )
    every = CheckpointConfig(dir=str(out), every=1, keep=0, resume=resume)
    run_ranks(train, world, replace(config, checkpoint=every))
    return out


def adapter_at(out: Path, step: int) -> dict[str, Tensor]:
    """Float32 factors of a checkpoint by name."""
    found = {}
    for name, value in whole_state(out / f"step_{step:06d}").items():
        if name.startswith("param."):
            found[name.removeprefix("param.")] = value
    return found


@pytest.mark.slow
def test_the_average_and_its_adapter(tiny: Path, chats: Path, tmp_path: Path) -> None:
    out = run(tiny, chats, tmp_path / "run", 2, {"tp": 2, "ep": 2})
    expected: dict[str, Tensor] = {}
    for name, value in adapter_at(out, 1).items():
        # What a run begins with: A is drawn, B is zero.
        expected[name] = torch.zeros_like(value, dtype=torch.float64)
        if ".lora_A." in name:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            expected[name] = initial_a(0, module, *value.shape).double()
    for step in range(1, STEPS + 1):
        for name, value in adapter_at(out, step).items():
            expected[name] = DECAY * expected[name] + (1 - DECAY) * value.double()
    checkpoint = out / f"step_{STEPS:06d}"
    found = tensors_of(checkpoint, AVERAGE_KEY)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-6, atol=1e-7)
    # An adapter of its own, which is another one than that of the last step.
    model = AutoModelForCausalLM.from_pretrained(tiny)
    loaded = PeftModel.from_pretrained(model, str(checkpoint / "ema"))
    attention = "base_model.model.model.layers.0.self_attn.q_proj.lora_B"
    theirs = loaded.get_submodule(attention)["default"].weight  # pyright: ignore[reportIndexIssue]
    torch.testing.assert_close(theirs, found[f"{attention}.weight"])
    assert not torch.allclose(theirs, adapter_at(out, STEPS)[f"{attention}.weight"], rtol=1e-2)


@pytest.mark.slow
def test_a_resumed_run_goes_on_averaging(tiny: Path, chats: Path, tmp_path: Path) -> None:
    """At another layout, as if it had not been stopped."""
    through = run(tiny, chats, tmp_path / "through", 1, {})
    run(tiny, chats, tmp_path / "half", 2, {"tp": 2, "ep": 2}, steps=2)
    half = run(tiny, chats, tmp_path / "half", 2, {"pp": 2}, resume=True)
    found = tensors_of(half / f"step_{STEPS:06d}", AVERAGE_KEY)
    for name, value in tensors_of(through / f"step_{STEPS:06d}", AVERAGE_KEY).items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=3e-5)
    with pytest.raises(Exception, match=f"train.ema_decay={DECAY}, this run has 0.9"):
        run_ranks(train, 1, _with_other_decay(tiny, chats, half))
    index = half / f"step_{STEPS:06d}" / INDEX
    index.write_text(index.read_text().replace(f',"{AVERAGE_KEY}"', ""))
    sum_anew(half / f"step_{STEPS:06d}")
    with pytest.raises(Exception, match=r"index.json has no average"):
        run(tiny, chats, half, 1, {}, steps=STEPS + 1, resume=str(half / f"step_{STEPS:06d}"))


def _with_other_decay(base: Path, chats: Path, out: Path) -> Any:
    config = make_config(base, chats, out, {}, lr=1e-2, ema_decay=0.9, steps=STEPS + 1)
    return replace(config, checkpoint=CheckpointConfig(dir=str(out), resume=True))


def held_bytes(config: Any) -> int:
    """Bytes of a rank's average; a rank function."""
    with built(config) as assembled:
        average = average_of(assembled.model, config.train.ema_decay, None)
        assert average is not None
        return sum(value.nbytes for value in average.values.values())


def test_its_memory_is_planned(tiny: Path, chats: Path, tmp_path: Path) -> None:
    """To the byte, also where the adapters are bfloat16."""
    parallel = {"tp": 2, "ep": 2}
    config = make_config(tiny, chats, tmp_path, parallel, dtype="bfloat16", ema_decay=DECAY)
    layout = ParallelLayout(parallel=config.parallel, num_ranks=2)
    shape = model_shape(read_hf_config(tiny))
    plan = memory_of(shape, config.lora, layout, Workload.of(config))
    assert run_ranks(held_bytes, 2, config) == [plan["average of adapters"]] * 2


def test_refused() -> None:
    for decay in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"train.ema_decay must be in \[0, 1\)"):
            TrainConfig(steps=4, ema_decay=decay)
    with pytest.raises(ValueError, match="leave one of the two out"):
        TrainConfig(steps=4, ema_decay=0.9, relora=Relora(every=2))
