"""What the routed experts keep for backward: the hidden states as they were, gate_up and the
rank-wide S; nothing permuted."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from megalora.config import RunConfig
from megalora.hf.json_file import read_hf_config
from megalora.lora.experts import ExpertsLoRA
from megalora.model.fields import model_shape
from tests.distributed.ranks import run_ranks
from tests.parity.built import built
from tests.parity.everything import LORA, config_of


def kept_by_experts(config: RunConfig) -> list[tuple[int, dict[str, int]]]:
    """For each call of a rank's first experts in a training step: rows of x, and bytes kept by
    kind."""
    with built(config) as run:
        modules = itertools.chain.from_iterable(chunk.modules() for chunk in run.model.chunks)
        experts = next(module for module in modules if isinstance(module, ExpertsLoRA))
        frozen = {p.untyped_storage().data_ptr() for p in experts.parameters()}
        seen: list[tuple[int, dict[str, int]]] = []

        def forward(x: Tensor, routing: Any, probs: Tensor) -> tuple[Tensor, None]:
            kept: dict[int, Tensor] = {}

            def pack(t: Tensor) -> Tensor:
                if t.untyped_storage().data_ptr() not in frozen:
                    kept[t.untyped_storage().data_ptr()] = t
                return t

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                out = ExpertsLoRA.forward(experts, x, routing, probs)
            given = x.untyped_storage().data_ptr()
            # Storage -> bytes; indices of rows are integers and do not count.
            floats = {}
            for at, tensor in kept.items():
                if tensor.is_floating_point():
                    floats[at] = tensor.untyped_storage().nbytes()
            row = {"x": floats.pop(given, 0), "others": sum(floats.values())}
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
            assert kept["x"] == rows * shape.hidden * 4
            gate_up = 0 if recompute == "selective" else 2 * shape.expert_intermediate
            # S of gate, up and down; the probability
            assert kept["per row"] == (gate_up + 3 * LORA.rank + 1) * 4
