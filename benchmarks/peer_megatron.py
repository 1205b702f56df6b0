"""Build the arms of the comparison that run on Megatron-Core: megalora, torch's grouped_mm
composed, and Megatron-Bridge's LoRA.

All have one base (attention, norms, embeddings, output layer), one training step (Megatron's
schedule, DDP, sharded AdamW) and one batch; they differ in experts and adapters. Where Transformer
Engine is installed, Bridge has its own model of it, as users have.

Shape legend: M routed rows   E experts   K inputs   N outputs   R rank   H hidden
I expert intermediate
"""

import importlib.util
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from megalora_kernels import Routing, permute, unpermute
from torch import Tensor, nn

from benchmarks.arms import split_linear
from benchmarks.peer_case import Input, PeerArm, Tied, initial_a
from benchmarks.train_arms import ALPHA_OVER_RANK, Setup
from benchmarks.train_case import ATTENTION
from benchmarks.train_megalora import adapted_base, on_megatron, training_on_megatron

READS: dict[str, Input] = {
    "q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "o_proj": "o",
    "gate_proj": "gate_up", "up_proj": "gate_up", "down_proj": "down",
}  # fmt: skip
"""Which input each projection's A reads."""


# ---- megalora ------------------------------------------------------------------------------------


def _start_and_tie(shards: list[Any], setup: Setup) -> Tied:
    """Fill the A's of megalora's adapters and tie those that read one input.

    A shard is one tensor of an adapter file: one expert's A of one projection is a view into a
    parameter.
    """
    starts: dict[tuple[int, Input], Tensor] = {}
    # For each input, the places of its A's. All experts of a projection are one entry, as they are
    # the same ranks of one parameter: gate's A is rows 0 to r of the stacked one, up's the rest.
    places: dict[tuple[int, Input], dict[tuple[Any, str], Callable[[], Tensor]]] = defaultdict(dict)
    for shard in shards:
        # B starts as zero everywhere.
        if not shard.name.endswith("lora_A.weight"):
            continue
        layer = int(re.findall(r"layers\.(\d+)", shard.name)[0])
        expert = re.findall(r"experts\.(\d+)", shard.name)
        # "... .gate_proj.lora_A.weight"
        read = READS[shard.name.split(".")[-3]]
        if (layer, read) not in starts:
            starts[layer, read] = initial_a(setup, layer, read)
        start = starts[layer, read]
        ranks = shard.index
        if expert:
            # ``start`` is [E, R, H]; the index begins with the expert, of which all are one entry.
            start = start[int(expert[0])]
            ranks = (slice(None), *shard.index[1:])
        shard.of({shard.parameter: shard.parameter.data}).copy_(start)
        places[layer, read][shard.parameter, str(ranks)] = _main_gradient(shard.parameter, ranks)
    return Tied(list(found.values()) for found in places.values())


def _main_gradient(parameter: Any, index: tuple[Any, ...]) -> Callable[[], Tensor]:
    # Megatron's DDP adds gradients up in ``main_grad`` and leaves ``grad`` empty.
    return lambda: parameter.main_grad[index]


@contextmanager
def megalora(setup: Setup) -> Iterator[PeerArm]:
    """megalora with its usual adapters, on each of q, k, v, o, gate, up and down."""
    with on_megatron(setup) as groups:
        model = adapted_base(setup, groups)
        [chunk] = model.chunks
        tied = _start_and_tie(model.shards, setup)
        training = training_on_megatron(
            chunk, setup, groups, "adapters on q, k, v, o; per expert on gate, up, down"
        )
        yield PeerArm(training, tied, True, chunk)


# ---- torch's grouped_mm, composed ----------------------------------------------------------------


class ComposedExperts(nn.Module):
    """Experts with LoRA composed of torch's operations: for each linear three grouped GEMMs, a
    scale and an add."""

    def __init__(self, base: Any, layer: int, setup: Setup) -> None:
        super().__init__()
        self.base = base
        E, J, H = base.gate_up.shape
        inner = base.down.shape[2]
        new = {"dtype": setup.dtype, "device": setup.device}
        self.a1 = nn.Parameter(initial_a(setup, layer, "gate_up").to(**new))
        self.a2 = nn.Parameter(initial_a(setup, layer, "down").to(**new))
        self.b1 = nn.Parameter(torch.zeros(E, J, setup.rank, **new))
        self.b2 = nn.Parameter(torch.zeros(E, H, setup.rank, **new))
        # down reads the activation, whose width the base's weight says.
        assert self.a2.shape == (E, setup.rank, inner)

    def forward(self, x_TH: Tensor, routing: Routing, probs_M: Tensor) -> tuple[Tensor, None]:
        x_MH = permute(x_TH, routing)
        ends = routing.offsets_E
        gate, up = split_linear(x_MH, self.base.gate_up, self.a1, self.b1, ends).chunk(2, dim=1)
        # The router's weight before down, which is linear: as megalora and Megatron have it.
        h_MI = F.silu(gate) * up * probs_M[:, None].to(gate.dtype)
        return unpermute(split_linear(h_MI, self.base.down, self.a2, self.b2, ends), routing), None

    def backward_dw(self) -> None:
        """Megatron's hook for delayed weight gradients; there are none."""


@contextmanager
def composed(setup: Setup) -> Iterator[PeerArm]:
    """megalora's model and attention; experts as one would write them first, without kernels of
    their own."""
    with on_megatron(setup) as groups:
        model = adapted_base(setup, groups, target_modules=list(ATTENTION))
        chunk: Any = model.chunks[0]
        tied = _start_and_tie(model.shards, setup)
        # Megatron numbers layers from 1.
        for layer in chunk.decoder.layers:
            layer.mlp.experts = ComposedExperts(layer.mlp.experts, layer.layer_number - 1, setup)
        note = "megalora's attention; experts of grouped_mm, one adapter on gate and up"
        yield PeerArm(training_on_megatron(chunk, setup, groups, note), tied, True, chunk)


# ---- Megatron-Bridge -----------------------------------------------------------------------------


@contextmanager
def _bridge(setup: Setup, shared: bool, grouped: bool) -> Iterator[PeerArm]:
    """Bridge's ``LoRA`` on its model with Transformer Engine, or without it on ours with Megatron's
    own MoE layer."""
    with on_megatron(setup) as groups:
        from benchmarks.bridge_lora import bridge_lora
        from benchmarks.bridge_model import bridge_base

        lora = bridge_lora()(
            dim=setup.rank, alpha=ALPHA_OVER_RANK * setup.rank, share_expert_adapters=shared
        )
        chunk, experts = bridge_base(setup, grouped)
        lora([chunk], training=True)
        _start_bridge(chunk, setup, shared and grouped)
        adapters = "one adapter for all experts" if shared else "an adapter per expert"
        note = f"{adapters}, one A for q, k, v and for gate and up; {experts}"
        yield PeerArm(training_on_megatron(chunk, setup, groups, note), Tied([]), not shared, chunk)


@torch.no_grad()
def _start_bridge(chunk: nn.Module, setup: Setup, shared: bool) -> None:
    """Fill the A's of Bridge's adapters; B is zero from the start. An adapter for all experts
    starts as expert 0's."""
    # By Megatron's names of linears; fc1 is gate and up stacked, fc2 is down.
    reads: dict[str, Input] = {
        "self_attention.linear_qkv": "qkv", "self_attention.linear_proj": "o",
        "linear_fc1": "gate_up",
        "linear_fc2": "down",
    }  # fmt: skip
    num_started = 0
    for name, module in chunk.named_modules():
        if not name.endswith(".adapter"):
            continue
        layer = int(re.findall(r"layers\.(\d+)", name)[0])
        expert = re.findall(r"local_experts\.(\d+)", name)
        [linear] = [linear for linear in reads if f"{linear}.adapter" in name]
        start = initial_a(setup, layer, reads[linear])
        # SequentialMLP has a module for each expert, grouped experts one tensor [E, R, in] for all.
        if expert:
            start = start[int(expert[0])]
        elif shared and ".experts." in name:
            start = start[0]
        module.linear_in.weight.copy_(start)  # pyright: ignore
        num_started += 1
    # qkv, proj, fc1 and fc2 of every layer at least: a name that was not matched would leave an
    # adapter as Bridge has drawn it.
    assert num_started >= 4 * setup.config["num_hidden_layers"], (
        f"Bridge adapted {num_started} linears"
    )


def bridge_default(setup: Setup) -> Any:
    """Bridge's default: one adapter that all experts of a rank share, which only its grouped
    experts can have."""
    return _bridge(setup, shared=True, grouped=True)


def bridge_per_expert(setup: Setup) -> Any:
    """An adapter per expert, on the experts that this machine's Megatron has."""
    return _bridge(
        setup, shared=False, grouped=importlib.util.find_spec("transformer_engine") is not None
    )


def bridge_grouped(setup: Setup) -> Any:
    """An adapter per expert on grouped experts: the class that Bridge uses with Transformer
    Engine."""
    return _bridge(setup, shared=False, grouped=True)
