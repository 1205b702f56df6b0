"""Check the rows of the table of factors: what a rank holds of a magnitude, which is cut like B."""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megalora.hf.tensor_names import FactorName
from megalora.lora.factors import LoRAFactors
from megalora.lora.spec import expected_tensors
from megalora.model.families import layer_projections
from tests.lora.shapes import SHARED_SHAPE, adapt

EXPERTS = "base_model.model.model.layers.2.mlp.experts"


@dataclass(frozen=True)
class Group:
    """A process group as its rank and size alone."""

    of_rank: int
    of_size: int

    def rank(self) -> int:
        return self.of_rank

    def size(self) -> int:
        return self.of_size


def factors_of(module: str, rank: int, **options: Any) -> LoRAFactors:
    """A module of layer 2 as ``rank`` holds it: two ranks of TP, of which each is one of ETP."""
    adapted = []
    for a in adapt(SHARED_SHAPE, rank=3, layers=[2], **options):
        if a.projection.module == module:
            adapted.append(replace(a, factors=("A", "B", "M")))
    fused = [p for p in layer_projections(SHARED_SHAPE, 2) if p.module == module]
    two = Group(rank, 2)
    groups = SimpleNamespace(ep=Group(0, 1), named=lambda _: two, experts_reduce_separately=True)
    return LoRAFactors(
        adapted, fused, SHARED_SHAPE, groups,
        seed=1, dtype=torch.bfloat16, device=torch.device("cpu"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("module", "name", "shape"),
    [
        # q has 192 rows and gate 40; o and down have the hidden size, whole on every rank.
        ("self_attention.linear_qkv", "q_proj", (96,)),
        ("self_attention.linear_proj", "o_proj", (96,)),
        ("mlp.experts.gate_up", "gate_proj", (5, 20)),
        ("mlp.experts.down", "down_proj", (5, 96)),
        ("mlp.shared_experts.linear_fc1", "up_proj", (56,)),
    ],
)
def test_a_magnitude_lies_on_a_rank_as_b_does(
    module: str, name: str, shape: tuple[int, ...]
) -> None:
    for rank in range(2):
        factors = factors_of(module, rank)
        m: Any = factors.lora_M[name]
        b: Any = factors.lora_B[name]
        assert (m.shape, m.dtype, b.dtype) == (shape, torch.float32, torch.bfloat16)
        assert (m == 1).all()
        for mark in ("num_shards", "shard", "sum_group", "allreduce", "tensor_model_parallel"):
            assert getattr(m, mark) == getattr(b, mark), mark
        # Rows of the whole weight come in different parts, or are on both ranks.
        assert m.num_shards == (1 if name in ("o_proj", "down_proj") else 2)


def test_every_tensor_of_the_table_is_a_shard() -> None:
    """Names of a rank's shards are those of the table, each of the shape that its parts make up."""
    for module in ("self_attention.linear_qkv", "mlp.experts.gate_up", "mlp.experts.down"):
        factors = factors_of(module, 1)
        table = expected_tensors(factors.adapted)
        found: dict[str, FactorName] = {}
        for shard in factors.shards():
            found[shard.name] = shard.factor
            whole = torch.arange(100_000.0)[: torch.Size(table[shard.name]).numel()]
            part = shard.cut(whole.view(table[shard.name]))
            assert shard.of({shard.parameter: shard.parameter.data}).shape == part.shape
        assert found.keys() == table.keys()
        assert sorted(set(found.values())) == ["A", "B", "M"]
    assert f"{EXPERTS}.4.down_proj.lora_magnitude_vector" in found


def test_magnitudes_are_counted() -> None:
    for module in ("self_attention.linear_qkv", "mlp.experts.gate_up"):
        for a in factors_of(module, 0).adapted:
            linears = max(1, a.num_experts)
            without = replace(a, factors=("A", "B")).num_parameters()
            assert a.num_parameters() - without == linears * a.out_features
