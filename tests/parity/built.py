"""What ``train`` makes of a config before its first step, for tests that look inside: rank
functions for ``run_ranks``."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megalora.config import LoRAConfig, RunConfig
from megalora.hf.json_file import read_hf_config
from megalora.lora.adapted_model import AdaptedModel
from megalora.lora.gather import gather_tensors, read_tensors
from megalora.lora.magnitude import refresh_norms
from megalora.lora.select import resolve
from megalora.lora.spec import Adapted
from megalora.lora.trained_weight import trained_weights
from megalora.lora.whole import with_biases, with_trained
from megalora.model.fields import model_shape
from megalora.train.assemble import Run, assemble
from tests.parity.gradients import reduced_gradients


@contextmanager
def built(config: RunConfig, weights: Path | None = None) -> Iterator[Run]:
    """The run of ``config`` on the ranks of this world, its adapter as initialised or read from
    ``weights``."""

    def fill(model: AdaptedModel) -> None:
        if weights is not None:
            values = {p: p.data for p in model.parameters}
            with torch.no_grad():
                read_tensors(weights, model.shards, values)
            refresh_norms(model.chunks, model.groups)

    with assemble(config, prepare=fill) as run:
        # After step 1 a training demands a gradient of every adapter. Those that tests fill in may
        # well have none: experts without tokens, factors of zeros.
        run.stepper.check = None
        yield run


def whole_adapter(run: Run) -> dict[str, Tensor] | None:
    """Whole tensors by name on rank 0; collective."""
    values = {p: p.data for p in run.model.parameters}
    return gather_tensors(run.model.shards, values, run.groups)


def first_gradients(
    config: RunConfig, weights: Path | None = None
) -> tuple[float, dict[str, Tensor] | None]:
    """(loss, reduced gradients on rank 0) of the first global batch."""
    with built(config, weights) as run:
        loss, _ = run.stepper.train(run.batches.of_step(0), run.optimizer)
        return loss, reduced_gradients(run.model, run.optimizer)


def adapter_of(config: RunConfig, weights: Path | None = None) -> dict[str, Tensor] | None:
    with built(config, weights) as run:
        return whole_adapter(run)


def random_factors(
    config: LoRAConfig, base: Path, seed: int = 0, num_scores: int = 0
) -> tuple[list[Adapted], dict[str, Tensor]]:
    """What is adapted, and factors of which none is zero: every delta has a spread of about 0.2 of
    its weight's. ``num_scores``: of a score head, whose weight is among them."""

    shape = replace(model_shape(read_hf_config(base)), num_scores=num_scores)
    shape = with_trained(config, shape)
    adapted = resolve(config, shape)
    shape = with_biases(config, shape, adapted)
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for a in adapted:
        for expert in range(max(1, a.num_experts)):
            a_factor = torch.randn(a.shape("A"), generator=generator)
            b_factor = torch.randn(a.shape("B"), generator=generator)
            # A x has a spread of 1 for an x of spread 1; dividing B by scale and root of the rank
            # makes the delta independent of both. What experts share, the last one decides.
            factors[a.tensor_name("A", expert)] = a_factor / a.in_features**0.5
            factors[a.tensor_name("B", expert)] = 0.2 * b_factor / (a.scale * a.rank**0.5)
            if "A0" in a.factors:
                a_factor = torch.randn(a.shape("A0"), generator=generator)
                b_factor = torch.randn(a.shape("B0"), generator=generator)
                factors[a.tensor_name("A0", expert)] = a_factor / a.in_features**0.5
                b0 = 0.2 * b_factor / (a.scale * a.rank**0.5)
                factors[a.tensor_name("B0", expert)] = b0
            if "C" in a.factors:
                bias = torch.randn(a.shape("C"), generator=generator)
                factors[a.tensor_name("C", expert)] = 0.2 * bias / a.scale
            if "M" in a.factors:
                # Far from the norms, which depend on the base.
                magnitude = torch.rand(a.shape("M"), generator=generator)
                factors[a.tensor_name("M", expert)] = 0.5 + magnitude
    for weight in trained_weights(shape):
        # Scores, logits and choices have a spread of 1, as hidden states behind a norm have.
        drawn = torch.randn(weight.size, generator=generator) / shape.hidden**0.5
        if len(weight.size) == 1:
            drawn = 0.5 + torch.rand(weight.size, generator=generator)
        factors[weight.tensor] = drawn
    return adapted, factors


def random_adapter(
    path: Path, config: LoRAConfig, base: Path
) -> tuple[list[Adapted], dict[str, Tensor]]:
    """The same, written to ``path`` as trained (no export form)."""
    adapted, factors = random_factors(config, base)
    save_file(factors, path)
    return adapted, factors
