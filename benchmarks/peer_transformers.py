"""Build the arms of the comparison that run on transformers: stock PEFT, and Unsloth where it is
installed."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import train_arms
from benchmarks.peer_case import Input, PeerArm, Tied, initial_a
from benchmarks.train_arms import Setup

# transformers keeps a layer's experts in two tensors, which PEFT adapts by their names: it has no
# module for each expert.
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
READS: dict[str, Input] = {
    "q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "o_proj": "o", "gate_up_proj": "gate_up",
    "down_proj": "down",
}  # fmt: skip


@torch.no_grad()
def _start_and_tie(model: nn.Module, setup: Setup) -> Tied:
    """Fill PEFT's A's, whose rows go expert by expert, and tie those of q, k and v; B is zero from
    the start."""
    gradients: dict[tuple[int, Input], list[Callable[[], Tensor]]] = defaultdict(list)
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        layer = int(re.findall(r"layers\.(\d+)", name)[0])
        # A wrapper of a parameter says which one; of a linear its own name does.
        read = READS[getattr(module, "parameter_name", name.rsplit(".", 1)[-1])]
        # Of experts [E R, in]: ours, [E, R, in], has the same order in memory.
        a: Any = module.lora_A.default.weight  # pyright: ignore
        a.copy_(initial_a(setup, layer, read).view(a.shape))
        gradients[layer, read].append(_gradient(a))
    return Tied(gradients.values())


def _gradient(parameter: nn.Parameter) -> Callable[[], Tensor]:
    # Looked up at each call: the optimizer's ``zero_grad`` drops the tensor.
    def gradient() -> Tensor:
        assert parameter.grad is not None
        return parameter.grad

    return gradient


@contextmanager
def peft(setup: Setup) -> Iterator[PeerArm]:
    """Stock PEFT: ``target_modules`` on attention, ``target_parameters`` on experts, as
    transformers' Trainer steps."""
    model = train_arms.adapted(train_arms.base_model(setup), setup, EXPERTS)
    tied = _start_and_tie(model, setup)
    note = "target_modules and target_parameters on transformers; one A for gate and up"
    yield PeerArm(train_arms.training(model, setup, note, gate_up_is_one=True), tied, True, model)


@contextmanager
def unsloth(setup: Setup) -> Iterator[PeerArm]:
    """Unsloth as its notebooks use it. Which linears share an adapter is its own choice, so only
    the base's loss is compared."""
    with train_arms.unsloth_model(setup) as model:
        training = train_arms.training(
            model, setup, "FastModel, its own adapters", gate_up_is_one=True
        )
        yield PeerArm(training, Tied([]), False, model)
