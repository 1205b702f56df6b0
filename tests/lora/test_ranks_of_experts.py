"""Experts of a layer with ranks of their own: stored with the largest, zero behind an expert's own,
under every layout and after any number of steps."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalora.adapters.export import export
from megalora.config import LoRAConfig
from megalora.lora.section import adapted_of, differing, lora_section, settings
from megalora.lora.select import resolve
from megalora.lora.spec import Adapted
from megalora.model.account import open_folder
from megalora.train.loop import train
from megalora.verify.peft import verify_peft
from tests.distributed.ranks import run_ranks
from tests.lora.resumed import resume_elsewhere
from tests.lora.shapes import MOE_SHAPE, adapt, refusal
from tests.parity.built import adapter_of
from tests.parity.everything import config_of
from tests.parity.models import shape_of
from tests.whole_state import whole_state

FEW = LoRAConfig(
    rank=3, alpha=9.0,
    rank_pattern={
        r"experts\.[02]\.(gate|up)_proj": 5,
        r"layers\.1\..*experts\.1\.down_proj": 1,
        r"experts\.4\.\w+": 2,
    },
)  # fmt: skip


def ranks_of(adapted: list[Adapted]) -> dict[tuple[int | None, str], tuple[int, ...]]:
    found = {}
    for a in adapted:
        if a.num_experts:
            found[a.layer, a.name] = a.expert_ranks or (a.rank,) * a.num_experts
    return found


def test_the_first_entry_that_means_an_expert_decides() -> None:
    adapted = resolve(FEW, MOE_SHAPE)
    for (layer, name), ranks in ranks_of(adapted).items():
        if name == "down_proj":
            assert ranks == (3, 1 if layer == 1 else 3, 3, 3, 2)
        else:
            assert ranks == (5, 3, 5, 3, 2)
    for a in adapted:
        # Of all experts, so that one number multiplies the products of a layer.
        assert (a.rank, a.scale) == (max(a.expert_ranks or (3,)), 9.0 / a.rank), a.name
        if a.expert_ranks:
            by_hand = sum(a.expert_ranks) * (a.in_features + a.out_features)
            assert a.num_parameters() == by_hand


def test_beside_a_rule_for_experts() -> None:
    """A rule keeps the scale of what it divides; an entry of the pattern has alpha as it is."""
    one = {r"experts\.1\.down_proj": 2}
    for a in adapt(rank=30, alpha=12.0, expert_rank="top_k", rank_pattern=one):
        if a.name == "down_proj":
            assert a.expert_ranks == (10, 2, 10, 10, 10)
            assert (a.rank, a.scale) == (10, pytest.approx(12.0 / 30))
    larger = {r"experts\.1\.down_proj": 24}
    for a in adapt(rank=30, alpha=12.0, expert_rank="top_k", rank_pattern=larger):
        if a.name == "down_proj":
            assert a.expert_ranks == (10, 24, 10, 10, 10)
            assert (a.rank, a.scale) == (24, 0.5)


def test_entries_that_mean_all_experts_are_no_ranks_of_their_own() -> None:
    pattern = {r"experts\.[0-9]\.down_proj": 2, r"experts\.[1-3]\.down_proj": 7}
    for a in adapt(rank=4, rank_pattern=pattern):
        assert not a.expert_ranks
        assert a.rank == (2 if a.name == "down_proj" else 4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"share_outer": True}, "and with lora.share_outer they share factors"),
        ({"init": "olora"}, "and lora.init=olora is not there for that"),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], said: str) -> None:
    assert refusal(rank=4, rank_pattern={r"experts\.1\.up_proj": 2}, **options) == (
        f"lora.rank_pattern gives experts of layer 0 different ranks of up_proj, {said}. Leave one"
        " of them out"
    )


def test_settings_and_a_section_say_the_ranks() -> None:
    shape = shape_of("moe")
    adapted = resolve(FEW, shape)
    read = adapted_of(settings(adapted), shape)
    assert ranks_of(read) == ranks_of(adapted)
    assert not differing(settings(read), settings(adapted))
    assert ranks_of(resolve(LoRAConfig(**lora_section(adapted, shape)), shape)) == ranks_of(adapted)
    # All experts of these layers had other ranks, and the scale stays as it was.
    same = []
    for a in adapted:
        same.append(replace(a, expert_ranks=()))
    with_ranks = sum(bool(a.expert_ranks) for a in adapted)
    assert len(differing(settings(same), settings(adapted))) == with_ranks > 0


def test_ranks_of_another_number_of_experts_are_refused() -> None:
    rows = settings(resolve(FEW, MOE_SHAPE))
    rows[4][-1] = rows[4][-1][1:]
    with pytest.raises(ValueError, match=r"has 5 experts in a layer, and there are 4 ranks of"):
        adapted_of(rows, MOE_SHAPE)


def assert_zero_behind(factors: dict[str, Tensor], adapted: list[Adapted]) -> None:
    """Rows of A and columns of B behind an expert's rank are zero, and those before are not."""
    for a in adapted:
        for expert, rank in enumerate(a.expert_ranks):
            lora_a = factors[a.tensor_name("A", expert)]
            lora_b = factors[a.tensor_name("B", expert)]
            assert lora_a.shape[0] == lora_b.shape[1] == a.rank
            assert not lora_a[rank:].any() and not lora_b[:, rank:].any()
            assert lora_a[:rank].any(dim=1).all(), (a.name, expert)


@pytest.mark.parametrize(
    "parallel", [{"tp": 2, "ep": 2}, pytest.param({"tp": 2, "etp": 2}, marks=pytest.mark.slow)]
)
def test_every_layout_starts_alike(
    parallel: dict[str, int], tiny: Path, chats: Path, tmp_path: Path
) -> None:
    alone = run_ranks(adapter_of, 1, config_of(tiny, chats, tmp_path, {}, FEW))[0]
    cut = run_ranks(adapter_of, 2, config_of(tiny, chats, tmp_path, parallel, FEW))[0]
    assert alone.keys() == cut.keys()
    for name, value in alone.items():
        assert torch.equal(value, cut[name]), name
    assert_zero_behind(alone, resolve(FEW, open_folder(tiny).shape))
    # What is not zero is what the expert has in an adapter whose experts all have the largest rank.
    name = "base_model.model.model.layers.0.mlp.experts.1.up_proj.lora_A.weight"
    largest = replace(FEW, rank_pattern={r"experts\.\d+\.(gate|up)_proj": 5})
    full = run_ranks(adapter_of, 1, config_of(tiny, chats, tmp_path, {}, largest))[0]
    assert torch.equal(full[name][:3], alone[name][:3])


@pytest.mark.slow
def test_zeros_stay_and_peft_has_the_same_adapter(tiny: Path, chats: Path, tmp_path: Path) -> None:
    """Four steps with weight decay and averages, the last two in another layout."""
    options: dict[str, Any] = {"steps": 4, "weight_decay": 0.1, "ema_decay": 0.5, "lr": 1e-2}
    start, last = resume_elsewhere(tiny, chats, tmp_path, FEW, **options)
    adapted = resolve(FEW, open_folder(tiny).shape)
    state = whole_state(last)
    factors = {}
    for name, value in state.items():
        if name.startswith("param."):
            factors[name.removeprefix("param.")] = value
    assert_zero_behind(factors, adapted)
    export(last, tmp_path / "peft", engine="peft")
    assert verify_peft(tmp_path / "peft", str(tiny), atol=2e-5).ok
    # One rank for all is another run.
    plain = config_of(tiny, chats, tmp_path / "apart", {}, replace(FEW, rank_pattern={}), **options)
    with pytest.raises(Exception, match="was trained with lora.rank_pattern"):
        run_ranks(train, 1, replace(plain, checkpoint=replace(plain.checkpoint, resume=start)))
