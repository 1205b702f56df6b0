"""Environment variables of a rank: a GPU of its own or a share of one, and defaults that torch
reads by itself."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megalora import environment, host, staged
from megalora.bench import calibrate, measure
from megalora.config.file import save_config
from megalora.train import __main__ as train_main
from megalora.train import loop, lost_peer
from megalora.user_error import LOST_PEER
from tests.parity.runs import make_config

GIB = 1 << 30
# Every name of a variable, because torch reads old names as well as new ones.
TORCH_VARIABLES = (
    *environment.ALLOCATOR,
    *environment.DUMP_FILE,
    *environment.ERROR_HANDLING,
    "TORCH_NCCL_DUMP_ON_TIMEOUT",
)


@pytest.fixture
def one_gpu(monkeypatch):
    """Pretends that there is one GPU of 80 GiB; returns what was asked of it."""
    asked: dict[str, object] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * GIB)
    )
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.update(device=device))
    monkeypatch.setattr(
        torch.cuda,
        "set_per_process_memory_fraction",
        lambda share, device: asked.update(share=share, of=device),
    )
    return asked


def a_rank(
    monkeypatch, local: int, world: int, here: int | None = None, share: str | None = "1"
) -> None:
    """Set torchrun's variables; ``here`` is the number of ranks on this machine, all by default."""
    for name, value in (("RANK", local), ("LOCAL_RANK", local), ("WORLD_SIZE", world)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(world if here is None else here))
    if share is None:
        monkeypatch.delenv("MEGALORA_SHARE_GPU", raising=False)
    else:
        monkeypatch.setenv("MEGALORA_SHARE_GPU", share)


def test_ranks_that_share_a_gpu_take_equal_parts_of_it(monkeypatch, one_gpu):
    a_rank(monkeypatch, local=3, world=4)
    assert host._choose_device() == staged.BACKEND
    # Of 80 GiB each of four has 20, one of them for what its process needs beside tensors.
    assert one_gpu == {"device": 0, "share": pytest.approx(19 / 80), "of": 0}
    assert host.memory_bytes() == 20 * GIB


def test_without_sharing_a_rank_has_a_gpu_of_its_own(monkeypatch, one_gpu):
    # Not set, empty and 0 all mean no.
    for value in (None, "", "0"):
        a_rank(monkeypatch, local=0, world=1, share=value)
        one_gpu.clear()
        assert host._choose_device() == "nccl"
        assert one_gpu == {"device": 0}
        assert host.memory_bytes() == 80 * GIB
    a_rank(monkeypatch, local=1, world=2, share=None)
    with pytest.raises(
        ValueError,
        match="local rank 1 has no GPU of its own: .* MEGALORA_SHARE_GPU=1 to try a layout",
    ):
        host._choose_device()


def test_what_cannot_share_a_gpu_is_refused_in_one_line(monkeypatch, one_gpu):
    def refused(match: str) -> None:
        with pytest.raises(ValueError, match=match) as error:
            host._choose_device()
        assert "\n" not in str(error.value)

    a_rank(monkeypatch, local=0, world=2, share="yes")
    refused("^MEGALORA_SHARE_GPU=yes: set it to 1 to run all ranks on one GPU, or to 0$")
    a_rank(monkeypatch, local=0, world=16, here=8)
    refused("MEGALORA_SHARE_GPU=1 is for one machine, but 8 of 16 ranks run here")
    # Of 80 GiB each of 80 has one, which its process needs beside tensors: none is left.
    a_rank(monkeypatch, local=0, world=80)
    refused("80 ranks leave each less than the 1 GiB .* of a GPU of 80.0 GiB. Start fewer ranks")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    a_rank(monkeypatch, local=0, world=2)
    refused("MEGALORA_SHARE_GPU=1, but this machine shows no GPU to share")


def test_no_speed_is_measured_on_a_shared_gpu(monkeypatch, tiny, chats, tmp_path):
    monkeypatch.setenv("MEGALORA_SHARE_GPU", "1")
    config = tmp_path / "config.yaml"
    save_config(make_config(tiny, chats, tmp_path, {}), config)
    for main, arguments in (
        (measure.main, [str(config), "--row=row.json"]),
        (calibrate.main, [str(tmp_path / "c.json")]),
    ):
        with pytest.raises(ValueError, match="ranks that share a GPU have no speed to measure"):
            main(arguments)


def test_a_training_rank_sees_torch_s_variables(monkeypatch, tiny, chats, tmp_path):
    for name in TORCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    seen: dict[str, str] = {}
    monkeypatch.setattr(loop, "train", lambda *arguments, **named: seen.update(os.environ))
    monkeypatch.chdir(tmp_path)
    config = make_config(tiny, chats, tmp_path, {})
    save_config(
        replace(config, checkpoint=replace(config.checkpoint, dir="run")), Path("config.yaml")
    )
    train_main.main(["config.yaml"])
    set_for_torch = {}
    for name in TORCH_VARIABLES:
        if name in seen:
            set_for_torch[name] = seen[name]
    assert set_for_torch == {
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        # Abort the communicator and let the process say what happened, instead of ending it.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "2",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": f"{tmp_path}/run/nccl_rank_",  # torch adds the rank
    }


def test_what_the_user_has_set_stays():
    # The first two and the last are older names: torch reads them, so the newer one must not be set
    # beside them.
    theirs = {
        "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64",
        "NCCL_ASYNC_ERROR_HANDLING": "1",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/elsewhere/rank_",
    }
    mine = dict(theirs)
    environment.set_defaults(Path("run"), mine)
    assert mine == theirs


def test_torch_reads_the_allocator_s_variable_that_was_set_before_its_import(tiny, chats, tmp_path):
    """In a process of its own, which has imported nothing of torch when the rank's variables are
    set."""
    save_config(make_config(tiny, chats, tmp_path, {}), tmp_path / "config.yaml")
    script = f"""
import sys
from megalora import environment
from megalora.train import __main__ as rank, on_ranks
real = environment.set_defaults
def set_and_look(run):
    assert "torch" not in sys.modules
    real(run)
    import torch
    print(torch._C._accelerator_getAllocatorSettings())
    sys.exit()
on_ranks.set_defaults = set_and_look
rank.main(["{tmp_path}/config.yaml"])
"""
    clean = dict(os.environ)
    for name in TORCH_VARIABLES:
        clean.pop(name, None)
    done = subprocess.run([sys.executable, "-c", script], env=clean, capture_output=True, text=True)
    assert done.stdout.strip() == "expandable_segments:True", done.stderr


@pytest.mark.parametrize(
    ("message", "sign"),
    [
        # As torch's NCCL back end words them: from a wait that ran out, and from the next
        # collective after an abort.
        (
            (
                "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7,"
                " OpType=ALLREDUCE, NumelIn=1, NumelOut=1, Timeout(ms)=60000) ran for 60003"
                " milliseconds before timing out."
            ),
            "Watchdog caught collective operation timeout",
        ),
        (
            (
                "NCCL communicator was aborted on rank 1.  Original reason for failure was: NCCL"
                " error: remote process exited or there was a network error, NCCL version 2.27.5"
            ),
            "NCCL communicator was aborted",
        ),
    ],
)
def test_a_peer_that_nccl_lost_ends_the_run_in_our_line(
    message, sign, tmp_path, monkeypatch, capsys
):
    codes: list[int] = []
    monkeypatch.setattr(lost_peer.os, "_exit", codes.append)
    with lost_peer.explained(tmp_path):
        raise RuntimeError(message)
    said = capsys.readouterr().err
    assert codes == [LOST_PEER]
    assert f"lost contact with another rank ({sign})" in said
    assert said.count("\n") == 1


def test_a_mistake_that_nccl_reports_is_no_lost_peer(tmp_path):
    # An error of NCCL's all the same, but of this rank alone: it keeps its traceback.
    with pytest.raises(RuntimeError), lost_peer.explained(tmp_path):
        raise RuntimeError("NCCL error: invalid usage (run with NCCL_DEBUG=WARN for details)")


def test_memory_goes_back_to_the_device(monkeypatch, one_gpu):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: one_gpu.update(emptied=True))
    host.release_memory()
    assert one_gpu == {"emptied": True}
