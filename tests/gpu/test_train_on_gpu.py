"""Train by the real command on CUDA devices; compare with a CPU, other layouts and resumed runs.

`make gpu` runs these tests; without a device they are skipped.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.gpu.marks import NEEDS_CUDA
from tests.jsonl import read_jsonl

pytestmark = NEEDS_CUDA
CONFIG = Path(__file__).parents[2] / "configs/quickstart.yaml"


def train(run: Path, base: Path, chats: Path, ranks: int, *overrides: str) -> list[dict]:
    """A run of the real command; the lines of metrics.jsonl."""
    command = [sys.executable, "-m", "megalora", "train", str(CONFIG), "--nproc", str(ranks)]
    settings = [
        f"model.path={base}",
        f"data.train={chats}",
        f"checkpoint.dir={run}",
        "data.eval=20",
        "data.max_length=256",
    ]
    subprocess.run(
        [
            *command,
            *settings,
            "train.steps=4",
            "train.micro_batch_size=2",
            "train.lr=1e-3",
            *overrides,
        ],
        check=True,
    )
    return read_jsonl(run / "metrics.jsonl")


def values(rows: list[dict], key: str) -> list[float]:
    # Evaluations and training steps write rows with different keys to one file.
    return [row[key] for row in rows if key in row]


def test_float32_on_a_gpu_is_float32_on_the_cpu(tiny, chats, tmp_path, monkeypatch):
    gpu = train(tmp_path / "gpu", tiny, chats, 1, "parallel.ep=1")
    # Without a visible device the same command trains on the CPU.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    cpu = train(tmp_path / "cpu", tiny, chats, 1, "parallel.ep=1")
    assert values(gpu, "eval_loss") == pytest.approx(values(cpu, "eval_loss"), rel=1e-4)
    assert values(gpu, "loss") == pytest.approx(values(cpu, "loss"), rel=1e-4)
    assert values(gpu, "grad_norm") == pytest.approx(values(cpu, "grad_norm"), rel=1e-3)
    one = load_file(tmp_path / "gpu/step_000004/adapter_model.safetensors")
    other = load_file(tmp_path / "cpu/step_000004/adapter_model.safetensors")
    # Four steps of 1e-3 each: a tenth of one step may differ.
    for name, t in other.items():
        assert torch.allclose(one[name], t, rtol=0, atol=1e-4), name


def test_bfloat16_with_recompute_and_dropout_trains_saves_and_resumes(tiny, chats, tmp_path):
    options = (
        "model.dtype=bfloat16",
        "train.recompute=full",
        "lora.dropout=0.1",
        "parallel.ep=1",
        "checkpoint.every=2",
    )
    ranks = torch.cuda.device_count()
    rows = train(tmp_path / "run", tiny, chats, ranks, *options)
    losses = values(rows, "loss")
    assert losses[-1] < losses[0]
    # Steps 3 and 4 once more, from the checkpoint behind step 2.
    again = train(
        tmp_path / "rest",
        tiny,
        chats,
        ranks,
        *options,
        f"checkpoint.resume={tmp_path}/run/step_000002",
    )
    # bfloat16 keeps 8 bits (4e-3), and sums on several GPUs need not come in the same order again.
    assert values(again, "loss") == pytest.approx(losses[2:], rel=1e-2)


# One dimension of parallelism at a time: each has NCCL collectives of its own.
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(
    "layout",
    [
        "parallel.ep=2",
        "parallel.tp=2 parallel.ep=1",
        "parallel.pp=2 parallel.ep=1",
        "parallel.ep=1 parallel.etp=2",
    ],
)
def test_two_gpus_train_what_one_trains(layout, tiny, chats, tmp_path):
    one = train(tmp_path / "one", tiny, chats, 1, "parallel.ep=1")
    two = train(tmp_path / "two", tiny, chats, 2, *layout.split())
    assert values(two, "loss") == pytest.approx(values(one, "loss"), rel=1e-4)
    assert values(two, "grad_norm") == pytest.approx(values(one, "grad_norm"), rel=1e-3)


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, "parallel.tp=2 parallel.ep=1"),
        (2, "parallel.pp=2 parallel.ep=1 train.recompute=full"),
        (4, "parallel.tp=2 parallel.ep=2 parallel.etp=2"),
    ],
)
def test_ranks_that_share_a_gpu_train_what_one_trains(
    ranks, layout, tiny, chats, tmp_path, monkeypatch
):
    """Collectives go through the host; a checkpoint of the shared run resumes on one rank."""
    one = train(tmp_path / "one", tiny, chats, 1, "parallel.ep=1")
    # NCCL refuses two ranks on one device; with this setting collectives go over gloo instead.
    monkeypatch.setenv("MEGALORA_SHARE_GPU", "1")
    shared = train(tmp_path / "shared", tiny, chats, ranks, *layout.split(), "checkpoint.every=2")
    assert values(shared, "loss") == pytest.approx(values(one, "loss"), rel=1e-4)
    assert values(shared, "grad_norm") == pytest.approx(values(one, "grad_norm"), rel=1e-3)
    monkeypatch.delenv("MEGALORA_SHARE_GPU")
    saved = f"checkpoint.resume={tmp_path}/shared/step_000002"
    rest = train(tmp_path / "rest", tiny, chats, 1, "parallel.ep=1", saved)
    assert values(rest, "loss") == pytest.approx(values(one, "loss")[2:], rel=1e-4)
