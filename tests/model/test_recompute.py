"""Check that recomputation runs the same function again: the same gradients, also with dropout,
also for a block whose input needs none."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from megalora.model import recompute
from megalora.model.recompute import Recomputed
from megalora.train.loop import train
from tests.distributed.ranks import run_ranks
from tests.parity.runs import make_config, records


class Layer(nn.Module):
    """A layer with dropout, called by keyword as Megatron calls its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 7))

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, None]:
        return F.dropout(F.linear(x, self.weight), 0.5, self.training) * scale, None


def test_gradients_with_dropout_and_an_input_that_needs_none():
    # The output of a frozen embedding: it has no gradient, and with it torch's reentrant
    # checkpoint, which Megatron uses, gives none to the weight either.
    x = torch.randn(3, 7)
    gradients = []
    layer = Layer()
    for module in (layer, Recomputed(layer)):
        # The same mask in both, which recomputation has to draw once more.
        torch.manual_seed(1)
        layer.weight.grad = None
        module(x=x, scale=3.0)[0].square().sum().backward()
        assert layer.weight.grad is not None
        gradients.append(layer.weight.grad.clone())
    assert torch.equal(*gradients)
    assert gradients[0].abs().sum() > 0


def test_tensors_passed_by_keyword_reach_checkpoint_by_position(monkeypatch):
    """torch keeps only the generators of devices it sees among positional tensors: on a GPU,
    dropout's mask depends on it."""
    seen = []
    real = recompute.checkpoint

    def noted(function, *args, **options):
        seen.extend(args)
        return real(function, *args, **options)

    monkeypatch.setattr(recompute, "checkpoint", noted)
    x = torch.randn(3, 7)
    Recomputed(Layer())(x=x)
    # The very tensor; "in" would compare values.
    assert any(tensor is x for tensor in seen)


@pytest.mark.slow
def test_training_with_dropout_is_the_same_with_and_without(tiny, chats, tmp_path):
    for level in ("off", "full", "selective"):
        config = make_config(
            tiny, chats, tmp_path / level, {"tp": 2, "ep": 2}, level, steps=2, micro_batch_size=4
        )
        run_ranks(train, 4, replace(config, lora=replace(config.lora, dropout=0.2)))
    for other in ("full", "selective"):
        # Losses are those of forward, where nothing is recomputed; gradients' sums may be taken in
        # another order.
        assert records(tmp_path / other, "loss") == records(tmp_path / "off", "loss")
        assert records(tmp_path / other, "grad_norm") == pytest.approx(
            records(tmp_path / "off", "grad_norm"), rel=1e-6
        )
