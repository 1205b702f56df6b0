"""GSM8K end to end at TP 2 x EP 2, and the same evaluation loss from stock transformers + PEFT;
`make gsm8k` does it in full."""

import os
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
DATA = Path(os.environ.get("GSM8K", ROOT.parent / "shared/data/gsm8k"))


@pytest.mark.slow
@pytest.mark.skipif(
    not (DATA / "train.jsonl").is_file(),
    reason=f"no GSM8K at {DATA}; set GSM8K to a folder with train.jsonl and test.jsonl",
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
