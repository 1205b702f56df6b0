"""The head in the model that training builds, against Megatron's own output layer and loss: tied
and untied, frozen and adapted with dropout, tokens cut over tensor parallelism."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalora import host
from megalora.config import RunConfig
from megalora.model.head import Wanted, project
from megalora.tiny import make_tiny
from tests.distributed.ranks import run_ranks
from tests.parity.built import built, random_adapter
from tests.parity.everything import EVERYTHING, LORA, config_of

SAMPLES = 2
LENGTH = 12


def gradients(run: Any, loss: Tensor) -> dict[str, Tensor]:
    """What backward of ``loss`` adds to each adapter's gradient on this rank."""
    (chunk,) = run.stepper.chunks
    chunk.zero_grad_buffer()
    loss.backward()
    found: dict[str, Tensor] = {}
    for name, parameter in chunk.named_parameters():
        if parameter.requires_grad:
            found[name] = parameter.main_grad.clone()
    return found


def both(config: RunConfig, weights: Path) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """(losses of target tokens, gradients) of Megatron's head and of ours; a rank function."""
    found = []
    with built(config, weights) as run:
        (chunk,) = run.stepper.chunks
        chunk.train()
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, 256, (SAMPLES, LENGTH), generator=generator)
        labels = tokens.roll(-1, 1)
        # Targets are no prefix, and not equally many in each half of the sequence.
        positions = torch.tensor([1, 2, 7, 12, 14, 15, 16, 21, 23])
        weights_N = torch.randn(len(positions), generator=generator)
        host.seed_rng(0, run.groups.tp.rank())
        plain = chunk(tokens, None, None, labels=labels).flatten()[positions]
        found.append((plain.detach(), gradients(run, (plain * weights_N).sum())))
        # The same masks of dropout.
        host.seed_rng(0, run.groups.tp.rank())
        wanted = Wanted(labels.flatten()[positions], positions, chunk_bytes=4 * 8 * 300)
        outputs = chunk(
            tokens, None, None, output_processor=project, output_processor_context=wanted
        )
        losses = -outputs["logprob"]
        found.append((losses.detach(), gradients(run, (losses * weights_N).sum())))
    return found


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with everything, its output layer the embedding's own weight."""
    folder = tmp_path_factory.mktemp("models") / "tied"
    return make_tiny(folder, **EVERYTHING, tie_word_embeddings=True)


@pytest.mark.parametrize(
    ("model", "parallel"),
    [
        pytest.param("everything", {"tp": 2}, id="untied-tp2"),
        pytest.param("tied", {"tp": 2, "etp": 1, "ep": 2}, id="tied-tp2", marks=pytest.mark.slow),
        pytest.param("tied", {}, id="tied-alone", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("adapted", [True, False], ids=["adapted", "frozen"])
def test_megatron_s_own_losses_and_gradients(
    request, model, parallel, adapted, chats, tmp_path
) -> None:
    base = request.getfixturevalue(model)
    targets = list(LORA.target_modules)
    if not adapted:
        targets.remove("lm_head")
    lora = replace(LORA, target_modules=targets, dropout=0.4)
    random_adapter(tmp_path / "adapter.safetensors", lora, base)
    config = config_of(base, chats, tmp_path / "run", parallel, lora)
    world = parallel.get("tp", 1)
    for plain, lean in run_ranks(both, world, config, tmp_path / "adapter.safetensors"):
        torch.testing.assert_close(lean[0], plain[0], rtol=0, atol=2e-6)
        assert any("output_layer" in name for name in plain[1]) is adapted
        for name, expected in plain[1].items():
            # Sums of some hundred terms in another order.
            size = expected.abs().max().item()
            assert size > 0, name
            assert (lean[1][name] - expected).abs().max().item() <= 2e-6 * size, name
