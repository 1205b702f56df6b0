"""Bases with biases, scaled rotary embeddings and packed experts, cut over ranks: transformers'
logits, and each rank's own reads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalora.model.base_weights import BaseWeights
from tests.cases.test_base_cases import packed
from tests.distributed.ranks import run_ranks
from tests.oracles.base import logits_of_ranks, make_base, rewrite, transformers_logits

# Scalings whose every parameter differs from transformers' default, so that one that is not read
# changes the logits.
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 16,
    "beta_slow": 2,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4}
SIZES: dict[str, Any] = {"num_attention_heads": 12, "num_key_value_heads": 2, "head_dim": 16}


def _logits_and_reads(folders: list[Path], sizes: dict[str, int]) -> tuple[list[Tensor], list[str]]:
    """This rank's logits of each folder, and the experts' tensors it read of the last one."""
    read: list[str] = []
    real = BaseWeights.__getitem__

    def counting(self: BaseWeights, name: str) -> Tensor:
        read.append(name)
        return real(self, name)

    # No need to put it back: the rank's process ends with the test.
    BaseWeights.__getitem__ = counting
    logits = logits_of_ranks(folders[:-1], sizes)
    read.clear()
    logits += logits_of_ranks(folders[-1:], sizes)
    return logits, [name for name in read if ".experts." in name]


@pytest.mark.slow
def test_four_ranks_compute_what_transformers_does(tmp_path: Path) -> None:
    """TP 4 with a key/value head on two ranks each, EP 2 x ETP 2; then the same at TP 2, EP 2."""
    # ``...`` removes the field: these configs have the older spelling, rope_scaling.
    rope: dict[str, Any] = {"rope_parameters": ...}
    folders = [
        rewrite(
            make_base(tmp_path / "dense", "qwen3", attention_bias=True, **SIZES),
            rope_scaling=YARN,
            **rope,
        ),
        rewrite(make_base(tmp_path / "llama3", "qwen2_moe", **SIZES), rope_scaling=LLAMA3, **rope),
        rewrite(
            make_base(tmp_path / "moe", attention_bias=True, **SIZES),
            packed,
            rope_scaling=YARN,
            **rope,
        ),
    ]
    expected = [transformers_logits(folder) for folder in folders]
    for world, sizes in ((4, {"tp": 4, "ep": 2, "etp": 2}), (2, {"tp": 2, "ep": 2})):
        # A model without experts has no expert grid.
        first = run_ranks(_logits_and_reads, world, folders[:1], {"tp": world})
        others = run_ranks(_logits_and_reads, world, folders[1:], sizes)
        # Logits of each rank by folder: the dense one, then the two with experts.
        by_rank = []
        for (of_dense, _), (of_moe, _) in zip(first, others, strict=True):
            by_rank.append([*of_dense, *of_moe])
        for number, wanted in enumerate(expected):
            # Ranks hold parts of the vocabulary.
            whole = torch.cat([logits[number] for logits in by_rank], -1)
            # Logits of about 4 in float32, after some hundred rounded sums each.
            assert (whole - wanted).abs().max() <= 1e-5
        # EP ranks lie ETP size apart; each holds four of the eight experts and reads no other.
        etp = sizes.get("etp", 1)
        for rank, (_, reads) in enumerate(others):
            experts = set()
            for name in reads:
                # model.layers.0.mlp.experts.3.…
                experts.add(int(name.split(".")[5]))
            first_expert = 4 * (rank // etp)
            assert experts == set(range(first_expert, first_expert + 4))
