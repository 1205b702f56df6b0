"""GSM8K end to end at TP 2 x EP 2, and the same evaluation loss from stock transformers + PEFT;
`make gsm8k` does it in full."""

import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from benchmarks.peft_eval_loss import eval_losses
from megalora.config import CheckpointConfig, LogConfig, ModelConfig
from megalora.config.file import load_config
from megalora.data.splits import load_split
from megalora.train.loop import train
from tests.distributed.ranks import run_ranks
from tests.parity.runs import records

ROOT = Path(__file__).parents[2]
# A folder with train.jsonl and test.jsonl; no test asks the hub.
DATA = Path(os.environ.get("GSM8K", ""))


def commands(*variables: str) -> list[str]:
    """Lines that ``make gsm8k`` would run, of those that read the data."""
    dry = subprocess.run(
        # -o: as if the environment were there already.
        ["make", "--dry-run", "-o", ".venv/.ready", "gsm8k", *variables],
        cwd=ROOT,
        # Neither a GSM8K nor settings of the make that runs this test.
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    return [line for line in dry.stdout.splitlines() if "gsm8k_tiny.yaml" in line]


def test_the_data_come_from_a_folder_or_from_the_hub() -> None:
    hub = load_config(ROOT / "configs/gsm8k_tiny.yaml")
    assert (hub.data.train, hub.data.eval) == (
        "openai/gsm8k/main:train",
        "openai/gsm8k/main:test[:200]",
    )
    # Training and PEFT's evaluation must read the same.
    assert len(commands()) == len(commands("GSM8K=/a b")) == 2
    for without, given in zip(commands(), commands("GSM8K=/a b"), strict=True):
        assert "data." not in without
        words = shlex.split(given)
        assert words[-2:] == ["data.train=/a b/train.jsonl", "data.eval=/a b/test.jsonl[:200]"]


@pytest.mark.slow
@pytest.mark.skipif(
    not (DATA / "train.jsonl").is_file(),
    reason="set GSM8K to a folder with train.jsonl and test.jsonl",
)
def test_gsm8k_adapter_evaluates_the_same_in_stock_peft(tiny, tmp_path):
    config = load_config(ROOT / "configs/gsm8k_tiny.yaml", ["train.steps=5", "train.warmup=1"])
    data = replace(config.data, train=f"{DATA}/train.jsonl[:400]", eval=f"{DATA}/test.jsonl[:40]")
    config = replace(
        config, data=data, model=ModelConfig(path=str(tiny), dtype="float32"),
        checkpoint=CheckpointConfig(dir=str(tmp_path)),
        log=LogConfig(tensorboard=True, progress=False),
    )  # fmt: skip
    run_ranks(train, 4, config)
    ours = records(tmp_path, "eval_loss")
    samples = load_split(
        data.eval,
        AutoTokenizer.from_pretrained(tiny),
        format=data.format,
        max_length=data.max_length,
    ).samples
    # None was left out for its length: both sides average over the same 40.
    assert len(samples) == 40
    before, after = eval_losses(str(tiny), tmp_path / "step_000005", samples)
    # Losses of 5 to 7 in float32, summed in another order: 1e-4 is 2e-5 of them.
    assert ours == pytest.approx([before, after], abs=1e-4)
    # Equal losses mean something only where training has changed them.
    assert after < before - 1
    # Larger than a picture cut short.
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    assert any((tmp_path / "tensorboard").iterdir())
