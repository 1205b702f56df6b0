"""Refuse merges that would write something wrong, and leave no trace of them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalora.adapters.files import WEIGHTS
from megalora.config import LoRAConfig
from megalora.hf.folder import weight_shards
from megalora.lora.spec import tensor_name
from tests.adapters.merging import copied, refusal, train
from tests.named_tensors import Tensors, cast, renamed, without


def test_a_tied_base_that_stores_its_head_alone(mergeable: dict[str, Path], tmp_path: Path) -> None:
    """transformers would give the merged head to the embedding too."""
    as_head = renamed(lambda name: name.replace("model.embed_tokens.weight", "lm_head.weight"))
    base = copied(mergeable["tied in one file"], tmp_path / "base", as_head)
    trained = train(base, tmp_path / "adapter", LoRAConfig(rank=3, target_modules=["lm_head"]))
    said = refusal(trained.folder, base, tmp_path / "out")
    assert (
        said
        == f"{base} ties lm_head to model.embed_tokens.weight, and has its head alone; save the"
        " model anew with both"
    )


def test_a_base_without_an_adapted_weight_is_refused(
    mergeable: dict[str, Path], tmp_path: Path
) -> None:
    trained = train(mergeable["moe"], tmp_path / "adapter", LoRAConfig(rank=2))
    # Adapted are 4 layers with q, k, v, o and 3 projections of 8 experts: 4 * (4 + 24) = 112.
    gone = without(
        "model.layers.1.mlp.experts.5.up_proj.weight",
        "model.layers.3.mlp.experts.5.up_proj.weight",
    )
    base = copied(mergeable["moe"], tmp_path / "base", gone)
    assert (
        refusal(trained.folder, base, tmp_path / "out")
        == f"{base} has no weight for 2 of 112 adapted modules, such as"
        " model.layers.1.mlp.experts.5.up_proj; merge into the model that was trained, as"
        " published or as save_pretrained writes it"
    )
    # One tensor for gate and up of 8 experts.
    gone = without("model.layers.2.mlp.experts.gate_up_proj")
    base = copied(mergeable["moe packed"], tmp_path / "packed", gone)
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
    weight = torch.zeros(96, 80)

    def with_published_name(file: Tensors) -> Tensors:
        return file | {name: weight} if packed in file else file

    base = copied(mergeable["moe packed"], tmp_path / "base", with_published_name)
    assert (
        refusal(trained.folder, base, tmp_path / "out")
        == f"{base} has {name.removesuffix('.weight')} twice: as {name} and in {packed}"
    )
    # In every shard of one folder, of which two are named.
    base = copied(mergeable["moe"], tmp_path / "both", lambda file: file | {name: weight})
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

    def transposed(file: Tensors) -> Tensors:
        return file | {name: file[name].T.contiguous()}

    def quantized(file: Tensors) -> Tensors:
        return file | {name: file[name].to(torch.float8_e4m3fn)}

    base = copied(mergeable["one file"], tmp_path / "base", transposed)
    assert (
        refusal(trained.folder, base, tmp_path / "out")
        == f"{base}/model.safetensors: {name} is (96, 64), but config.json and the adapter need"
        " (64, 96)"
    )
    # Its scales are tensors of their own: rounding a sum to the dtype would mean nothing.
    base = copied(mergeable["one file"], tmp_path / "fp8", quantized)
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
    # Over the base itself, by its name or through a link.
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
    # Below a file no folder can be made.
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
