"""What a run's log says of dropout: bytes of the planner's page, traffic and FLOPs by hand."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from megalora.config import LoRAConfig, ParallelConfig
from megalora.lora.select import resolve
from megalora.planner.dropout_cost import dropout_cost
from megalora.planner.models import load_shape
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
    assert line.startswith("lora.dropout=0.1 costs, counted and not measured: ")
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


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_the_log_says_so(
    dropout: float, tiny: Path, chats: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lora = LoRAConfig(rank=4, dropout=dropout)
    run_ranks(train, 2, make_config(tiny, chats, tmp_path, {"tp": 2}, lora=lora, steps=1))
    log = capfd.readouterr()
    lines = re.findall("lora.dropout=0.25 costs, counted and not measured: .*", log.out + log.err)
    assert len(lines) == (1 if dropout else 0)
