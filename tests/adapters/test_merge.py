"""A merged folder against two others: transformers with PEFT's adapter beside the base, and float64
arithmetic on the files."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megalora.adapters import merge as merge_module
from megalora.adapters.files import WEIGHTS
from megalora.adapters.merge import merge
from megalora.adapters.write.engines import FileFormat
from megalora.adapters.write.form import write_adapter
from megalora.config import LoRAConfig
from megalora.hf.folder import INDEX, weight_shards
from megalora.hf.json_file import read_hf_config
from megalora.lora.spec import Adapted, tensor_name
from megalora.model.fields import model_shape
from megalora.model.shape import ModelShape
from megalora.tiny import make_tiny
from tests.parity.built import random_factors

# PEFT calls patterns unused that it does use.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "RuntimeWarning")
]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MOE_ALL = LoRAConfig(
    rank=4, alpha=12.0, target_modules=[*LINEAR, "gate", "lm_head"],
    rank_pattern={"q_proj": 3, "v_proj": 5, "up_proj": 2, "down_proj": 6, "gate": 7, "lm_head": 9},
    alpha_pattern={"k_proj": 3.0, "gate_proj": 20.0, "gate": 5.0},
)  # fmt: skip
DENSE_ALL = LoRAConfig(
    rank=4,
    alpha=12.0,
    target_modules=[*LINEAR, "lm_head"],
    rank_pattern={"up_proj": 2, "lm_head": 9},
)
CASES = {
    "everything": ("moe", MOE_ALL),
    "everything, packed": ("moe packed", MOE_ALL),
    "rslora": ("moe", LoRAConfig(rank=4, alpha=6.0, expert_rank=2, use_rslora=True)),
    "some layers": ("moe packed",
                    LoRAConfig(rank=4, alpha=12.0, target_modules=["k_proj", "up_proj"],
                               layers="1-")),
    "a dense layer among moe layers": ("mixed", MOE_ALL),
    "a dense layer among moe layers, packed": ("mixed packed", MOE_ALL),
    "a shared expert": ("shared", MOE_ALL),
    "a shared expert, packed": ("shared packed", MOE_ALL),
    "dense": ("dense", DENSE_ALL),
    "dense in one file": ("one file", DENSE_ALL),
    "tied": ("tied", LoRAConfig(rank=4, alpha=12.0)),
    "tied, with lm_head": ("tied", MOE_ALL),
    "tied in one file, with lm_head": ("tied in one file", DENSE_ALL),
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(
    tiny: Path, tiny_dense: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    small: dict[str, Any] = {"num_hidden_layers": 2, "mlp_only_layers": [1]}
    made = {
        "moe": tiny,
        "dense": tiny_dense,
        "mixed": make_tiny(folder / "mixed", **small),
        "shared": make_tiny(folder / "shared", arch="qwen2_moe", **small),
        "tied": make_tiny(folder / "tied", tie_word_embeddings=True, num_hidden_layers=2),
        "one file": resaved(tiny_dense, folder / "one file"),
    }
    tied = make_tiny(
        folder / "tied dense", arch="qwen3", tie_word_embeddings=True, num_hidden_layers=2
    )
    made["tied in one file"] = resaved(tied, folder / "tied in one file")
    for name in ("moe", "mixed", "shared"):
        packed = resaved(
            made[name], folder / f"{name} packed", save_original_format=False, max_shard_size="1MB"
        )
        assert any(key.endswith("mlp.experts.gate_up_proj") for key in read(packed)), (
            "packed it is not"
        )
        made[f"{name} packed"] = packed
    return made


def resaved(base: Path, folder: Path, **options: Any) -> Path:
    """The same model as transformers writes it: in one file, or as ``options`` of save_pretrained
    say."""
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).save_pretrained(
        folder, **options
    )
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    """Every tensor of every weight file, by name; none is in two."""
    files = [load_file(folder / name) for name in weight_shards(folder)]
    everything = {name: tensor for file in files for name, tensor in file.items()}
    assert len(everything) == sum(map(len, files))
    return everything


def rewrite(folder: Path, change: Any) -> None:
    """Replace every shard's tensors by ``change`` of them."""
    for shard in sorted(folder.glob("*.safetensors")):
        save_file(change(load_file(shard)), shard, metadata={"format": "pt"})


def copied(base: Path, folder: Path, change: Any = None) -> Path:
    shutil.copytree(base, folder)
    if change is not None:
        rewrite(folder, change)
    return folder


@dataclass
class Trained:
    """An adapter before and after it was written to a folder."""

    folder: Path
    shape: ModelShape
    adapted: list[Adapted]
    factors: dict[str, Tensor]

    def linears(self) -> Iterator[tuple[str, int, Tensor, Tensor]]:
        """(module, rank, delta, |scale| |B| |A|), in float64."""
        for a in self.adapted:
            for module in a.hf_modules():
                a_factor, b_factor = (
                    self.factors[tensor_name(module, f)].double() for f in ("A", "B")
                )
                yield (
                    module,
                    a.rank,
                    a.scale * b_factor @ a_factor,
                    a.scale * b_factor.abs() @ a_factor.abs(),
                )


def train(
    base: Path, folder: Path, lora: LoRAConfig, size: float = 1.0, layout: FileFormat = "per_expert"
) -> Trained:
    """Random factors; every delta has a spread of about 0.2 * size of its weight's."""
    adapted, factors = random_factors(lora, base)
    factors = {name: size * t if ".lora_B." in name else t for name, t in factors.items()}
    shape = model_shape(read_hf_config(base))
    folder.mkdir()
    write_adapter(folder, adapted, shape, factors, str(base), layout)
    return Trained(folder, shape, adapted, factors)


def weight_of(tensors: dict[str, Tensor], module: str, tied: bool = False) -> Tensor:
    """The weight of one linear, wherever the base's layout has it: gate's rows stand before
    up's."""
    if f"{module}.weight" in tensors:
        return tensors[f"{module}.weight"]
    if module == "lm_head" and tied:
        return tensors["model.embed_tokens.weight"]
    experts, number, name = module.rsplit(".", 2)
    if name == "down_proj":
        return tensors[f"{experts}.down_proj"][int(number)]
    return tensors[f"{experts}.gate_up_proj"][int(number)].chunk(2)[
        ("gate_proj", "up_proj").index(name)
    ]


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(torch.randint(512, (2, 23), generator=torch.Generator().manual_seed(7))).logits


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_what_peft_computes_unmerged(
    bases: dict[str, Path], tmp_path: Path, case: str
) -> None:
    base = bases[CASES[case][0]]
    lora = CASES[case][1]
    trained = train(base, tmp_path / "adapter", lora)
    merge(trained.folder, str(base), tmp_path / "out")
    expected = logits(PeftModel.from_pretrained(load(base), str(trained.folder)).eval())
    assert (expected - logits(load(base))).abs().max() > 0.1, (
        "an adapter without effect proves nothing"
    )
    # float32 through 4 layers errs by some 2^-24 * 100 of the largest logit, which is about 5.
    torch.testing.assert_close(logits(load(tmp_path / "out")), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["moe", "shared packed"])
def test_an_adapter_with_stacked_experts(bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    trained = train(
        bases[name], tmp_path / "adapter", LoRAConfig(rank=4, alpha=12.0), layout="stacked"
    )
    assert any("experts.lora_A" in key for key in load_file(trained.folder / WEIGHTS)), (
        "stacked it is not"
    )
    merge(trained.folder, str(bases[name]), tmp_path / "out")
    expected = logits(PeftModel.from_pretrained(load(bases[name]), str(trained.folder)).eval())
    torch.testing.assert_close(logits(load(tmp_path / "out")), expected, rtol=0, atol=2e-5)


def test_in_bfloat16_logits_move_by_what_rounding_weights_once_explains(tmp_path: Path) -> None:
    """Dense: with a router, another choice of expert would turn any small difference into a large
    one."""
    base = make_tiny(tmp_path / "base", arch="qwen3", dtype="bfloat16")
    trained = train(base, tmp_path / "adapter", DENSE_ALL)
    merge(trained.folder, str(base), tmp_path / "out")
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}
    expected = logits(PeftModel.from_pretrained(load(base), str(trained.folder)).eval())
    difference, effect = (
        (found - expected).square().mean().sqrt()
        for found in (logits(load(tmp_path / "out")), logits(load(base)))
    )
    # Rounding to 8 bits moves a weight by 2^-8 / sqrt(3) * 0.7 = 1.6e-3 of itself (root mean
    # square), and a linear's output by as much. Eight blocks and lm_head add up to sqrt(9) * 1.6e-3
    # = 5e-3 of a logit's spread, which is 1.
    assert difference < 1e-2 < 0.3 < effect


@pytest.mark.parametrize("name", ["dense", "one file"])
def test_an_rslora_adapter_of_stock_peft(bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    options: dict[str, Any] = {
        "rank_pattern": {"q_proj": 9},
        "use_rslora": True,
        "task_type": "CAUSAL_LM",
    }
    stock = get_peft_model(
        load(bases[name]),
        LoraConfig(r=4, lora_alpha=3, target_modules=[*LINEAR, "lm_head"], **options),
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in stock.named_parameters():
            if "lora_B" in key:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    stock.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merge(tmp_path / "adapter", str(bases[name]), tmp_path / "out")
    torch.testing.assert_close(
        logits(load(tmp_path / "out")), logits(stock.eval()), rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("block_bytes", [None, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mixed", "mixed packed", "shared packed", "tied"])
def test_every_weight_is_the_exact_sum_rounded_once(
    bases: dict[str, Path],
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
    base = copied(
        bases[name], tmp_path / "base", lambda file: {n: t.to(dtype) for n, t in file.items()}
    )
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
        low, high = ((weight + delta + sign * margin).float().to(dtype) for sign in (-1, 1))
        assert found.dtype == dtype and (low <= found).all() and (found <= high).all(), module
        equal += (found == (weight + delta).to(dtype)).sum().item()
        total += found.numel()
    # the margin hides a boundary between two numbers of 8 or 11 bits this seldom
    if dtype != torch.float32:
        assert equal > 0.998 * total


@pytest.mark.parametrize("name", ["moe", "moe packed", "tied", "one file"])
def test_what_is_not_adapted_is_the_base_s_bytes(
    bases: dict[str, Path], tmp_path: Path, name: str
) -> None:
    base = bases[name]
    lora = LoRAConfig(rank=2, target_modules=["v_proj", "down_proj"], layers=[1])
    trained = train(base, tmp_path / "adapter", lora)
    merge(trained.folder, str(base), tmp_path / "out")
    changed = {f"{module}.weight" for module, *_ in trained.linears()} | {
        "model.layers.1.mlp.experts.down_proj"
    }
    for shard in weight_shards(base):
        with safe_open(base / shard, "pt") as old, safe_open(tmp_path / "out" / shard, "pt") as new:
            assert new.metadata() == old.metadata() == {"format": "pt"}
            assert new.offset_keys() == old.offset_keys()
            for key in old.keys():  # noqa: SIM118
                same = torch.equal(old.get_tensor(key), new.get_tensor(key))
                assert same == (key not in changed), key
        old_bytes, new_bytes = (
            (folder / shard).read_bytes() for folder in (base, tmp_path / "out")
        )
        start = 8 + int.from_bytes(old_bytes[:8], "little")
        assert len(new_bytes) == len(old_bytes) and new_bytes[:start] == old_bytes[:start]


def test_all_that_belongs_to_the_model_is_copied_and_nothing_else(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    base = copied(bases["moe"], tmp_path / "base")
    texts = [
        "chat_template.jinja",
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
        "modeling_own.py",
        "LICENSE",
    ]
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
    assert sorted(p.name for p in out.iterdir()) == sorted([*kept, *shards, "merge_report.json"])
    assert [name for name in kept if (out / name).read_bytes() != (base / name).read_bytes()] == []
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_a_hub_snapshot_is_links(bases: dict[str, Path], tmp_path: Path) -> None:
    base = tmp_path / "snapshot"
    base.mkdir()
    for path in bases["dense"].iterdir():
        (base / path.name).symlink_to(path)
    trained = train(base, tmp_path / "adapter", LoRAConfig(rank=2, target_modules=["q_proj"]))
    (tmp_path / "elsewhere").mkdir()
    # an empty folder, on a larger disk perhaps
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    merge(trained.folder, str(base), tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "elsewhere").iterdir())
    assert (logits(load(tmp_path / "out")) - logits(load(base))).abs().max() > 0.01


@pytest.mark.parametrize("own_lm_head", [False, True])
@pytest.mark.parametrize("name", ["tied", "tied in one file"])
def test_an_adapted_lm_head_leaves_a_tied_embedding_alone(
    bases: dict[str, Path], tmp_path: Path, name: str, own_lm_head: bool
) -> None:
    base = copied(bases[name], tmp_path / "base")
    embedding = "model.embed_tokens.weight"
    if own_lm_head:  # some published folders hold the shared matrix twice
        rewrite(
            base,
            lambda file: (
                file | ({"lm_head.weight": file[embedding].clone()} if embedding in file else {})
            ),
        )
    trained = train(base, tmp_path / "adapter", LoRAConfig(rank=3, target_modules=["lm_head"]))
    report = merge(trained.folder, str(base), tmp_path / "out")
    before = read(base)
    after = read(tmp_path / "out")
    delta = after.pop("lm_head.weight") - before[embedding]
    before.pop("lm_head.weight", None)
    ((_, _, expected, _),) = trained.linears()
    torch.testing.assert_close(delta.double(), expected, rtol=0, atol=1e-6)
    assert before.keys() == after.keys() and all(
        torch.equal(before[key], after[key]) for key in before
    )
    configs = [read_hf_config(folder) for folder in (base, tmp_path / "out")]
    assert configs[1] == configs[0] | {"tie_word_embeddings": False} != configs[0]
    if (base / INDEX).exists():
        old, new = (json.loads((folder / INDEX).read_text()) for folder in (base, tmp_path / "out"))
        with_head = {
            embedding: old["weight_map"][embedding],
            "lm_head.weight": old["weight_map"][embedding],
        }
        assert new["weight_map"] == old["weight_map"] | with_head
        number = delta.numel()
        assert new["metadata"]["total_size"] - old["metadata"]["total_size"] == 4 * number
        assert new["metadata"]["total_parameters"] - old["metadata"]["total_parameters"] == number
    assert report.num_bytes == 4 * (sum(t.numel() for t in after.values()) + delta.numel())
    model = load(tmp_path / "out")
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    expected = logits(PeftModel.from_pretrained(load(base), str(trained.folder)).eval())
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["one file", "tied in one file"])
def test_names_without_their_prefix(bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    """As a model without its head is saved; transformers reads both."""
    base = copied(
        bases[name],
        tmp_path / "base",
        lambda file: {k.removeprefix("model."): t for k, t in file.items()},
    )
    trained = train(
        base,
        tmp_path / "adapter",
        LoRAConfig(rank=3, target_modules=["q_proj", "down_proj", "lm_head"]),
    )
    merge(trained.folder, str(base), tmp_path / "out")
    merge(trained.folder, str(bases[name]), tmp_path / "plain")
    plain = {k.removeprefix("model."): t for k, t in read(tmp_path / "plain").items()}
    merged = read(tmp_path / "out")
    assert merged.keys() == plain.keys() and all(
        torch.equal(merged[key], plain[key]) for key in plain
    )
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(tmp_path / "plain")))


def test_a_tied_base_that_stores_its_head_alone(bases: dict[str, Path], tmp_path: Path) -> None:
    moved = {"model.embed_tokens.weight": "lm_head.weight"}
    base = copied(
        bases["tied in one file"],
        tmp_path / "base",
        lambda file: {moved.get(k, k): t for k, t in file.items()},
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
    bases: dict[str, Path], tmp_path: Path
) -> None:
    trained = train(bases["moe"], tmp_path / "adapter", LoRAConfig(rank=2))

    def without(*names: str) -> Any:
        return lambda file: {name: t for name, t in file.items() if name not in names}

    gone = [f"model.layers.{layer}.mlp.experts.5.up_proj.weight" for layer in (1, 3)]
    base = copied(bases["moe"], tmp_path / "base", without(*gone))
    assert (
        refusal(trained.folder, base, tmp_path / "out")
        == f"{base} has no weight for 2 of 112 adapted modules, such as"
        " model.layers.1.mlp.experts.5.up_proj; merge into the model that was trained, as"
        " published or as save_pretrained writes it"
    )
    base = copied(
        bases["moe packed"], tmp_path / "packed", without("model.layers.2.mlp.experts.gate_up_proj")
    )
    assert f"{base} has no weight for 16 of 112 adapted modules" in refusal(
        trained.folder, base, tmp_path / "out"
    )


def test_a_weight_that_is_there_twice_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    trained = train(bases["moe"], tmp_path / "adapter", LoRAConfig(rank=2))
    name = "model.layers.1.mlp.experts.5.down_proj.weight"
    packed = "model.layers.1.mlp.experts.down_proj"
    twice = {name: torch.zeros(96, 80)}
    base = copied(
        bases["moe packed"],
        tmp_path / "base",
        lambda file: file | (twice if packed in file else {}),
    )
    assert (
        refusal(trained.folder, base, tmp_path / "out")
        == f"{base} has {name.removesuffix('.weight')} twice: as {name} and in {packed}"
    )
    base = copied(bases["moe"], tmp_path / "both", lambda file: file | twice)
    first, second = weight_shards(base)[:2]
    assert (
        refusal(trained.folder, base, tmp_path / "out")
        == f"{base}: {name} is both in {first} and in {second}"
    )


def test_other_sizes_and_quantized_weights_are_refused(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    trained = train(
        bases["one file"], tmp_path / "adapter", LoRAConfig(rank=2, target_modules=["k_proj"])
    )
    base = copied(
        bases["one file"], tmp_path / "base", lambda file: file | {name: file[name].T.contiguous()}
    )
    assert (
        refusal(trained.folder, base, tmp_path / "out")
        == f"{base}/model.safetensors: {name} is (96, 64), but config.json and the adapter need"
        " (64, 96)"
    )
    base = copied(
        bases["one file"],
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
    bases: dict[str, Path], tmp_path: Path, value: float
) -> None:
    trained = train(
        bases["dense"], tmp_path / "adapter", LoRAConfig(rank=2, target_modules=["o_proj"])
    )
    name = tensor_name("model.layers.2.self_attn.o_proj", "B")
    tensors = load_file(trained.folder / WEIGHTS)
    tensors[name][5, 1] = value
    save_file(tensors, trained.folder / WEIGHTS)
    message = refusal(trained.folder, bases["dense"], tmp_path / "out")
    assert message.startswith(f"{trained.folder / WEIGHTS}: {name} has NaN or infinite values")


def test_a_sum_beyond_the_dtype_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    base = copied(
        bases["dense"], tmp_path / "base", lambda file: {name: t.half() for name, t in file.items()}
    )
    lora = LoRAConfig(rank=2, target_modules=["o_proj"], layers=[2])
    trained = train(base, tmp_path / "adapter", lora, size=1e7)
    assert (
        refusal(trained.folder, base, tmp_path / "out")
        == "model.layers.2.self_attn.o_proj would have NaN or infinite values (float16 holds up to"
        " 6.55e+04); look at the adapter with megalora inspect, or merge into a float32 copy of"
        " the base"
    )


def test_where_the_result_may_go(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["dense"]
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
    (tmp_path / ".out.tmp").mkdir()
    assert refusal(trained.folder, base, tmp_path / "out").startswith(
        f"{tmp_path}/.out.tmp exists: {tmp_path}/out is"
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
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = train(bases["dense"], tmp_path / "adapter", LoRAConfig(rank=2))
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == out)
    assert (
        refusal(trained.folder, bases["dense"], out)
        == f"{out} is a mount point, which cannot be replaced by a finished folder; choose one"
        " in it"
    )


def test_the_disk_is_asked_first(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = bases["tied"]
    out = tmp_path / "new" / "out"
    asked = []
    trained = train(base, tmp_path / "adapter", LoRAConfig(rank=2, target_modules=["lm_head"]))
    weights = sum(t.numel() for t in read(base).values())
    head = 512 * 96
    files = [
        p for p in base.iterdir() if p.suffix != ".safetensors" and p.name != "megalora_tiny.json"
    ]
    needed = 4 * (weights + head) + sum(path.stat().st_size for path in files)

    def disk_usage(path: Path) -> Any:
        asked.append(path)
        return SimpleNamespace(free=needed - 1 if len(asked) == 1 else needed)

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
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    trained = train(bases["moe"], tmp_path / "adapter", LoRAConfig(rank=2))
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
        merge(trained.folder, str(bases["moe"]), tmp_path / "out")
    if isinstance(error, OSError):
        assert (
            str(caught.value)
            == f"could not write {tmp_path}/out, of which nothing is left ([Errno 28] No space left"
            " on device)"
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out"]
    assert not any((tmp_path / "out").iterdir())
    monkeypatch.undo()
    merge(trained.folder, str(bases["moe"]), tmp_path / "out")  # and it can be made up for


def test_a_shard_that_shrinks_meanwhile_is_noticed(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = copied(bases["one file"], tmp_path / "base")
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
    bases: dict[str, Path], tmp_path: Path
) -> None:
    small = tmp_path / "small"
    large = tmp_path / "large"
    shutil.copytree(bases["mixed"], small)
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
    file = {name: torch.zeros(size, dtype=torch.bfloat16) for name, size in tensors.items()}
    save_file(file, large / "model.safetensors", metadata={"format": "pt"})
    experts = [rf"experts\.\d+\.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    for base in (small, large):
        lora = LoRAConfig(rank=2, target_modules=[*experts, "lm_head"])
        train(base, tmp_path / f"{base.name} adapter", lora)
    path = os.pathsep.join(sys.path)
    environment = os.environ | {"PYTHONPATH": path}
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
