"""The head in the model that training builds, against Megatron's own output layer and loss: tied
and untied, frozen and adapted with dropout, tokens cut over tensor parallelism."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megalora import host
from megalora.config import RunConfig
from megalora.model.head import Head
from megalora.tiny import make_tiny
from tests.distributed.ranks import run_ranks
from tests.parity.built import built, random_adapter
from tests.parity.compare import of_largest
from tests.parity.everything import EVERYTHING, LORA, config_of
from tests.parity.gradients import reduced_gradients
from tests.parity.plain_head import with_whole_logits


def first_step(config: RunConfig, weights: Path) -> tuple[float, Tensor, dict[str, Tensor] | None]:
    """(loss, losses of every token of the first row, gradients on rank 0) of the first step."""
    with built(config, weights) as run:
        batches = run.batches.of_step(0)
        # Chunks of a few tokens: the last of a row is shorter.
        with mock.patch.object(Head, "chunk_size", return_value=7):
            losses = run.stepper.token_losses([run.batches.first(0)] * len(batches))
            # The same masks of dropout whatever came before.
            host.seed_rng(0, run.groups.tp.rank())
            loss, _ = run.stepper.train(batches, run.optimizer)
        return loss, losses, reduced_gradients(run.model, run.optimizer)


def both(config: RunConfig, weights: Path) -> list[Any]:
    """The same with Megatron's head and with ours; a rank function."""
    with with_whole_logits():
        plain = first_step(config, weights)
    return [plain, first_step(config, weights)]


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
@pytest.mark.slow
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
    plain, lean = run_ranks(both, parallel.get("tp", 1), config, tmp_path / "adapter.safetensors")[
        0
    ]
    assert lean[0] == pytest.approx(plain[0], rel=1e-6)
    torch.testing.assert_close(lean[1], plain[1], rtol=0, atol=3e-6)
    assert any("lm_head" in name for name in plain[2]) is adapted
    # Sums of some hundred terms in another order, relative to the largest of a projection.
    assert of_largest(lean[2], plain[2]) <= 2e-6
