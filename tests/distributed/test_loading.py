"""Base weights arrive sharded: a rank reads its own experts from disk and no others, and its shard
is the right one."""

from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open

from megalora.config import ModelConfig, ParallelConfig
from megalora.hf.json_file import read_hf_config
from megalora.model.build import build_model
from megalora.model.fields import model_shape
from megalora.model.hf_weights import FamilyBridge
from megalora.parallel import parallel_groups
from tests.distributed.ranks import run_ranks


def _load(base: Path) -> tuple[int, int, set[int], torch.Tensor, torch.Tensor]:
    """(EP rank, ETP rank, experts read, gate_up and down of layer 2) at EP 2 x ETP 2."""
    read: set[int] = set()
    real = FamilyBridge.maybe_modify_loaded_hf_weight

    def counting(self, hf_param, hf_state_dict):
        weight = real(self, hf_param, hf_state_dict)
        if not callable(weight):
            return weight
        return lambda expert, projection: read.add(expert) or weight(expert, projection)

    # Bridge asks this method for every tensor; for experts it answers with a function that reads
    # one when it is called.
    FamilyBridge.maybe_modify_loaded_hf_weight = counting
    parallel = ParallelConfig(ep=2, etp=2)
    with parallel_groups(parallel) as groups:
        config = ModelConfig(path=str(base), dtype="float32")
        chunk = build_model(config, parallel, model_shape(read_hf_config(base)), base)[0]
        experts = chunk.decoder.layers[2].mlp.experts
        assert dist.get_world_size() == 4
        return (
            groups.ep.rank(),
            groups.etp.rank(),
            read,
            experts.gate_up.detach().clone(),
            experts.down.detach().clone(),
        )


def test_a_rank_reads_its_own_experts_and_takes_its_slice(tiny):
    weights = {}
    for shard in tiny.glob("*.safetensors"):
        with safe_open(str(shard), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no dict
                weights[name] = file.get_tensor(name)
    for ep, etp, read, gate_up, down in run_ranks(_load, 4, tiny):
        # 8 experts over EP 2.
        mine = range(4 * ep, 4 * ep + 4)
        assert read == set(mine)
        for at, expert in enumerate(mine):
            stem = f"model.layers.2.mlp.experts.{expert}"
            gate = weights[f"{stem}.gate_proj.weight"]
            up = weights[f"{stem}.up_proj.weight"]
            whole_down = weights[f"{stem}.down_proj.weight"]
            # A rank has its half of gate and its half of up, not half of the two stacked.
            assert torch.equal(gate_up[at], torch.cat([gate.chunk(2)[etp], up.chunk(2)[etp]]))
            # down's inputs are split, as its columns take the rank's half of gate * up.
            assert torch.equal(down[at], whole_down.chunk(2, dim=1)[etp])
