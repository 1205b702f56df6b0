"""One MoE layer inside a sharded model against the plain float64 layer: output, dx, dA, dB, router,
probabilities.

The layer's input and the gradient of its output are taken from a training step as it runs, on every
rank. Tokens do not depend on each other here, so the tokens of all ranks are one bag: outputs are
compared rank by rank, adapter gradients as the sum over all.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalora.config import RunConfig
from megalora.lora import experts
from tests.distributed.ranks import run_ranks
from tests.oracles.moe_layer import layer_of
from tests.parity.built import built, random_adapter
from tests.parity.compare import of_largest
from tests.parity.everything import LORA, WITHOUT_ROUTER, config_of
from tests.parity.gradients import reduced_gradients

# (world size, layout, recomputation). "selective" recomputes the MoE layer in backward, where hooks
# on it must still see the gradients of the real pass.
LAYOUTS = {
    "single": (1, {}, "off"),
    "tp2": (2, {"tp": 2}, "off"),
    "ep2": (2, {"ep": 2}, "selective"),
    "etp2": (2, {"etp": 2}, "off"),
    "tp2-ep2-etp2": (4, {"tp": 2, "ep": 2, "etp": 2}, "selective"),
    "tp4-ep2": (4, {"tp": 4, "ep": 2}, "off"),
    "ep4": (4, {"ep": 4}, "off"),
}


def watched_step(
    config: RunConfig, weights: Path
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor] | None]:
    """Forward and backward of the first batch. Returns x, y, dy, dx ``[T, H]`` and probabilities
    ``[T, E]`` of layer 0 for every microbatch of this rank, and the reduced gradients."""
    with built(config, weights) as run:
        # No pipeline stages here: the first chunk has layer 0 on every rank.
        layer = run.model.chunks[0].decoder.layers[0].mlp
        seen: list[dict[str, Tensor]] = []

        def keep(name: str, tensor: Tensor) -> None:
            seen[-1][name] = tensor.detach().flatten(0, -2).double()

        def before(_: Any, args: tuple[Tensor, ...]) -> None:
            seen.append({})
            keep("x", args[0])
            args[0].register_hook(lambda gradient: keep("dx", gradient))

        def after(_: Any, __: Any, output: tuple[Tensor, Any]) -> None:
            keep("y", output[0])
            output[0].register_hook(lambda gradient: keep("dy", gradient))

        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after)
        layer.router.register_forward_hook(lambda _, __, output: keep("probabilities", output[0]))
        run.stepper.train(run.batches.of_step(0), run.optimizer)
        return seen, reduced_gradients(run.model, run.optimizer)


ARMS = [(name, "all experts busy", "loop") for name in LAYOUTS]
# Ranks of which no expert has a token: products of no rows, and collectives all the same.
for _name in ("ep4", "tp2-ep2-etp2"):
    ARMS.append((_name, "a rank's experts idle", "loop"))
    ARMS.append((_name, "a rank's experts idle", "grouped_mm"))
ARMS.append(("ep2", "all experts busy", "triton"))
FAST = {
    ("single", "all experts busy", "loop"),
    ("ep2", "all experts busy", "loop"),
    ("tp2-ep2-etp2", "a rank's experts idle", "loop"),
    ("tp2-ep2-etp2", "a rank's experts idle", "grouped_mm"),
}
"""Every exchange between ranks, each back end but the interpreted one, and experts without rows."""


def compare_microbatch(layer: Any, record: dict[str, Tensor]) -> Tensor:
    """Put a microbatch's own input and output gradient through the plain layer, whose factors keep
    their gradients; the number of tokens of each expert."""
    x = record["x"].requires_grad_()
    y, probabilities = layer(x)
    # The gradient of this sum with respect to y is dy.
    (y * record["dy"]).sum().backward()
    expected = {"y": y.detach(), "dx": x.grad, "probabilities": probabilities.detach()}
    for quantity, value in expected.items():
        assert value is not None
        # Float32 sums of some hundred terms over the largest entry of the quantity.
        torch.testing.assert_close(
            record[quantity], value, rtol=0, atol=2e-6 * value.abs().max().item(),
            msg=lambda m, q=quantity: f"{q}: {m}",
        )  # fmt: skip
    return (probabilities > 0).sum(0)


@pytest.mark.parametrize(
    ("name", "tokens", "backend"),
    [pytest.param(*arm, marks=[] if arm in FAST else pytest.mark.slow) for arm in ARMS],
)
def test_layer_computes_what_the_plain_layer_computes(
    name, tokens, backend, everything, idle, chats, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("MEGALORA_BACKEND", backend)
    # On a GPU the grouped GEMM keeps the adapter's columns beside the weights, [W | B]; on a CPU
    # that gains nothing, so without this its path would not be taken.
    monkeypatch.setattr(experts, "gains_from_room", lambda *_: backend == "grouped_mm")
    world, parallel, recompute = LAYOUTS[name]
    base = everything
    lora = LORA
    # At EP 4 the last rank gets no token; a router adapter would wake its experts up.
    if tokens != "all experts busy":
        base = idle
        lora = replace(LORA, target_modules=WITHOUT_ROUTER)
    _, factors = random_adapter(tmp_path / "adapter.safetensors", lora, base)
    config = config_of(base, chats, tmp_path / "run", parallel, lora, recompute, micro_batch_size=1)
    ranks = run_ranks(watched_step, world, config, tmp_path / "adapter.safetensors")

    # alpha 12 over rank 3.
    layer = layer_of(base, 0, factors, scale=4.0)
    used = torch.zeros(8)
    for microbatches, _ in ranks:
        # A batch of 8 in microbatches of 1, divided over world / TP data-parallel ranks.
        assert len(microbatches) == 8 * config.parallel.tp // world
        for record in microbatches:
            used += compare_microbatch(layer, record)
    # The router of ``idle`` never chooses the last two of eight.
    assert (used > 0).sum() == (8 if tokens == "all experts busy" else 6)

    _, gradients = ranks[0]
    prefix = "base_model.model.model.layers.0.mlp."
    assert gradients is not None
    ours = {}
    for name, gradient in gradients.items():
        if name.startswith(prefix):
            ours[name] = gradient
    mine = {}
    for name, factor in layer.factors.items():
        # dy is of the step's mean over target tokens already. An expert without tokens has no
        # gradient here and zeros there.
        mine[prefix + name] = torch.zeros_like(factor) if factor.grad is None else factor.grad
    assert of_largest(ours, mine) <= 1e-5
