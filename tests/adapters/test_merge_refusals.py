"""Merges that are refused or interrupted leave no trace, and a merge needs the memory of a few
blocks."""

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
from safetensors.torch import load_file, save_file

from megalora.adapters import merge as merge_module
from megalora.adapters.files import WEIGHTS
from megalora.adapters.merge import merge
from megalora.config import LoRAConfig
from megalora.hf.folder import weight_shards
from megalora.hf.json_file import read_hf_config
from megalora.lora.spec import tensor_name
from tests.adapters.merging import copied, read, train
from tests.named_tensors import cast, renamed, without


def test_a_tied_base_that_stores_its_head_alone(mergeable: dict[str, Path], tmp_path: Path) -> None:
    moved = {"model.embed_tokens.weight": "lm_head.weight"}
    base = copied(
        mergeable["tied in one file"],
        tmp_path / "base",
        renamed(lambda name: moved.get(name, name)),
    )
    trained = train(base, tmp_path / "adapter", LoRAConfig(rank=3, target_modules=["lm_head"]))
    said = refusal(trained.folder, base, tmp_path / "out")
    assert (
        said
        == f"{base} ties lm_head to model.embed_tokens.weight, and has its head alone; save the"
        " model anew with both"
    )


def refusal(adapter: Path, base: Path | str, out: Path) -> str:
    """What merge says, having left no trace beside ``out``."""
    before = sorted(out.parent.iterdir()) if out.parent.is_dir() else None
    with pytest.raises(ValueError) as caught:
        merge(adapter, str(base), out)
    assert before is None or sorted(out.parent.iterdir()) == before
    return str(caught.value)


def test_a_base_without_an_adapted_weight_is_refused(
    mergeable: dict[str, Path], tmp_path: Path
) -> None:
    trained = train(mergeable["moe"], tmp_path / "adapter", LoRAConfig(rank=2))

    # One expert of two layers.
    gone = [f"model.layers.{layer}.mlp.experts.5.up_proj.weight" for layer in (1, 3)]
    base = copied(mergeable["moe"], tmp_path / "base", without(*gone))
    assert (
        refusal(trained.folder, base, tmp_path / "out")
        == f"{base} has no weight for 2 of 112 adapted modules, such as"
        " model.layers.1.mlp.experts.5.up_proj; merge into the model that was trained, as"
        " published or as save_pretrained writes it"
    )
    base = copied(
        mergeable["moe packed"],
        tmp_path / "packed",
        without("model.layers.2.mlp.experts.gate_up_proj"),
    )
    assert f"{base} has no weight for 16 of 112 adapted modules" in refusal(
        trained.folder, base, tmp_path / "out"
    )


def test_a_weight_that_is_there_twice_is_refused(
    mergeable: dict[str, Path], tmp_path: Path
) -> None:
    trained = train(mergeable["moe"], tmp_path / "adapter", LoRAConfig(rank=2))
    name = "model.layers.1.mlp.experts.5.down_proj.weight"
    packed = "model.layers.1.mlp.experts.down_proj"
    # [hidden, expert intermediate], as the published name has it.
    twice = {name: torch.zeros(96, 80)}
    base = copied(
        mergeable["moe packed"],
        tmp_path / "base",
        lambda file: file | (twice if packed in file else {}),
    )
    assert (
        refusal(trained.folder, base, tmp_path / "out")
        == f"{base} has {name.removesuffix('.weight')} twice: as {name} and in {packed}"
    )
    # In two shards of one folder.
    base = copied(mergeable["moe"], tmp_path / "both", lambda file: file | twice)
    first, second = weight_shards(base)[:2]
    assert (
        refusal(trained.folder, base, tmp_path / "out")
        == f"{base}: {name} is both in {first} and in {second}"
    )


def test_other_sizes_and_quantized_weights_are_refused(
    mergeable: dict[str, Path], tmp_path: Path
) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    trained = train(
        mergeable["one file"],
        tmp_path / "adapter",
        LoRAConfig(rank=2, target_modules=["k_proj"]),
    )
    base = copied(
        mergeable["one file"],
        tmp_path / "base",
        lambda file: file | {name: file[name].T.contiguous()},
    )
    assert (
        refusal(trained.folder, base, tmp_path / "out")
        == f"{base}/model.safetensors: {name} is (96, 64), but config.json and the adapter need"
        " (64, 96)"
    )
    base = copied(
        mergeable["one file"],
        tmp_path / "fp8",
        lambda file: file | {name: file[name].to(torch.float8_e4m3fn)},
    )
    assert (
        refusal(trained.folder, base, tmp_path / "out")
        == f"{base}/model.safetensors: {name} is F8_E4M3; merging needs F32, BF16, F16. Merge into"
        " the model that this one was quantized from"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_diverged_is_refused(
    mergeable: dict[str, Path], tmp_path: Path, value: float
) -> None:
    trained = train(
        mergeable["dense"],
        tmp_path / "adapter",
        LoRAConfig(rank=2, target_modules=["o_proj"]),
    )
    name = tensor_name("model.layers.2.self_attn.o_proj", "B")
    tensors = load_file(trained.folder / WEIGHTS)
    # One number of 2 * 96.
    tensors[name][5, 1] = value
    save_file(tensors, trained.folder / WEIGHTS)
    message = refusal(trained.folder, mergeable["dense"], tmp_path / "out")
    assert message.startswith(f"{trained.folder / WEIGHTS}: {name} has NaN or infinite values")


def test_a_sum_beyond_the_dtype_is_refused(mergeable: dict[str, Path], tmp_path: Path) -> None:
    base = copied(mergeable["dense"], tmp_path / "base", cast(torch.float16))
    lora = LoRAConfig(rank=2, target_modules=["o_proj"], layers=[2])
    # A delta beyond 65,504, the largest float16.
    trained = train(base, tmp_path / "adapter", lora, size=1e7)
    assert (
        refusal(trained.folder, base, tmp_path / "out")
        == "model.layers.2.self_attn.o_proj would have NaN or infinite values (float16 holds up to"
        " 6.55e+04); look at the adapter with megalora inspect, or merge into a float32 copy of"
        " the base"
    )


def test_where_the_result_may_go(mergeable: dict[str, Path], tmp_path: Path) -> None:
    base = mergeable["dense"]
    trained = train(base, tmp_path / "adapter", LoRAConfig(rank=2, target_modules=["o_proj"]))
    (tmp_path / "link").symlink_to(base)
    for out in (base, tmp_path / "link"):
        assert (
            refusal(trained.folder, base, out)
            == f"{base} is the folder that is read; choose another folder"
        )
    for out in (trained.folder, trained.folder / WEIGHTS):
        assert (
            refusal(trained.folder, base, out)
            == f"{out} exists and is not an empty folder; choose another"
        )
    # As an earlier merge leaves it that was killed, or one that is running.
    (tmp_path / ".out.tmp").mkdir()
    assert refusal(trained.folder, base, tmp_path / "out").startswith(
        f"{tmp_path}/.out.tmp exists: another process is writing {tmp_path}/out"
    )
    (tmp_path / ".out.tmp").rmdir()
    assert refusal(trained.folder, base, trained.folder / WEIGHTS / "out").startswith(
        "could not make "
    )
    assert (
        refusal(trained.folder, tmp_path / "nowhere", tmp_path / "out")
        == f"--base={tmp_path}/nowhere: no such folder"
    )


def test_a_mount_point_is_refused(
    mergeable: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = train(mergeable["dense"], tmp_path / "adapter", LoRAConfig(rank=2))
    out = tmp_path / "out"
    out.mkdir()
    # A folder is replaced by renaming, which cannot cross file systems.
    monkeypatch.setattr(Path, "is_mount", lambda path: path == out)
    assert (
        refusal(trained.folder, mergeable["dense"], out)
        == f"{out} is a mount point, which cannot be replaced by a finished folder; choose one"
        " in it"
    )


def test_the_disk_is_asked_first(
    mergeable: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = mergeable["tied"]
    out = tmp_path / "new" / "out"
    asked = []
    trained = train(base, tmp_path / "adapter", LoRAConfig(rank=2, target_modules=["lm_head"]))
    # Weights in float32; a tied base's merged head [512, 96] becomes a tensor of its own.
    num_parameters = 512 * 96 + sum(t.numel() for t in read(base).values())
    needed = 4 * num_parameters
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
        if calls == 90:  # of 112
            assert len(list((tmp_path / ".out.tmp").glob("*.safetensors"))) > 1
            raise error
        return real(*arguments)

    monkeypatch.setattr(merge_module, "_merge_block", fails_late)
    with pytest.raises(ValueError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        merge(trained.folder, str(mergeable["moe"]), tmp_path / "out")
    if isinstance(error, OSError):
        assert (
            str(caught.value)
            == f"could not write {tmp_path}/out, of which nothing is left ([Errno 28] No space left"
            " on device)"
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out"]
    assert not any((tmp_path / "out").iterdir())
    monkeypatch.undo()
    merge(trained.folder, str(mergeable["moe"]), tmp_path / "out")  # and it can be made up for


def test_a_shard_that_shrinks_meanwhile_is_noticed(
    mergeable: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = copied(mergeable["one file"], tmp_path / "base")
    trained = train(base, tmp_path / "adapter", LoRAConfig(rank=2, target_modules=["lm_head"]))
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
    tensors = {
        "model.layers.0.mlp.experts.gate_up_proj": (64, 1024, 1024),
        "model.layers.0.mlp.experts.down_proj": (64, 1024, 512),
        "model.embed_tokens.weight": (40_000, 1024),
        "lm_head.weight": (40_000, 1024),
    }
    # 365 MB.
    file = {name: torch.zeros(size, dtype=torch.bfloat16) for name, size in tensors.items()}
    save_file(file, large / "model.safetensors", metadata={"format": "pt"})
    experts = [rf"experts\.\d+\.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    for base in (small, large):
        lora = LoRAConfig(rank=2, target_modules=[*experts, "lm_head"])
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
