"""Codes stay the bits that were loaded, and nothing decoded is kept for backward: in whole models,
with Megatron's own wrapper and linears."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megalora.config import ModelConfig, ParallelConfig
from megalora.lora.adapted_model import with_held
from megalora.model.account import open_folder
from megalora.model.build import build_model
from megalora.model.formats import ALL_PLAIN
from megalora.model.held import held_in
from megalora.model.held_codes import HeldCodes
from megalora.parallel import parallel_groups
from megalora.train.loop import train
from tests.distributed.ranks import run_ranks
from tests.model.quantised.test_training import LORA, SIZES
from tests.oracles import quantised as oracle
from tests.oracles.base import make_base
from tests.parity.runs import make_config


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base", **SIZES)


def coded_model(folder: Path, weight_format: Any) -> Any:
    """A model of one rank whose linears are codes."""
    config = ModelConfig(path=str(folder), dtype="float32", weight_format=weight_format)
    opened = open_folder(folder)
    held = held_in(config, opened)
    assert held is not None
    formats = with_held(ALL_PLAIN, held, opened.shape, ParallelConfig())
    (chunk,) = build_model(config, ParallelConfig(), opened.shape, folder, formats=formats)
    return chunk


def values_of(model: Any) -> list[Tensor]:
    """All experts of every held weight, decoded in float32."""
    found: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, HeldCodes):
            found.append(module.quantised.dequantised(torch.float32))
    return found


def after_casts(folder: Path, weight_format: Any) -> None:
    with parallel_groups(ParallelConfig()):
        model = coded_model(folder, weight_format)
        before = [value.clone() for value in values_of(model)]
        assert len(before) == 8
        # What Megatron's training loops do with a model in bfloat16.
        model.config.bf16 = True
        wrapped = Float16Module(model.config, model)
        wrapped.bfloat16().half().float().to(torch.bfloat16)
        assert next(wrapped.parameters()).dtype == torch.bfloat16
        for one, other in zip(before, values_of(wrapped), strict=True):
            assert torch.equal(one, other)


def test_05_a_cast_reaches_neither_codes_nor_scales(base: Path, tmp_path: Path) -> None:
    oracle.quantise_folder(base, tmp_path / "fp8", "fp8")
    run_ranks(after_casts, 1, tmp_path / "fp8", "auto")
    run_ranks(after_casts, 1, base, "nf4")


def train_with_a_cast(config: Any) -> None:
    """Train, with scales that bfloat16 rounds when they are first computed with."""
    decoded = HeldCodes.decoded

    def rounding(self: HeldCodes) -> Tensor:
        self.scales.copy_(self.scales.bfloat16())
        return decoded(self)

    HeldCodes.decoded = rounding  # type: ignore[method-assign]
    try:
        train(config)
    finally:
        HeldCodes.decoded = decoded  # type: ignore[method-assign]


def test_05_a_run_whose_scales_were_cast_stops_behind_step_1(
    base: Path, chats: Path, tmp_path: Path
) -> None:
    config = make_config(base, chats, tmp_path / "run", {}, lora=LORA, steps=3)
    config = replace(config, model=replace(config.model, weight_format="nf4"))
    with pytest.raises(Exception, match=r"the codes of \d of 8 frozen weights are not those"):
        run_ranks(train_with_a_cast, 1, config)
    # Nothing was saved that learned from them.
    assert not list((tmp_path / "run").glob("step_*"))


NUM_TOKENS = 34
"""No size of any weight."""


def kept_bytes(folder: Path) -> int:
    """Bytes that a forward pass keeps for backward beside the model's own tensors; none of them is
    a decoded weight."""
    with parallel_groups(ParallelConfig()):
        model = coded_model(folder, "nf4")
        shapes: set[tuple[int, ...]] = set()
        for module in model.modules():
            if isinstance(module, HeldCodes):
                _, n, k = module.sizes
                shapes |= {(n, k), (k, n), module.sizes}
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        saved: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            assert tuple(t.shape) not in shapes, f"a decoded weight is kept: {tuple(t.shape)}"
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes()
            return t

        embedding = model.embedding.word_embeddings.weight
        embedding.requires_grad_(True)
        tokens = torch.arange(NUM_TOKENS)[None]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            logits = model(tokens, None, None)
        logits.sum().backward()
        assert embedding.grad is not None and embedding.grad.any()
        return sum(saved.values())


def test_06_nothing_decoded_is_kept_for_backward(tmp_path: Path) -> None:
    """Of dense linears neither; and what is kept does not grow with the number of experts."""
    kept: dict[int, int] = {}
    for num_experts in (4, 8):
        sizes: dict[str, Any] = SIZES | {"num_experts": num_experts}
        folder = make_base(tmp_path / str(num_experts), **sizes)
        (kept[num_experts],) = run_ranks(kept_bytes, 1, folder)
    # Router scores, and offsets of experts, of two layers; an expert's weights in float32 have
    # 147,456 bytes.
    assert kept[8] - kept[4] <= 2 * 4 * NUM_TOKENS * 4 * 8
