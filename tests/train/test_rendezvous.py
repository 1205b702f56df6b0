"""Check that ranks of one attempt find each other and nobody of an attempt before, and that a
restarted job goes on as if nothing had happened."""

import gc
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megalora import host, rendezvous
from megalora.config import CheckpointConfig, LoRAConfig, RunConfig
from megalora.rendezvous import agree_on_attempt
from megalora.train import loop
from megalora.train.loop import train
from tests.distributed.test_checkpoint import same_files
from tests.parity.runs import make_config, records
from tests.waiting import PATIENCE_S, deadline_passes_when


def meet(
    store: dist.Store, ranks: list[int], world: int, late: dict[int, float] | None = None
) -> dict[int, str]:
    """Each rank's answer, or its error; ``late``: seconds by which a rank comes later."""
    # Threads stand for ranks: what they share is the store alone.
    answers: dict[int, str] = {}

    def come(rank: int) -> None:
        time.sleep((late or {}).get(rank, 0))
        try:
            answers[rank] = agree_on_attempt(store, rank, world, PATIENCE_S)
        except RuntimeError as error:
            answers[rank] = str(error)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


# All at once; the first rank, which makes the name, late; another one late; two of them.
@pytest.mark.parametrize("late", [{}, {0: 0.3}, {1: 0.3}, {0: 0.1, 2: 0.3}])
def test_every_attempt_has_a_name_of_its_own(late: dict[int, float]) -> None:
    """Whoever comes first, and whatever the last attempt has left in the store."""
    store = dist.HashStore()
    names = []
    for _ in range(3):
        answers = meet(store, [0, 1, 2], 3, late)
        assert len(set(answers.values())) == 1, answers
        names.append(answers[0])
    assert len(set(names)) == 3
    for name in names:
        assert name.startswith("attempt_")


def test_after_an_attempt_that_never_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 2 died before it came; the others gave up; then all come."""
    store = dist.HashStore()
    with monkeypatch.context() as patch:
        # The clock is made up: it runs out as soon as both have said that they are there.
        deadline_passes_when(patch, rendezvous, lambda: store.check(["nonce/0", "nonce/1"]))
        assert "ranks [2] have not come" in meet(store, [0, 1], 3)[0]
    answers = meet(store, [0, 1, 2], 3, {1: 0.2})
    assert len(set(answers.values())) == 1 and answers[0].startswith("attempt_")


def test_a_dead_rank_is_not_met(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    meet(store, [0, 1], 2)
    # Rank 0 comes again and looks twenty times; what rank 1 has left in the store is of the attempt
    # before.
    polls = itertools.count()
    deadline_passes_when(monkeypatch, rendezvous, lambda: next(polls) > 20)
    assert "some ranks belong to an attempt that has ended" in meet(store, [0], 2)[0]


RANKS_WAIT_MINUTES = 2
"""For each other, in runs whose steps take milliseconds. Where attempts mix, the test fails only
when this is over."""


def _rank(
    config: RunConfig, rank: int, port: int, attempt: int, before: Callable[[int, int], None]
) -> None:
    """As torchrun starts a rank; in a forked process, which this ends."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
    }  # fmt: skip
    torch.set_num_threads(1)
    before(rank, attempt)
    with host.process_group(RANKS_WAIT_MINUTES) as met:
        train(config, met.job)


def attempt_of(
    config: RunConfig, port: int, attempt: int, before: Callable[[int, int], None]
) -> list[int]:
    """Both ranks' exit codes; as under torchrun, the failure of one ends the other."""
    # Gloo's threads do not survive a fork: no group of this process may be left over.
    gc.collect()
    pids = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _rank(config, rank, port, attempt, before)
                code = 0
            finally:
                # Past pytest's own clean-up, which is the parent's.
                os._exit(code)
        pids.append(pid)
    codes: dict[int, int] = {}
    while len(codes) < 2:
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        for other in set(pids) - codes.keys():
            if codes[pid]:
                os.kill(other, signal.SIGKILL)
    return [codes[pid] for pid in pids]


def die_in_step_three(rank: int, attempt: int) -> None:
    """Rank 1 of the first attempt is killed; in the second, rank 0 is late, when rank 1 could find
    its dead address."""
    rate = loop.learning_rate

    # Asked for once a step, when the two steps before it have been saved.
    def rate_or_death(options, step, num_steps):
        if attempt == 0 and rank == 1 and step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return rate(options, step, num_steps)

    loop.learning_rate = rate_or_death
    if attempt == 1 and rank == 0:
        time.sleep(1)


@pytest.mark.slow
def test_a_restarted_job_ends_with_the_same_adapter(
    tiny: Path, chats: Path, tmp_path: Path
) -> None:
    """``checkpoint.resume`` is false, as at the first start: the checkpoints are the job's own.
    Dropout included."""
    lora = LoRAConfig(rank=4, alpha=12.0, dropout=0.1)
    config = make_config(tiny, chats, tmp_path / "killed", {"ep": 2}, steps=4, lora=lora)
    config = replace(config, checkpoint=CheckpointConfig(dir=str(tmp_path / "killed"), every=1))
    # torchrun's agent holds the store, which outlives the attempts of a job.
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    codes = attempt_of(config, agent.port, 0, die_in_step_three)
    assert codes[1] == -signal.SIGKILL and codes[0] != 0
    # Of the second step the first rank may have been saving in its thread.
    assert (tmp_path / "killed/latest").read_text() in ("step_000001\n", "step_000002\n")
    assert attempt_of(config, agent.port, 1, die_in_step_three) == [0, 0]

    whole = replace(config, checkpoint=CheckpointConfig(dir=str(tmp_path / "whole"), every=1))
    other = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert attempt_of(whole, other.port, 0, lambda rank, attempt: None) == [0, 0]
    same_files(tmp_path / "killed/step_000004", tmp_path / "whole/step_000004")
    assert records(tmp_path / "killed", "loss") == records(tmp_path / "whole", "loss")
    # Another job is not let into the folder, though the first has ended.
    third = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert 0 not in attempt_of(config, third.port, 1, lambda rank, attempt: None)


def test_outside_torchrun_there_is_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    store, job = rendezvous.meeting_place(0, 1, 1.0)
    assert isinstance(store, dist.HashStore) and job is None
