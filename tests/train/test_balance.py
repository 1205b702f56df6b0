"""The loss that keeps experts evenly used. Its values and gradients under every layout are in the
parity grid (``balance``); here are its scale, and what refuses it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megalora.config import LoRAConfig, ParallelConfig, TrainConfig
from megalora.lora.select import plan
from megalora.tiny import make_tiny
from megalora.train.loop import train
from tests.distributed.ranks import run_ranks
from tests.parity.everything import first_batch
from tests.parity.runs import make_config, records


def test_one_layer_and_one_sequence_are_as_in_transformers(chats: Path, tmp_path: Path) -> None:
    """transformers, too, computes E sum f P then, but with f K times as large: the share of tokens
    that chose an expert, not that of choices."""
    base = make_tiny(tmp_path / "base", num_hidden_layers=1)
    rows = {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1}
    config = make_config(base, chats, tmp_path / "run", {}, router_aux_loss_coef=0.01, **rows)
    run_ranks(train, 1, config)
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float64, experts_implementation="eager"
    )
    (sample,) = first_batch(base, chats, size=1)
    tokens = torch.tensor(sample.input_ids)[None, :-1].long()
    with torch.no_grad():
        theirs = model(tokens, output_router_logits=True).aux_loss.item()
    top_k = model.config.num_experts_per_tok
    assert top_k > 1, "one choice a token would not tell shares apart"
    assert records(tmp_path / "run", "balance_loss") == [pytest.approx(theirs / top_k, rel=1e-6)]


def test_a_dense_model_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    base = make_tiny(tmp_path / "dense", arch="qwen3")
    settings = TrainConfig(steps=1, router_aux_loss_coef=0.001)
    with pytest.raises(ValueError, match=r"router_aux_loss_coef=0.001: this model .* no experts"):
        plan(LoRAConfig(), ParallelConfig(), base, settings)


@pytest.mark.parametrize("coefficient", [-0.1, float("nan"), float("inf")])
def test_a_coefficient_is_a_number_from_zero_up(coefficient: float) -> None:
    with pytest.raises(ValueError, match="train.router_aux_loss_coef must"):
        TrainConfig(steps=1, router_aux_loss_coef=coefficient)
