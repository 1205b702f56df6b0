"""Count what the routed experts keep for backward: the hidden states as they were, gate_up and the
rank-wide S; nothing permuted."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megalora.config import RunConfig
from megalora.hf.json_file import read_hf_config
from megalora.lora.experts import ExpertsLoRA
from megalora.model.fields import model_shape
from tests.distributed.ranks import run_ranks
from tests.parity.built import built
from tests.parity.everything import LORA, config_of


def first_experts(chunks: Iterable[nn.Module]) -> ExpertsLoRA:
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, ExpertsLoRA):
                return module
    raise AssertionError("this rank has no experts")


def kept_by_experts(config: RunConfig) -> list[tuple[int, dict[str, int]]]:
    """Bytes that a rank's first experts keep, for each of their calls in a training step.

    Returns:
        For each call the rows of x, and bytes by kind: ``x``, ``others``, and those others for each
        routed row.
    """
    with built(config) as run:
        experts = first_experts(run.model.chunks)
        # Weights are saved for backward too, but exist in any case.
        frozen = {p.untyped_storage().data_ptr() for p in experts.parameters()}
        seen: list[tuple[int, dict[str, int]]] = []

        def forward(x: Tensor, routing: Any, probs: Tensor) -> tuple[Tensor, None]:
            kept: dict[int, Tensor] = {}

            def pack(t: Tensor) -> Tensor:
                # By storage: views of one tensor are kept once.
                if t.untyped_storage().data_ptr() not in frozen:
                    kept[t.untyped_storage().data_ptr()] = t
                return t

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                out = ExpertsLoRA.forward(experts, x, routing, probs)
            given = x.untyped_storage().data_ptr()
            row = {"x": 0, "others": 0}
            for at, tensor in kept.items():
                # Indices of rows are integers and do not count.
                if tensor.is_floating_point():
                    row["x" if at == given else "others"] += tensor.untyped_storage().nbytes()
            row["per row"] = row["others"] // max(1, routing.num_rows)
            seen.append((x.shape[0], row))
            return out

        experts.forward = forward
        run.stepper.train(run.batches.of_step(0), run.optimizer)
        return seen


@pytest.mark.parametrize("recompute", ["off", "selective"])
@pytest.mark.parametrize(("world", "parallel"), [(1, {}), (2, {"ep": 2})], ids=["ep1", "ep2"])
def test_bytes_kept_per_token(world, parallel, recompute, everything, chats, tmp_path) -> None:
    config = config_of(
        everything, chats, tmp_path / "run", parallel, LORA, recompute, micro_batch_size=1
    )
    shape = model_shape(read_hf_config(everything))
    for calls in run_ranks(kept_by_experts, world, config):
        assert calls
        for rows, kept in calls:
            assert rows > 0
            # The hidden states [rows, H] in float32, not the permuted [rows * top_k, H] that a
            # grouped GEMM would want.
            assert kept["x"] == rows * shape.hidden * 4
            # [routed rows, 2I], computed again in backward under selective recomputation.
            gate_up = 2 * shape.expert_intermediate
            if recompute == "selective":
                gate_up = 0
            # S = x A^T of gate, up and down, each [routed rows, r], and a probability per row.
            assert kept["per row"] == (gate_up + 3 * LORA.rank + 1) * 4
