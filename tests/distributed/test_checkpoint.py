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
from megalora.train.checkpoint.snapshot import Snapshot
from megalora.train.checkpoint.writer import write_together
from megalora.train.loop import train
from tests.distributed.ranks import run_ranks
from tests.parity.runs import make_config, records
from tests.whole_state import RANK_0, whole_state


def with_checkpoints(config: RunConfig, **options) -> RunConfig:
    return replace(config, checkpoint=CheckpointConfig(dir=config.checkpoint.dir, **options))


def names_in(folder: Path, pattern: str = "*") -> list[str]:
    """Names of what a folder holds, in order."""
    return sorted(path.name for path in folder.glob(pattern))


def same_files(one: Path, other: Path) -> None:
    """The same tensors, bit for bit, in the adapter's file and in the optimizer's."""
    for of in (lambda folder: load_file(folder / "adapter_model.safetensors"), whole_state):
        a = of(one)
        b = of(other)
        assert a.keys() == b.keys()
        for name, t in a.items():
            assert torch.equal(t, b[name]), name


@pytest.mark.parametrize(
    ("world", "parallel", "dtype"),
    [
        (1, {}, "float32"),
        pytest.param(4, {"tp": 2, "ep": 2}, "float32", marks=pytest.mark.slow),
        # In bfloat16 the masters are float32: a resume from the rounded weights would differ.
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
    # A run that resumes at step 2 has no losses of steps 1 and 2 and no evaluation before step 1.
    for key, num_before in (("loss", 2), ("eval_loss", 1), ("grad_norm", 2)):
        uninterrupted = records(tmp_path / "whole", key)
        assert records(tmp_path / "rest", key) == uninterrupted[num_before:], key
    same_files(tmp_path / "rest/step_000004", tmp_path / "whole/step_000004")


@pytest.mark.slow
def test_resume_true_takes_the_newest_and_keep_forgets_the_oldest(tiny, chats, tmp_path):
    config = make_config(tiny, chats, tmp_path, {}, steps=3)
    run_ranks(train, 1, with_checkpoints(config, every=1, keep=2))
    # Three were written; keep=2 deleted the first when the third was whole.
    assert names_in(tmp_path, "step_*") == ["step_000002", "step_000003"]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        # A killed run may leave half a line.
        file.write('{"step": 3, "lo')
    longer = with_checkpoints(replace(config, train=replace(config.train, steps=4)), resume=True)
    run_ranks(train, 1, longer)
    assert (tmp_path / "latest").read_text() == "step_000004\n"
    # metrics.jsonl goes on where it was.
    assert len(records(tmp_path, "loss")) == 4


@pytest.mark.slow
def test_resume_in_another_layout_continues_the_same_run(tiny, chats, tmp_path):
    # From stages of one and of three layers.
    uneven = {"pp": 2, "stage_layers": (1, 3)}
    config = make_config(tiny, chats, tmp_path / "whole", uneven, steps=4)
    run_ranks(train, 2, with_checkpoints(config, every=2))
    other = make_config(tiny, chats, tmp_path / "rest", {"tp": 2, "ep": 2}, steps=4)
    other = replace(
        other,
        checkpoint=CheckpointConfig(
            dir=str(tmp_path / "rest"), resume=str(tmp_path / "whole/step_000002")
        ),
    )
    run_ranks(train, 4, other)
    # Sums in another order: the limit of the grid for a loss in float32.
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


def test_a_changed_byte_is_not_trained_on(tiny, chats, tmp_path):
    """On a disk that returns other bytes than were written; on two ranks, of which one reads it."""
    config = make_config(tiny, chats, tmp_path, {}, steps=1)
    run_ranks(train, 1, config)
    path = tmp_path / "step_000001" / RANK_0
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    longer = replace(config, train=replace(config.train, steps=2))
    with pytest.raises(Exception, match="rank_00000.safetensors is damaged: its SHA-256"):
        run_ranks(train, 2, with_checkpoints(longer, resume=True))


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
    # Both ranks name the same folder: ranks that stop at different steps would wait for each other
    # in the collectives of the save.
    folder = tmp_path / "run/step_000003"
    assert saved == [str(folder)] * 2
    state = json.loads((folder / "training_state/state.json").read_text())
    assert state["step"] == 3


def _train_on_a_full_disk(config: RunConfig, rank: int) -> str:
    """From the second save on no file of one rank may grow past 100 kB: a real write error in the
    middle of the tensors."""
    write = Snapshot.write
    count = iter(range(100))

    def save_snapshot(*args):
        if next(count) == 1 and torch.distributed.get_rank() == rank:
            # Python ignores the signal SIGXFSZ, so the write fails with OSError instead.
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        return write(*args)

    Snapshot.write = save_snapshot
    try:
        train(config)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.slow
def test_a_full_disk_leaves_the_previous_checkpoint_whole(tiny, chats, tmp_path):
    """On the rank that does not write the adapter: every rank hears of it."""
    config = with_checkpoints(
        make_config(tiny, chats, tmp_path / "run", {"ep": 2}, steps=2), every=1
    )
    messages = run_ranks(_train_on_a_full_disk, 2, config, 1)
    for message in messages:
        assert message.startswith("could not save step_000002; earlier checkpoints are whole (")
    # Nothing half-written stays beside it, under this or any temporary name.
    assert (tmp_path / "run/latest").read_text() == "step_000001\n"
    assert names_in(tmp_path / "run", "*step_*") == ["step_000001"]
    resumed = replace(config, checkpoint=CheckpointConfig(dir=str(tmp_path / "run"), resume=True))
    run_ranks(train, 2, resumed)
    assert (tmp_path / "run/latest").read_text() == "step_000002\n"


def _never_comes_back() -> None:
    signals.GRACE_S = 0.5
    with signals.terminated():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        # Reached only where the rank did not give up; the test below wants exit code 1.
        os._exit(7)


def test_a_rank_stuck_in_a_step_gives_up():
    """As after another rank's failure: nobody comes to the collective, so the loop never asks
    whether to stop."""
    with pytest.raises(Exception, match="exit code 1$"):
        run_ranks(_never_comes_back, 1)


def test_a_loss_that_is_not_a_number_stops_the_run(tiny, chats, tmp_path):
    # At this rate the first step makes factors of 1e30, whose product is beyond float32: the next
    # loss is not a number.
    config = with_checkpoints(
        make_config(tiny, chats, tmp_path, {}, steps=9, lr=1e30), every=1, keep=1
    )
    with pytest.raises(
        Exception, match=r"step \d: the (loss|gradient norm) is (nan|inf). Lower train.lr"
    ):
        run_ranks(train, 1, config)
    # With keep=1 a checkpoint of NaN would have replaced the last good one.
    kept = names_in(tmp_path, "step_*")
    assert len(kept) <= 1
    for name in kept:
        load_file(tmp_path / name / "adapter_model.safetensors")


@pytest.mark.slow
def test_a_checkpoint_of_another_folder_does_not_mix_into_a_used_one(tiny, chats, tmp_path):
    run_ranks(train, 1, make_config(tiny, chats, tmp_path / "one", {}, steps=1))
    other = make_config(tiny, chats, tmp_path / "two", {}, steps=1)
    run_ranks(train, 1, other)
    with pytest.raises(Exception, match="already holds step_000001"):
        run_ranks(train, 1, with_checkpoints(other, resume=str(tmp_path / "one/step_000001")))


def _killed_while_writing(target: Path) -> None:
    def own(folder: Path) -> None:
        (folder / "half").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)

    write_together(target, own, lambda folder, made: None)


def _write_file(target: Path, text: str) -> None:
    write_together(
        target, lambda folder: (folder / "file").write_text(text), lambda folder, made: None
    )


def test_a_killed_save_leaves_the_previous_one(tmp_path):
    """SIGKILL gives a process no time to clean up: the next save must do without its help."""
    _write_file(tmp_path / "step_000001", "one")
    with pytest.raises(Exception, match="SIGKILL"):
        run_ranks(_killed_while_writing, 1, tmp_path / "step_000002")
    assert (tmp_path / "latest").read_text() == "step_000001\n"
    assert not (tmp_path / "step_000002").exists()
    _write_file(tmp_path / "step_000002", "two")
    assert (tmp_path / "latest").read_text() == "step_000002\n"
    assert (tmp_path / "step_000002/file").read_text() == "two"
    # What the killed save left under a temporary name was removed by the one that went through.
    assert names_in(tmp_path) == ["latest", "step_000001", "step_000002"]
