"""Check which copies of an adapter's tensors are compared, and that those that differ are named."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megalora.config import RunConfig
from megalora.train.drift import DriftCheck
from tests.distributed.ranks import run_ranks
from tests.parity.built import built
from tests.parity.runs import make_config


def found_after_a_change(config: RunConfig, names: list[str], rank: int) -> str:
    """Change the last bit of the last element of each tensor on one rank; what the check says on
    this one."""
    with built(config) as run:
        check = DriftCheck(run.model.adapted, run.model.shards, run.model.groups)
        # Nothing differs yet, or this would raise.
        check.run(0, None)
        if dist.get_rank() == rank:
            for shard in run.model.shards:
                if shard.name in names:
                    # A view of the parameter, in which several tensors may be stacked.
                    part = shard.of({shard.parameter: shard.parameter.data})
                    part[-1, -1] = torch.nextafter(part[-1, -1], torch.tensor(torch.inf))
        try:
            check.run(1, None)
        except RuntimeError as error:
            # The part with the names, without the advice that follows.
            return str(error).partition(". A gradient")[0].partition(": ")[2]
        return ""


# One of q, k and v, which are stacked; one expert of many in gate and up, and one in down.
LAYER = "base_model.model.model.layers.{}.{}.weight"
Q = LAYER.format(0, "self_attn.q_proj.lora_A")
GATE_A = LAYER.format(0, "mlp.experts.2.gate_proj.lora_A")
DOWN_B = LAYER.format(0, "mlp.experts.5.down_proj.lora_B")


# With EP 2 each rank has experts of its own, and nothing to compare them with; without, both ranks
# have all.
@pytest.mark.parametrize(
    ("parallel", "found"),
    [({"ep": 2}, [Q]), ({}, [Q, GATE_A, DOWN_B])],
    ids=["experts once", "experts twice"],
)
def test_tensors_that_differ_are_named_and_only_replicas_are_compared(
    parallel, found, tiny: Path, chats: Path, tmp_path: Path
):
    """One tensor of a stacked parameter, one expert of many: the parameter's hash tells, the
    tensor's name is said."""
    config = make_config(tiny, chats, tmp_path, parallel)
    for said in run_ranks(found_after_a_change, 2, config, [Q, GATE_A, DOWN_B], 1):
        # 4 layers of 4 projections of attention and 3 of each of 8 experts, A and B: 4 * 28 * 2.
        count, _, names = said.partition(
            " of 224 adapter tensors differ between ranks that hold the same part of them: "
        )
        assert count == str(len(found))
        assert sorted(names.split(", ")) == sorted(found)
