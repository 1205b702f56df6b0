"""Read and write adapters of Mixtral, whose linears have one name in checkpoints and another in
transformers' loaded model: each name that stock PEFT, older PEFT or vLLM takes means the same
linear."""

import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megalora.adapters.files import WEIGHTS, read_config
from megalora.adapters.merge import merge
from megalora.adapters.read.adapter import read_adapter
from megalora.adapters.resumable import import_adapter
from megalora.adapters.write.engines import check_engine
from megalora.config import LoRAConfig
from megalora.lora.select import resolve
from megalora.serve.check import Limits, check_adapter
from megalora.serve.errors import AdapterForOtherBase, AdapterInvalid
from megalora.tiny import make_tiny
from tests.adapters.adapters import ATTENTION, EXPERTS, load_base, logits, merged_by_hand, train
from tests.adapters.folders import edit_config, edit_tensors, remove_tensors
from tests.adapters.stock import ATOL, check_equal, loaded_by_peft, new_adapter, shape_of
from tests.named_tensors import only_parts, renamed
from tests.peft_warnings import IGNORED

pytestmark = IGNORED

LAYER = "base_model.model.model.layers.1"
ROLES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
"""Name in checkpoints -> name that other families have, in the order of the table."""


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(
        tmp_path_factory.mktemp("mixtral") / "base", arch="mixtral", num_hidden_layers=2
    )


def _role_in_name(name: str) -> str:
    return re.sub(r"\.(w[123])\.", lambda match: f".{ROLES[match[1]]}.", name)


in_memory_block = renamed(lambda name: name.replace(".block_sparse_moe.", ".mlp."))
"""The names under which PEFT 0.21 looks for experts and router: transformers 5 calls the block
``mlp`` as soon as it is loaded."""
of_other_families = renamed(_role_in_name)
"""Names of linears that vLLM reads as w1, w3 and w2."""


def test_the_file_has_the_names_of_the_checkpoint(mixtral: Path, tmp_path: Path) -> None:
    train(mixtral, tmp_path, rank=4, target_modules=["gate", "w1", "w2", "w3"])
    tensors = load_file(tmp_path / WEIGHTS)
    expected = set()
    for leaf, factor in product(ROLES, "AB"):
        expected.add(f"{LAYER}.block_sparse_moe.experts.5.{leaf}.lora_{factor}.weight")
    assert only_parts(f"{LAYER}.block_sparse_moe.experts.5.")(tensors).keys() == expected
    assert f"{LAYER}.block_sparse_moe.gate.lora_A.weight" in tensors
    assert read_config(tmp_path)["target_modules"] == ["gate", "w1", "w2", "w3"]


def test_names_of_other_families_mean_the_same_linears(mixtral: Path) -> None:
    shape = shape_of(mixtral)

    def resolved(**names: Any) -> Any:
        return resolve(LoRAConfig(rank=4, alpha=12.0, **names), shape)

    # In targets and in patterns.
    own = {"target_modules": ["q_proj", "w1", "w3", "w2"], "rank_pattern": {"w2": 6}}
    other = {"target_modules": ["q_proj", *EXPERTS], "rank_pattern": {"down_proj": 6}}
    assert resolved(**own) == resolved(**other)
    # vLLM's name of the fused weight is an alias of both.
    assert resolved(target_modules=["w1", "w3"]) == resolved(target_modules=["gate_up_proj"])
    assert {a.name for a in resolved(target_modules=["up_proj"])} == {"w3"}
    assert {a.name for a in resolved()} == {*ATTENTION, *ROLES}, "all-linear has no router"


@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {"w2": 6, "gate": 3}, "alpha_pattern": {"w2": 20.0, "gate": 5.0}},
        {
            "rank_pattern": {r"layers\.1\.block_sparse_moe\.experts\.\d+\.w2": 6},
            "alpha_pattern": {r"layers\.0\.block_sparse_moe\.gate": 5.0, "w3": 2.0},
        },
        {"use_rslora": True, "expert_rank": 2},
    ],
    ids=["by name", "by layer", "rslora"],
)
def test_stock_peft_reads_ranks_and_scales(
    mixtral: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """PEFT finds w2 as ``mlp.experts.down_proj``, so patterns have both names."""
    targets = ["gate", "q_proj", "w1", "w2", "w3"]
    trained = train(mixtral, tmp_path, rank=4, alpha=12.0, target_modules=targets, **options)
    expected = logits(merged_by_hand(trained))
    torch.testing.assert_close(loaded_by_peft(tmp_path, mixtral), expected, rtol=0, atol=ATOL)
    check_equal(tmp_path, mixtral, expected)


STOCK: dict[str, dict[str, Any]] = {
    "names of checkpoints": {"target_modules": ["q_proj", "w1", "w2", "w3"]},
    "router": {"target_modules": ["gate", "v_proj"], "rank_pattern": {"v_proj": 3}},
    "all-linear": {"target_modules": "all-linear"},
    "an expression": {"target_modules": r".*layers\.\d+\..*\.(w1|w2|w3|o_proj)"},
    # By the names of the loaded model, which no checkpoint has.
    "parameters": {
        "target_modules": [],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
}


@pytest.mark.parametrize("case", STOCK)
def test_stock_peft_s_adapters_are_read(mixtral: Path, tmp_path: Path, case: str) -> None:
    model = new_adapter(mixtral, **STOCK[case])
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    check_equal(tmp_path, mixtral, logits(model))


# PEFT 0.17 knew the names of checkpoints, which the made adapter has already.
@pytest.mark.parametrize(
    "rename", [None, in_memory_block, of_other_families], ids=["PEFT 0.17", "PEFT 0.21", "vLLM"]
)
def test_an_adapter_with_a_matrix_for_each_expert_is_imported(
    mixtral: Path, tmp_path: Path, rename: Any
) -> None:
    """As stock PEFT wrote them on transformers 4, where experts were modules of their own."""
    targets = [*ATTENTION, "gate", *ROLES]
    trained = train(mixtral, tmp_path / "made", rank=4, alpha=12.0, target_modules=targets)
    expected = logits(merged_by_hand(trained))
    # Patterns that megalora writes have both names; those of PEFT 0.17 did not.
    edit_config(trained.folder, rank_pattern={}, alpha_pattern={})
    if rename is not None:
        edit_tensors(trained.folder, rename)
    if rename is of_other_families:
        edit_config(trained.folder, target_modules=[*ATTENTION, "gate", *EXPERTS])
    check_equal(trained.folder, mixtral, expected)
    import_adapter(trained.folder, tmp_path / "imported", base=str(mixtral))
    check_equal(tmp_path / "imported", mixtral, expected)
    # What is written has the names of checkpoints again.
    names = load_file(tmp_path / "imported" / WEIGHTS).keys()
    assert f"{LAYER}.block_sparse_moe.experts.5.w3.lora_B.weight" in names


@pytest.mark.parametrize("packed", [False, True], ids=["published", "as transformers holds it"])
def test_merge_changes_the_very_weights(mixtral: Path, tmp_path: Path, packed: bool) -> None:
    base = mixtral
    if packed:
        base = tmp_path / "packed"
        load_base(mixtral).save_pretrained(base, save_original_format=False)
        (base / "config.json").write_text((mixtral / "config.json").read_text())
    targets = [*ATTENTION, "gate", *ROLES]
    trained = train(mixtral, tmp_path / "adapter", rank=4, alpha=12.0, target_modules=targets)
    merge(trained.folder, str(base), tmp_path / "merged")
    expected = logits(merged_by_hand(trained))
    found = logits(load_base(tmp_path / "merged"))
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)


def test_what_vllm_would_leave_out_is_refused(mixtral: Path, tmp_path: Path) -> None:
    """vLLM finds modules by the names of checkpoints alone."""
    train(mixtral, tmp_path, rank=4, target_modules=["q_proj", *ROLES])
    # As written it passes, whether the base is at hand or not.
    assert check_adapter(tmp_path, Limits(base=mixtral)) == check_adapter(tmp_path)
    edit_tensors(tmp_path, in_memory_block)
    with pytest.raises(AdapterForOtherBase, match=r"has no model.layers.0.mlp.experts.0.w"):
        check_adapter(tmp_path, Limits(base=mixtral))


# One expert's w3, and everybody's: a file without any w3 is as incomplete.
@pytest.mark.parametrize(
    ("lost", "named"), [("layers.1.block_sparse_moe.experts.5.w3.", 5), (".w3.", 0)]
)
def test_an_incomplete_expert_is_named(
    mixtral: Path, tmp_path: Path, lost: str, named: int
) -> None:
    train(mixtral, tmp_path, rank=4, target_modules=list(ROLES))
    remove_tensors(tmp_path, lost)
    for limits in (Limits(base=mixtral), Limits()):
        with pytest.raises(AdapterInvalid, match=rf"moe.experts.{named} lacks w3; vLLM wants"):
            check_adapter(tmp_path, limits)


def test_names_of_another_family_s_block_are_no_experts(tiny: Path, tmp_path: Path) -> None:
    """Mixtral's names in an adapter for Qwen3-MoE are of another base."""
    train(tiny, tmp_path, rank=4, layout="stacked", target_modules=EXPERTS)
    edit_tensors(tmp_path, renamed(lambda name: name.replace(".mlp.", ".block_sparse_moe.")))
    with pytest.raises(ValueError, match="block_sparse_moe.* is not a linear layer of this base"):
        read_adapter(tmp_path, shape_of(tiny))


def test_sglang_is_refused(mixtral: Path) -> None:
    shape = shape_of(mixtral)
    adapted = resolve(LoRAConfig(rank=4), shape)
    with pytest.raises(ValueError, match="knows no adapters of linears called w1.*megalora merge"):
        check_engine("sglang", "per_expert", adapted, shape)
    # Without experts nothing stands in its way.
    attention = [a for a in adapted if a.name in ATTENTION]
    check_engine("sglang", "per_expert", attention, shape)
