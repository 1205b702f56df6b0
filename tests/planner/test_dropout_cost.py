"""What a run's log says of dropout: bytes of the planner's page, traffic and FLOPs by hand."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from megalora.config import LoRAConfig, ParallelConfig, RunConfig
from megalora.lora.dense import ColumnLoRA, RowLoRA
from megalora.lora.experts import ExpertsLoRA
from megalora.lora.router import RouterLoRA
from megalora.lora.select import resolve
from megalora.lora.without_dropout import without_dropout
from megalora.planner.dropout_cost import dropout_cost
from megalora.planner.models import load_shape
from megalora.train import loop
from megalora.train.loop import train
from tests.distributed.ranks import run_ranks
from tests.parity.runs import make_config
from tests.planner.priced import ARITHMETIC, FREE, MODELS, Constant, seconds

LORA = LoRAConfig(rank=16, dropout=0.1)


def said(tmp_path: Path, ranks: int, *, on_cpu: bool = False, **sizes: int) -> str:
    """Of Qwen3-30B-A3B with 8 samples of 4,096 tokens, one in a row."""
    config = make_config(
        tmp_path, tmp_path / "chats.jsonl", tmp_path / "run", {}, lora=LORA, dtype="bfloat16",
        micro_batch_size=1, global_batch_size=8,
    )  # fmt: skip
    config = replace(
        config, data=replace(config.data, max_length=4096), parallel=ParallelConfig(**sizes)
    )
    shape = load_shape(MODELS / "qwen3_30b_a3b.yaml")
    return dropout_cost(config, shape, resolve(LORA, shape), ranks, on_cpu=on_cpu)


def test_ratios_are_the_planner_s(tmp_path: Path) -> None:
    """Kept bytes are those of docs/planner.md; traffic and FLOPs those of steps priced elsewhere,
    on machines where nothing else takes time."""
    line = said(tmp_path, 1)
    ratios = [float(found) for found in re.findall(r"([0-9.]+) x the", line)]
    assert "(29.7 GiB in place of 14.5)" in line
    assert line.startswith("lora.dropout=0.1 costs, counted: ")
    bytes_alone = replace(FREE, memory=Constant(1.0))
    expected = [29.7 / 14.5]
    for machine in (bytes_alone, ARITHMETIC):
        expected.append(seconds(LORA, machine) / seconds(replace(LORA, dropout=0.0), machine))
    assert ratios == pytest.approx(expected, abs=0.01)
    # Dropout copies; it hardly computes.
    assert ratios[1] > 1.2 and 1 < ratios[2] < 1.05


def test_a_cpu_is_told_whose_traffic_it_is(tmp_path: Path) -> None:
    """Its own operations read and write more without dropout."""
    whose = "x the element-wise memory traffic of a GPU's kernels and"
    assert whose in said(tmp_path, 1, on_cpu=True)
    assert whose not in said(tmp_path, 1)


def trained(config: RunConfig, timed: bool) -> bytes:
    """What a run saves, with or without the passes that are timed; a rank function."""
    if not timed:
        loop.time_dropout = lambda run, step: "not timed"
    folder = train(config)
    assert folder is not None
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_the_log_says_so(
    dropout: float, tiny: Path, chats: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What is counted and what is measured, which changes nothing that is trained."""
    lora = LoRAConfig(rank=4, dropout=dropout)
    saved: list[bytes] = []
    for timed in (True, False) if dropout else (True,):
        folder = tmp_path / f"timed_{timed}"
        folder.mkdir()
        config = make_config(tiny, chats, folder, {"tp": 2}, lora=lora, steps=2)
        saved += run_ranks(trained, 2, config, timed)
        log = capfd.readouterr()
        said = log.out + log.err
        counted = re.findall("lora.dropout=0.25 costs, counted: .*", said)
        assert len(counted) == (1 if dropout else 0)
        measured = re.findall(r"0.25 makes a forward and backward pass (\S+) x as long", said)
        assert len(measured) == (1 if dropout and timed else 0)
        assert all(0.2 < float(ratio) < 20 for ratio in measured)
    assert len(set(saved)) == 1


def test_no_adapter_draws_a_mask_in_the_block() -> None:
    """One of each kind of layer that has dropout, which it gets back."""
    layers = nn.ModuleList()
    for kind in (ColumnLoRA, RowLoRA, ExpertsLoRA, RouterLoRA):
        layer = kind.__new__(kind)
        nn.Module.__init__(layer)
        layer.dropout = 0.25
        layers.append(layer)
    # A layer of the base with an attribute of that name is left alone.
    layers.append(nn.MultiheadAttention(4, 2, dropout=0.5))
    with without_dropout([layers]):
        assert [layer.dropout for layer in layers] == [0.0] * 4 + [0.5]
    assert [layer.dropout for layer in layers] == [0.25] * 4 + [0.5]
