"""Resume continues bit for bit; SIGTERM saves; a save that fails or is killed leaves the previous
checkpoint whole."""

import json
import os
import resource
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megalora.config import CheckpointConfig, RunConfig
from megalora.train import loop, signals
from megalora.train.checkpoint import save
from megalora.train.checkpoint.writer import write_atomically
from megalora.train.loop import train
from tests.distributed.ranks import run_ranks
from tests.parity.runs import make_config, records


def with_checkpoints(config: RunConfig, **options) -> RunConfig:
    return replace(config, checkpoint=CheckpointConfig(dir=config.checkpoint.dir, **options))


def same_files(one: Path, other: Path) -> None:
    for file in ("adapter_model.safetensors", "training_state/optimizer.safetensors"):
        a = load_file(one / file)
        b = load_file(other / file)
        assert a.keys() == b.keys()
        for name, t in a.items():
            assert torch.equal(t, b[name]), (file, name)


@pytest.mark.parametrize(
    ("world", "parallel", "dtype"),
    [
        (1, {}, "float32"),
        pytest.param(4, {"tp": 2, "ep": 2}, "float32", marks=pytest.mark.slow),
        pytest.param(4, {"pp": 2, "ep": 2, "etp": 1}, "bfloat16", marks=pytest.mark.slow),
    ],
    ids=["single", "tp2-ep2", "pp2-ep2-bf16"],
)
def test_resume_continues_bit_for_bit(world, parallel, dtype, tiny, chats, tmp_path):
    """Dropout included: its generators are part of the state."""
    config = make_config(
        tiny, chats, tmp_path / "whole", parallel, steps=4, schedule="cosine", warmup=1
    )
    config = replace(
        config, lora=replace(config.lora, dropout=0.1), model=replace(config.model, dtype=dtype)
    )
    run_ranks(train, world, with_checkpoints(config, every=2))
    resumed = replace(
        config,
        checkpoint=CheckpointConfig(
            dir=str(tmp_path / "rest"), resume=str(tmp_path / "whole/step_000002")
        ),
    )
    run_ranks(train, world, resumed)
    assert records(tmp_path / "rest", "loss") == records(tmp_path / "whole", "loss")[2:]
    assert records(tmp_path / "rest", "eval_loss") == records(tmp_path / "whole", "eval_loss")[1:]
    assert records(tmp_path / "rest", "grad_norm") == records(tmp_path / "whole", "grad_norm")[2:]
    same_files(tmp_path / "rest/step_000004", tmp_path / "whole/step_000004")


@pytest.mark.slow
def test_resume_true_takes_the_newest_and_keep_forgets_the_oldest(tiny, chats, tmp_path):
    config = make_config(tiny, chats, tmp_path, {}, steps=3)
    run_ranks(train, 1, with_checkpoints(config, every=1, keep=2))
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_000002", "step_000003"]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # a killed run may leave half a line
    longer = with_checkpoints(replace(config, train=replace(config.train, steps=4)), resume=True)
    run_ranks(train, 1, longer)
    assert (tmp_path / "latest").read_text() == "step_000004\n"
    assert len(records(tmp_path, "loss")) == 4  # metrics.jsonl goes on where it was


def test_resume_in_another_layout_continues_the_same_run(tiny, chats, tmp_path):
    config = make_config(tiny, chats, tmp_path / "whole", {}, steps=4)
    run_ranks(train, 1, with_checkpoints(config, every=2))
    other = make_config(tiny, chats, tmp_path / "rest", {"tp": 2, "ep": 2}, steps=4)
    other = replace(
        other,
        checkpoint=CheckpointConfig(
            dir=str(tmp_path / "rest"), resume=str(tmp_path / "whole/step_000002")
        ),
    )
    run_ranks(train, 4, other)
    assert records(tmp_path / "rest", "loss") == pytest.approx(
        records(tmp_path / "whole", "loss")[2:], rel=1e-6
    )


def test_resume_refuses_another_run(tiny, chats, tmp_path):
    config = make_config(tiny, chats, tmp_path, {}, steps=1)
    run_ranks(train, 1, config)
    with pytest.raises(
        Exception,
        match="already holds step_000001. Set checkpoint.resume=true to continue that run",
    ):
        run_ranks(train, 1, config)
    changed = with_checkpoints(
        replace(config, train=replace(config.train, steps=2, global_batch_size=4)), resume=True
    )
    with pytest.raises(
        Exception, match="was trained with train.global_batch_size=8, this run has 4"
    ):
        run_ranks(train, 1, changed)
    with pytest.raises(Exception, match="is not a checkpoint: it has no training_state/state.json"):
        run_ranks(train, 1, with_checkpoints(config, resume=str(tmp_path / "step_7")))


def _train_until_sigterm(config: RunConfig) -> str:
    """One rank of two is told to stop while it prepares step 2; both must save step 3 and
    return."""
    rate = loop.learning_rate

    def rate_and_signal(options, step, num_steps):
        if step == 2 and torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return rate(options, step, num_steps)

    loop.learning_rate = rate_and_signal
    return str(train(config))


def test_sigterm_on_one_rank_saves_on_all(tiny, chats, tmp_path):
    config = make_config(tiny, chats, tmp_path / "run", {"ep": 2}, steps=50)
    saved = run_ranks(_train_until_sigterm, 2, config)
    assert saved == [str(tmp_path / "run/step_000003")] * 2
    assert (
        json.loads((tmp_path / "run/step_000003/training_state/state.json").read_text())["step"]
        == 3
    )


def _train_on_a_full_disk(config: RunConfig) -> str:
    """From the second save on no file may grow past 100 kB: a real write error in the middle of the
    tensors."""
    write_adapter = save.write_adapter
    count = iter(range(100))

    def save_adapter(*args):
        if next(count) == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        return write_adapter(*args)

    save.write_adapter = save_adapter
    try:
        train(config)
    except ValueError as error:
        return str(error)
    return "no error"


def test_a_full_disk_leaves_the_previous_checkpoint_whole(tiny, chats, tmp_path):
    config = with_checkpoints(
        make_config(tiny, chats, tmp_path / "run", {"ep": 2}, steps=2), every=1
    )
    messages = run_ranks(_train_on_a_full_disk, 2, config)
    for message in messages:
        assert message.startswith("could not save step_000002; earlier checkpoints are whole (")
    # Nothing half-written stays beside it, under this or any temporary name.
    assert (tmp_path / "run/latest").read_text() == "step_000001\n"
    assert sorted(p.name for p in (tmp_path / "run").glob("*step_*")) == ["step_000001"]
    resumed = replace(config, checkpoint=CheckpointConfig(dir=str(tmp_path / "run"), resume=True))
    run_ranks(train, 2, resumed)
    assert (tmp_path / "run/latest").read_text() == "step_000002\n"


def _never_comes_back() -> None:
    signals.GRACE_S = 0.5
    with signals.terminated():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        os._exit(7)  # it did not give up


def test_a_rank_stuck_in_a_step_gives_up():
    """As after another rank's failure: nobody comes to the collective, so the loop never asks
    whether to stop."""
    with pytest.raises(Exception, match="exit code 1$"):
        run_ranks(_never_comes_back, 1)


def test_a_loss_that_is_not_a_number_stops_the_run(tiny, chats, tmp_path):
    config = with_checkpoints(
        make_config(tiny, chats, tmp_path, {}, steps=9, lr=1e30), every=1, keep=1
    )
    with pytest.raises(
        Exception, match=r"step \d: the (loss|gradient norm) is (nan|inf). Lower train.lr"
    ):
        run_ranks(train, 1, config)
    # With keep=1 a checkpoint of NaN would have replaced the last good one.
    kept = list(tmp_path.glob("step_*"))
    assert len(kept) <= 1
    for folder in kept:
        load_file(folder / "adapter_model.safetensors")


@pytest.mark.slow
def test_a_checkpoint_of_another_folder_does_not_mix_into_a_used_one(tiny, chats, tmp_path):
    run_ranks(train, 1, make_config(tiny, chats, tmp_path / "one", {}, steps=1))
    other = make_config(tiny, chats, tmp_path / "two", {}, steps=1)
    run_ranks(train, 1, other)
    with pytest.raises(Exception, match="already holds step_000001"):
        run_ranks(train, 1, with_checkpoints(other, resume=str(tmp_path / "one/step_000001")))


def _killed_while_writing(target: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "half").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)

    write_atomically(target, write)


def test_a_killed_save_leaves_the_previous_one(tmp_path):
    write_atomically(
        tmp_path / "step_000001", lambda folder: (folder / "file").write_text("one") and None
    )
    with pytest.raises(Exception, match="SIGKILL"):
        run_ranks(_killed_while_writing, 1, tmp_path / "step_000002")
    assert (tmp_path / "latest").read_text() == "step_000001\n"
    assert not (tmp_path / "step_000002").exists()
    write_atomically(
        tmp_path / "step_000002", lambda folder: (folder / "file").write_text("two") and None
    )
    assert (tmp_path / "latest").read_text() == "step_000002\n"
    assert (tmp_path / "step_000002/file").read_text() == "two"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_000001", "step_000002"]
