"""Merge with little memory and within the disk: ask for space first, hold a few blocks at a time,
and leave nothing of a merge that was interrupted."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megalora.adapters import merge as merge_module
from megalora.adapters.merge import merge
from megalora.config import LoRAConfig
from megalora.hf.json_file import read_hf_config
from tests.adapters.merging import copied, read, refusal, train


def test_the_disk_is_asked_first(
    mergeable: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = mergeable["tied"]
    out = tmp_path / "new" / "out"
    asked = []
    trained = train(base, tmp_path / "adapter", LoRAConfig(rank=2, target_modules=["lm_head"]))
    # Weights in float32; a tied base's merged head [512, 96] becomes a tensor of its own.
    num_parameters = 512 * 96
    for tensor in read(base).values():
        num_parameters += tensor.numel()
    needed = 4 * num_parameters
    # All other files are copied, but for one of ours that says how the tiny model was made.
    for path in base.iterdir():
        if path.suffix != ".safetensors" and path.name != "megalora_tiny.json":
            needed += path.stat().st_size
    # One byte too little the first time.
    free = iter([needed - 1, needed])

    def disk_usage(path: Path) -> Any:
        asked.append(path)
        return SimpleNamespace(free=next(free))

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    message = refusal(trained.folder, base, out)
    assert (
        message
        == f"{out} needs 0.0 GB, and 0.0 GB are free there; free some or choose another disk"
    )
    merge(trained.folder, str(base), out)
    # "new" does not exist yet, so the nearest folder above is asked.
    assert asked == [tmp_path, tmp_path]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()]
)
def test_an_interrupted_merge_leaves_nothing(
    mergeable: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    trained = train(mergeable["moe"], tmp_path / "adapter", LoRAConfig(rank=2))
    (tmp_path / "out").mkdir()
    real = merge_module._merge_block
    calls = 0

    def fails_late(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        # Of 112 modules: some shards are whole by then, and one is half written.
        if calls == 90:
            assert len(list((tmp_path / ".out.tmp").glob("*.safetensors"))) > 1
            raise error
        return real(*arguments)

    monkeypatch.setattr(merge_module, "_merge_block", fails_late)
    # A full disk is the user's to mend, in one line; Ctrl-C stays what it is.
    with pytest.raises((ValueError, KeyboardInterrupt)) as caught:
        merge(trained.folder, str(mergeable["moe"]), tmp_path / "out")
    if isinstance(error, OSError):
        assert isinstance(caught.value, ValueError)
        assert (
            str(caught.value)
            == f"could not write {tmp_path}/out, of which nothing is left ([Errno 28] No space left"
            " on device)"
        )
    else:
        assert caught.value is error
    # The empty folder that was there before is there again.
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "out"}
    assert not any((tmp_path / "out").iterdir())
    # And it can be made up for.
    monkeypatch.undo()
    merge(trained.folder, str(mergeable["moe"]), tmp_path / "out")


def test_a_shard_that_shrinks_meanwhile_is_noticed(
    mergeable: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = copied(mergeable["one file"], tmp_path / "base")
    trained = train(base, tmp_path / "adapter", LoRAConfig(rank=2, target_modules=["lm_head"]))
    # Between the reading of headers and that of weights, as when it is downloaded anew.
    monkeypatch.setattr(
        merge_module, "check_space", lambda *_: os.truncate(base / "model.safetensors", 500_000)
    )
    assert f"{base}/model.safetensors ended early" in refusal(
        trained.folder, base, tmp_path / "out"
    )


MEMORY = """
import sys
from pathlib import Path
from megalora.adapters.merge import merge

def peak_bytes():  # of this process alone: ru_maxrss remembers its parent
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])

peaks = []
for name in ("small", "large"):
    merge(Path(f"{name} adapter"), name, Path(f"{name} out"))
    peaks.append(peak_bytes())
print(peaks[1] - peaks[0], {"megatron", "transformers"} & set(sys.modules))
"""


def test_memory_is_a_few_blocks_and_nothing_heavy_is_imported(
    mergeable: dict[str, Path], tmp_path: Path
) -> None:
    small = tmp_path / "small"
    large = tmp_path / "large"
    shutil.copytree(mergeable["mixed"], small)
    shape = {
        "vocab_size": 40_000, "hidden_size": 1024, "num_experts": 64, "num_local_experts": 64,
        "moe_intermediate_size": 512,
    }  # fmt: skip
    large.mkdir()
    (large / "config.json").write_text(json.dumps(read_hf_config(small) | shape))
    # Layer 0 alone: nothing else of the base is adapted below, and so nothing else is needed.
    sizes = {
        "model.layers.0.mlp.experts.gate_up_proj": (64, 1024, 1024),
        "model.layers.0.mlp.experts.down_proj": (64, 1024, 512),
        "model.embed_tokens.weight": (40_000, 1024),
        "lm_head.weight": (40_000, 1024),
    }
    # (64 * 1024 * 1536 + 2 * 40,000 * 1024) * 2 bytes = 365 MB.
    tensors = {}
    for name, size in sizes.items():
        tensors[name] = torch.zeros(size, dtype=torch.bfloat16)
    save_file(tensors, large / "model.safetensors", metadata={"format": "pt"})
    for base in (small, large):
        lora = LoRAConfig(rank=2, target_modules=[r"experts\.\d+\..*_proj", "lm_head"])
        train(base, tmp_path / f"{base.name} adapter", lora)
    path = os.pathsep.join(sys.path)
    environment = os.environ | {"PYTHONPATH": path}
    # A process of its own: the peak of this one includes all tests before.
    done = subprocess.run(
        [sys.executable, "-c", MEMORY],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env=environment,
    )
    grown, imported = done.stdout.split()
    assert imported == "set()"
    # The model has 365 MB in one file, its largest tensor 134 MB. Measured: 24 MB with blocks of 1
    # MB, 100 MB with 4 MB.
    assert (tmp_path / "large out" / "model.safetensors").stat().st_size > 364e6
    assert int(grown) < 60e6
