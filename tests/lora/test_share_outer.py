"""Experts that share the factors of the hidden size: which tensors there are, and that every layout
starts from and keeps the same ones."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from megalora.adapters.export import export
from megalora.adapters.files import CARD, LORA_SECTION, STATE_KEYS, WEIGHTS
from megalora.adapters.resumable import import_adapter
from megalora.adapters.write.form import write_adapter
from megalora.config import LoRAConfig, RunConfig
from megalora.config.train import Relora
from megalora.hf.json_file import read_hf_config
from megalora.lora.section import adapted_of, differing, lora_section, settings
from megalora.lora.select import resolve
from megalora.lora.spec import expected_tensors
from megalora.model.fields import model_shape
from megalora.train.drift import DriftCheck
from megalora.train.loop import train
from tests.adapters.folders import edit_tensors
from tests.distributed.ranks import run_ranks
from tests.lora.resumed import resume_elsewhere
from tests.lora.shapes import DENSE_SHAPE, MIXED_SHAPE, MOE_SHAPE, adapt, refusal
from tests.parity.built import (
    adapter_of,
    built,
    first_gradients,
    random_adapter,
    random_factors,
)
from tests.parity.compare import of_largest
from tests.parity.everything import config_of
from tests.whole_state import whole_state

LAYER_0 = "base_model.model.model.layers.0.mlp.experts."
# One scale, 3, so that export folds none into a B.
SHARED = LoRAConfig(
    rank=4, alpha=12.0, rank_pattern={"up_proj": 3}, alpha_pattern={"up_proj": 9.0},
    share_outer=True,
)  # fmt: skip


def test_one_a_of_gate_and_up_and_one_b_of_down() -> None:
    adapted = adapt(rank=7, share_outer=True, layers=[0])
    found = {}
    for name, shape in expected_tensors(adapted).items():
        if name.startswith(LAYER_0):
            found[name.removeprefix(LAYER_0).removesuffix(".weight")] = shape
    expected = {"gate_proj.lora_A": (7, 96), "up_proj.lora_A": (7, 96), "down_proj.lora_B": (96, 7)}
    for expert in range(5):
        for name in ("gate_proj", "up_proj"):
            expected[f"{expert}.{name}.lora_B"] = (40, 7)
        expected[f"{expert}.down_proj.lora_A"] = (7, 40)
    assert found == expected
    numbers = {a.name: a.num_parameters() for a in adapted if a.num_experts}
    by_hand = 7 * (96 + 5 * 40)
    assert numbers == {"gate_proj": by_hand, "up_proj": by_hand, "down_proj": by_hand}


def test_other_linears_share_nothing() -> None:
    for a in adapt(MIXED_SHAPE, rank=7, share_outer=True):
        assert (a.shared is not None) == bool(a.num_experts), a.name


@pytest.mark.parametrize("options", [{"target_modules": ["q_proj"]}, {"layers": [1]}])
def test_needs_routed_experts(options: dict[str, Any]) -> None:
    assert refusal(MIXED_SHAPE, share_outer=True, **options) == (
        "lora.share_outer=true is for routed experts, and none is adapted: add gate_proj, up_proj"
        " or down_proj to lora.target_modules, or leave lora.share_outer out"
    )
    refusal(DENSE_SHAPE, share_outer=True)


def test_is_not_merged_periodically(tiny: Path, chats: Path, tmp_path: Path) -> None:
    config = config_of(tiny, chats, tmp_path, {}, SHARED, steps=9)
    with pytest.raises(ValueError, match="lora.share_outer: train.relora merges a pair"):
        replace(config, train=replace(config.train, relora=Relora(every=2)))


def test_settings_say_what_is_shared() -> None:
    shared = resolve(replace(SHARED, expert_rank="top_k", rank=6), MOE_SHAPE)
    own = [replace(a, shared=None) for a in shared]
    assert settings(adapted_of(settings(shared), MOE_SHAPE)) == settings(shared)
    for found, a in zip(adapted_of(settings(shared), MOE_SHAPE), shared, strict=True):
        assert found.shared == a.shared
    assert not differing(settings(shared), settings(shared))
    apart = differing(settings(shared), settings(own))
    assert len(apart) == sum(bool(a.num_experts) for a in shared)
    section = lora_section(shared, MOE_SHAPE)
    assert section["share_outer"] is True
    assert "share_outer" not in lora_section(own, MOE_SHAPE)


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """An adapter folder as a run with ``SHARED`` leaves it, a copy for each expert."""
    adapted, factors = random_factors(SHARED, tiny)
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_adapter(folder, adapted, model_shape(read_hf_config(tiny)), factors, str(tiny))
    return folder


def test_an_import_recognises_sharing(tiny: Path, tmp_path: Path, folder: Path) -> None:
    imported = import_adapter(folder, tmp_path / "imported", str(tiny))
    assert imported.section["share_outer"] is True
    assert "share_outer: true" in (tmp_path / "imported" / LORA_SECTION).read_text()
    assert "experts share A of gate and up and B of down: lora.share_outer" in imported.notes
    _, factors = random_factors(SHARED, tiny)
    state = whole_state(tmp_path / "imported")
    for name, factor in factors.items():
        # Of up the padding to gate's rank is gone.
        assert torch.equal(state[f"param.{name}"], factor), name
    assert len(state) == 3 * len(factors)


@pytest.mark.parametrize("part", ["3.gate_proj.lora_A", "0.down_proj.lora_B"])
def test_copies_that_differ_are_not_shared(
    tiny: Path, tmp_path: Path, folder: Path, part: str
) -> None:
    name = f"{LAYER_0}{part}.weight"

    def nudge(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[name][1, 2] += 1e-6
        return tensors

    edit_tensors(folder, nudge)
    imported = import_adapter(folder, tmp_path / "imported", str(tiny))
    assert "share_outer" not in imported.section


def test_a_checkpoint_whose_copies_differ_is_refused(
    tiny: Path, tmp_path: Path, folder: Path
) -> None:
    checkpoint = tmp_path / "imported"
    import_adapter(folder, checkpoint, str(tiny))
    export(checkpoint, tmp_path / "whole")
    name = f"{LAYER_0}2.up_proj.lora_A.weight"

    def nudge(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[name][0, 0] += 1
        return tensors

    edit_tensors(checkpoint, nudge)
    with pytest.raises(ValueError, match=re.escape(f"{name} has other values")):
        export(checkpoint, tmp_path / "changed")


def test_an_expert_without_a_row_learns_beside_what_the_others_use(
    tiny: Path, tmp_path: Path, folder: Path
) -> None:
    """An A row of down that is zero in one expert is not drawn anew where the shared B has a
    column: a B of zeros would change the other experts."""
    name = f"{LAYER_0}1.down_proj.lora_A.weight"

    def silence(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[name][2] = 0
        return tensors

    edit_tensors(folder, silence)
    import_adapter(folder, tmp_path / "imported", str(tiny))
    state = whole_state(tmp_path / "imported")
    assert not state[f"param.{name}"][2].any()
    _, factors = random_factors(SHARED, tiny)
    shared = f"{LAYER_0}down_proj.lora_B.weight"
    assert torch.equal(state[f"param.{shared}"], factors[shared])


def start_and_gradients(config: RunConfig, weights: Path) -> tuple[Any, Any]:
    """On rank 0 the adapter as it starts, and the gradients of the first step from ``weights``."""
    start = adapter_of(config)
    return start, first_gradients(config, weights)[1]


@pytest.fixture(scope="module")
def one_rank(
    tiny: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Tensor], dict[str, Tensor]]:
    """Factors of which none is zero; the start and their gradients on one rank."""
    folder = tmp_path_factory.mktemp("one")
    random_adapter(folder / "factors.safetensors", SHARED, tiny)
    config = config_of(tiny, chats, folder, {}, SHARED)
    found = run_ranks(start_and_gradients, 1, config, folder / "factors.safetensors")[0]
    return folder / "factors.safetensors", *found


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        # Replicas of what experts share lie over data parallelism; over TP alone; over both.
        (2, {"ep": 2}),
        (2, {"tp": 2, "ep": 2}),
        pytest.param(2, {"tp": 2, "etp": 2}, marks=pytest.mark.slow),
        pytest.param(2, {"tp": 1}, marks=pytest.mark.slow),
        pytest.param(4, {"ep": 4}, marks=pytest.mark.slow),
        pytest.param(4, {"ep": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"tp": 2, "ep": 2, "etp": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"tp": 2, "pp": 2}, marks=pytest.mark.slow),
    ],
)
def test_every_layout_starts_alike_and_has_the_same_gradients(
    world: int, parallel: dict[str, int], one_rank: Any, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    weights, start, gradients = one_rank
    config = config_of(tiny, chats, tmp_path, parallel, SHARED)
    own_start, own_gradients = run_ranks(start_and_gradients, world, config, weights)[0]
    assert start.keys() == own_start.keys()
    for name, value in start.items():
        assert torch.equal(value, own_start[name]), name
    assert start[f"{LAYER_0}gate_proj.lora_A.weight"].any()
    # ``LIMITS`` in tests/parity/case.py says where this comes from.
    assert of_largest(own_gradients, gradients) <= 1e-5
    assert gradients[f"{LAYER_0}gate_proj.lora_A.weight"].any()


def drifted(config: RunConfig) -> str:
    """What the check of replicas says when rank 1 alone changes what experts share."""
    with built(config) as run:
        check = DriftCheck(run.model.adapted, run.model.shards, run.groups)
        check.run(1, None)
        with torch.no_grad():
            for shard in run.model.shards:
                if dist.get_rank() and shard.name == f"{LAYER_0}gate_proj.lora_A.weight":
                    shard.parameter[0, 0, 0] += 1
        try:
            check.run(2, None)
        except RuntimeError as error:
            return str(error)
    return ""


def test_replicas_of_different_experts_hold_the_same(
    tiny: Path, chats: Path, tmp_path: Path
) -> None:
    config = config_of(tiny, chats, tmp_path, {"ep": 2}, SHARED)
    for message in run_ranks(drifted, 2, config):
        assert f"1 of {len(random_factors(SHARED, tiny)[1])} adapter tensors differ" in message
        assert f"{LAYER_0}gate_proj.lora_A.weight" in message


@pytest.mark.slow
def test_resumes_in_another_layout_and_is_exported(tiny: Path, chats: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 4, "loraplus_lr_ratio": 4.0}
    start, last = resume_elsewhere(tiny, chats, tmp_path, SHARED, **options)
    # A master and two moments for all experts of a layer.
    state = whole_state(last)
    names = {f"{key}.{LAYER_0}gate_proj.lora_A.weight" for key in STATE_KEYS}
    assert names == {name for name in state if "layers.0." in name and "gate_proj.lora_A" in name}
    export(last, tmp_path / "peft", engine="peft")
    assert "one A of gate and up and one B of down, which are in this file as a copy for each" in (
        " ".join((tmp_path / "peft" / CARD).read_text().split())
    )
    tensors = load_file(tmp_path / "peft" / WEIGHTS)
    for expert in range(1, 8):
        for part in ("gate_proj.lora_A", "up_proj.lora_A", "down_proj.lora_B"):
            first = tensors[f"{LAYER_0}0.{part}.weight"]
            assert first.any() and torch.equal(tensors[f"{LAYER_0}{expert}.{part}.weight"], first)
    export(last, tmp_path / "sglang", engine="sglang", layout="shared_outer")
    once = load_file(tmp_path / "sglang" / WEIGHTS)[f"{LAYER_0}gate_proj.lora_A.weight"]
    assert torch.equal(once[0], tensors[f"{LAYER_0}0.gate_proj.lora_A.weight"])
    # A run that does not share them is another run.
    unshared = replace(SHARED, share_outer=False)
    apart = config_of(tiny, chats, tmp_path / "apart", {"ep": 2}, unshared, **options)
    with pytest.raises(Exception, match="was trained with lora.share_outer=True"):
        run_ranks(train, 2, replace(apart, checkpoint=replace(apart.checkpoint, resume=start)))
