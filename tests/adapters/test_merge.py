"""Compare a merged folder with transformers and PEFT's adapter beside the base, and with float64
arithmetic on the files."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from megalora.adapters import merge as merge_module
from megalora.adapters.files import WEIGHTS
from megalora.adapters.merge import merge
from megalora.config import LoRAConfig
from megalora.hf.folder import INDEX, weight_shards
from megalora.hf.json_file import read_hf_config
from megalora.tiny import make_tiny
from tests.adapters.adapters import load_base, logits
from tests.adapters.merging import (
    CASES,
    DENSE_ALL,
    LINEAR,
    MOE_ALL,
    copied,
    read,
    rewrite,
    train,
    weight_of,
)
from tests.adapters.stock import loaded_by_peft, new_adapter
from tests.named_tensors import assert_same_tensors, cast, only_parts, renamed
from tests.peft_warnings import IGNORED

pytestmark = IGNORED


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_what_peft_computes_unmerged(
    mergeable: dict[str, Path], tmp_path: Path, case: str
) -> None:
    base = mergeable[CASES[case][0]]
    lora = CASES[case][1]
    trained = train(base, tmp_path / "adapter", lora)
    merge(trained.folder, str(base), tmp_path / "out")
    expected = loaded_by_peft(trained.folder, base)
    # An adapter without effect would prove nothing.
    assert (expected - logits(load_base(base))).abs().max() > 0.1
    # float32 through 4 layers errs by some 2^-24 * 100 of the largest logit, which is about 5.
    torch.testing.assert_close(logits(load_base(tmp_path / "out")), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["moe", "shared packed"])
def test_an_adapter_with_stacked_experts(
    mergeable: dict[str, Path], tmp_path: Path, name: str
) -> None:
    trained = train(
        mergeable[name],
        tmp_path / "adapter",
        LoRAConfig(rank=4, alpha=12.0),
        layout="stacked",
    )
    # One A for all experts of a layer.
    assert only_parts("experts.lora_A")(load_file(trained.folder / WEIGHTS))
    merge(trained.folder, str(mergeable[name]), tmp_path / "out")
    expected = logits(
        PeftModel.from_pretrained(load_base(mergeable[name]), str(trained.folder)).eval()
    )
    torch.testing.assert_close(logits(load_base(tmp_path / "out")), expected, rtol=0, atol=2e-5)


def test_in_bfloat16_logits_move_by_what_rounding_weights_once_explains(tmp_path: Path) -> None:
    """Dense: with a router, another choice of expert would turn any small difference into a large
    one."""
    base = make_tiny(tmp_path / "base", arch="qwen3", dtype="bfloat16")
    trained = train(base, tmp_path / "adapter", DENSE_ALL)
    merge(trained.folder, str(base), tmp_path / "out")
    # Merging keeps the base's dtype.
    for name, tensor in read(tmp_path / "out").items():
        assert tensor.dtype == torch.bfloat16, name
    expected = loaded_by_peft(trained.folder, base)
    difference = root_mean_square(logits(load_base(tmp_path / "out")) - expected)
    effect = root_mean_square(logits(load_base(base)) - expected)
    # Rounding to 8 bits moves a weight by 2^-8 / sqrt(3) * 0.7 = 1.6e-3 of itself (root mean
    # square), and a linear's output by as much. Eight blocks and lm_head add up to sqrt(9) * 1.6e-3
    # = 5e-3 of a logit's spread, which is 1.
    assert difference < 1e-2 < 0.3 < effect


def root_mean_square(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


@pytest.mark.parametrize("name", ["dense", "one file"])
def test_an_rslora_adapter_of_stock_peft(
    mergeable: dict[str, Path], tmp_path: Path, name: str
) -> None:
    stock = new_adapter(
        mergeable[name],
        lora_alpha=3,
        target_modules=[*LINEAR, "lm_head"],
        rank_pattern={"q_proj": 9},
        use_rslora=True,
    )
    stock.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merge(tmp_path / "adapter", str(mergeable[name]), tmp_path / "out")
    torch.testing.assert_close(
        logits(load_base(tmp_path / "out")), logits(stock.eval()), rtol=0, atol=2e-5
    )


# Merge computes a weight in blocks of rows; with 1000 bytes each a weight has many of them, and the
# last is smaller.
@pytest.mark.parametrize("block_bytes", [None, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mixed", "mixed packed", "shared packed", "tied"])
def test_every_weight_is_the_exact_sum_rounded_once(
    mergeable: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    dtype: torch.dtype,
    block_bytes: int | None,
) -> None:
    """Rounding is monotone, so what float32 makes of the sum lies between the two ends of its
    error, rounded alike.

    A dot product of length r, a scale that is folded, rounded and multiplied with, and one addition
    err by at most (r + 8) 2^-24 of the sum of magnitudes.
    """
    if block_bytes:
        monkeypatch.setattr(merge_module, "BLOCK_BYTES", block_bytes)
    base = copied(mergeable[name], tmp_path / "base", cast(dtype))
    trained = train(base, tmp_path / "adapter", MOE_ALL)
    merge(trained.folder, str(base), tmp_path / "out")
    before = read(base)
    after = read(tmp_path / "out")
    equal = 0
    total = 0
    for module, rank, delta, size in trained.linears():
        found = weight_of(after, module)
        weight = weight_of(before, module, tied=name == "tied").double()
        margin = (rank + 8) * 2**-24 * (weight.abs() + size)
        low = (weight + delta - margin).float().to(dtype)
        high = (weight + delta + margin).float().to(dtype)
        assert found.dtype == dtype
        assert (low <= found).all() and (found <= high).all(), module
        equal += (found == (weight + delta).to(dtype)).sum().item()
        total += found.numel()
    # float32's error is at most 2^-12 or 2^-9 of a step of bfloat16 or float16: so seldom is a sum
    # close enough to the middle between two numbers to be rounded to the other one.
    if dtype != torch.float32:
        assert equal > 0.998 * total


@pytest.mark.parametrize("name", ["moe", "moe packed", "tied", "one file"])
def test_what_is_not_adapted_is_the_base_s_bytes(
    mergeable: dict[str, Path], tmp_path: Path, name: str
) -> None:
    base = mergeable[name]
    lora = LoRAConfig(rank=2, target_modules=["v_proj", "down_proj"], layers=[1])
    trained = train(base, tmp_path / "adapter", lora)
    merge(trained.folder, str(base), tmp_path / "out")
    # The weight of all experts of the layer, where the base stores them as one tensor.
    changed = {"model.layers.1.mlp.experts.down_proj"}
    for module, *_ in trained.linears():
        changed.add(f"{module}.weight")
    for shard in weight_shards(base):
        with safe_open(base / shard, "pt") as old, safe_open(tmp_path / "out" / shard, "pt") as new:
            assert new.metadata() == old.metadata() == {"format": "pt"}
            assert new.offset_keys() == old.offset_keys()
            # Both ways: what is adapted has changed.
            for key in old.keys():  # noqa: SIM118
                same = torch.equal(old.get_tensor(key), new.get_tensor(key))
                assert same == (key not in changed), key
        old_bytes = (base / shard).read_bytes()
        new_bytes = (tmp_path / "out" / shard).read_bytes()
        # A file begins with the length of its header, in 8 bytes; then come header and tensors.
        start = 8 + int.from_bytes(old_bytes[:8], "little")
        assert len(new_bytes) == len(old_bytes) and new_bytes[:start] == old_bytes[:start]


def test_all_that_belongs_to_the_model_is_copied_and_nothing_else(
    mergeable: dict[str, Path], tmp_path: Path
) -> None:
    base = copied(mergeable["moe"], tmp_path / "base")
    # What transformers and vLLM read beside the weights, and what its licence asks to pass on.
    texts = [
        "chat_template.jinja",
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
        "modeling_own.py",
        "LICENSE",
    ]
    # The unmerged weights in other forms, which a loader might prefer; another adapter; git's.
    strays = [
        "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "consolidated.00.pth",
        "model-q4.gguf",
        "consolidated.safetensors", "adapter_config.json", ".gitattributes",
    ]  # fmt: skip
    for name in texts + strays:
        (base / name).write_text(f"this is {name}")
    (base / ".cache").mkdir()
    (base / "original").mkdir()
    (base / "original" / "params.json").write_text("{}")
    trained = train(base, tmp_path / "adapter", LoRAConfig(rank=2, target_modules=["q_proj"]))
    # The folder above it is made too.
    merge(trained.folder, str(base), tmp_path / "new" / "out")
    out = tmp_path / "new" / "out"
    shards = weight_shards(base)
    kept = [
        *texts,
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        INDEX,
    ]
    assert {path.name for path in out.iterdir()} == {*kept, *shards, "merge_report.json"}
    for name in kept:
        assert (out / name).read_bytes() == (base / name).read_bytes(), name
    # No temporary folder is left beside it.
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_a_hub_snapshot_is_links(mergeable: dict[str, Path], tmp_path: Path) -> None:
    # The Hub's cache has files under their hashes, and a snapshot of links to them.
    base = tmp_path / "snapshot"
    base.mkdir()
    for path in mergeable["dense"].iterdir():
        (base / path.name).symlink_to(path)
    trained = train(base, tmp_path / "adapter", LoRAConfig(rank=2, target_modules=["q_proj"]))
    (tmp_path / "elsewhere").mkdir()
    # An empty folder, on a larger disk perhaps.
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    merge(trained.folder, str(base), tmp_path / "out")
    # Links would break as soon as the folder is copied to another machine.
    for path in (tmp_path / "elsewhere").iterdir():
        assert not path.is_symlink(), path
    assert (logits(load_base(tmp_path / "out")) - logits(load_base(base))).abs().max() > 0.01


def with_own_head(file: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put a copy of the embedding as the head into the shard that has it."""
    embedding = file.get("model.embed_tokens.weight")
    if embedding is None:
        return file
    return file | {"lm_head.weight": embedding.clone()}


@pytest.mark.parametrize("own_lm_head", [False, True])
@pytest.mark.parametrize("name", ["tied", "tied in one file"])
def test_an_adapted_lm_head_leaves_a_tied_embedding_alone(
    mergeable: dict[str, Path], tmp_path: Path, name: str, own_lm_head: bool
) -> None:
    base = copied(mergeable[name], tmp_path / "base")
    embedding = "model.embed_tokens.weight"
    # Some published folders hold the shared matrix twice.
    if own_lm_head:
        rewrite(base, with_own_head)
    trained = train(base, tmp_path / "adapter", LoRAConfig(rank=3, target_modules=["lm_head"]))
    report = merge(trained.folder, str(base), tmp_path / "out")
    before = read(base)
    after = read(tmp_path / "out")
    delta = after.pop("lm_head.weight") - before[embedding]
    before.pop("lm_head.weight", None)
    # The head alone was adapted.
    ((_, _, expected, _),) = trained.linears()
    torch.testing.assert_close(delta.double(), expected, rtol=0, atol=1e-6)
    assert_same_tensors(after, before)
    # Still tied, transformers would load the embedding for both and drop the head.
    config = read_hf_config(base)
    assert config["tie_word_embeddings"]
    assert read_hf_config(tmp_path / "out") == config | {"tie_word_embeddings": False}
    if (base / INDEX).exists():
        old = json.loads((base / INDEX).read_text())
        new = json.loads((tmp_path / "out" / INDEX).read_text())
        # The head is written beside the embedding, which every base has somewhere.
        with_head = {
            embedding: old["weight_map"][embedding],
            "lm_head.weight": old["weight_map"][embedding],
        }
        assert new["weight_map"] == old["weight_map"] | with_head
        number = delta.numel()
        # 4 bytes of float32 each.
        assert new["metadata"]["total_size"] - old["metadata"]["total_size"] == 4 * number
        assert new["metadata"]["total_parameters"] - old["metadata"]["total_parameters"] == number
    # The head was taken out of ``after`` above.
    num_parameters = delta.numel() + sum(tensor.numel() for tensor in after.values())
    assert report.num_bytes == 4 * num_parameters
    model = load_base(tmp_path / "out")
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    expected = loaded_by_peft(trained.folder, base)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["one file", "tied in one file"])
def test_names_without_their_prefix(mergeable: dict[str, Path], tmp_path: Path, name: str) -> None:
    """As a model without its head is saved; transformers reads both."""
    without_prefix = renamed(lambda key: key.removeprefix("model."))
    base = copied(mergeable[name], tmp_path / "base", without_prefix)
    trained = train(
        base,
        tmp_path / "adapter",
        LoRAConfig(rank=3, target_modules=["q_proj", "down_proj", "lm_head"]),
    )
    merge(trained.folder, str(base), tmp_path / "out")
    merge(trained.folder, str(mergeable[name]), tmp_path / "plain")
    assert_same_tensors(read(tmp_path / "out"), without_prefix(read(tmp_path / "plain")))
    assert torch.equal(logits(load_base(tmp_path / "out")), logits(load_base(tmp_path / "plain")))
