"""Choices against transformers' filters, and draws against the probabilities they follow."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megalora.generate.choose import Draws, choose, ranked
from megalora.generate.options import Sampling


class Fixed(Draws):
    """A stream of one number."""

    def __init__(self, number: float) -> None:
        self.number = number

    def next(self) -> float:
        return self.number


def some_logits(rows: int = 3, vocab: int = 41) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(1.0, 1.0, 0), (0.6, 0.9, 0), (1.7, 1.0, 5), (0.8, 0.7, 9), (1.0, 1e-9, 0), (2.0, 0.95, 99)],
)
def test_probabilities_are_those_of_transformers_filters(temperature, top_p, top_k) -> None:
    logits = some_logits()
    filtered = TemperatureLogitsWarper(temperature)(None, logits.double())  # type: ignore
    if top_k:
        filtered = TopKLogitsWarper(top_k)(None, filtered)  # type: ignore
    if top_p < 1:
        filtered = TopPLogitsWarper(top_p)(None, filtered)  # type: ignore
    options = Sampling(temperature=temperature, top_p=top_p, top_k=top_k)
    probs, ids = ranked(logits, options)
    ours = torch.zeros_like(probs).scatter(1, ids, probs / probs.sum(1, keepdim=True))
    # float64 on both sides, of sums in another order.
    torch.testing.assert_close(ours, filtered.softmax(-1), rtol=0, atol=1e-13)


def test_draws_that_cover_the_interval_take_each_token_as_often_as_is_probable() -> None:
    logits = some_logits(rows=1)
    options = Sampling(temperature=1.3, top_p=0.9, top_k=12)
    count = 2000
    draws: list[Draws] = [Fixed((i + 0.5) / count) for i in range(count)]
    chosen, logprobs = choose(logits.expand(count, -1), draws, options)
    probs, ids = ranked(logits, options)
    expected = count * probs[0] / probs.sum()
    taken = torch.bincount(chosen, minlength=logits.shape[1])[ids[0]]
    # An interval of width p holds p * count grid points, give or take one.
    assert (taken - expected).abs().max() <= 1
    assert taken[probs[0] == 0].sum() == 0
    # Of the model: neither temperature nor filters are in it.
    assert torch.equal(logprobs, logits.log_softmax(-1)[0, chosen])


def test_without_temperature_the_most_probable_token_and_no_draw() -> None:
    logits = some_logits()
    draws: list[Draws] = [Draws(0, number) for number in range(3)]
    chosen, _ = choose(logits, draws, Sampling(top_k=3))
    assert torch.equal(chosen, logits.argmax(-1))
    # Nothing was taken from the streams.
    assert [stream.next() for stream in draws] == [Draws(0, n).next() for n in range(3)]


def test_streams_differ_by_seed_and_number_and_repeat() -> None:
    def first(seed: int, number: int) -> tuple[float, ...]:
        stream = Draws(seed, number)
        return tuple(stream.next() for _ in range(100))

    kinds = {first(seed, number) for seed in (0, 1, 2**63 - 1) for number in (0, 1, 500)}
    assert len(kinds) == 9
    assert first(1, 500) in kinds
    every = torch.tensor([number for kind in kinds for number in kind])
    assert every.min() >= 0
    assert every.max() < 1
    # 900 uniform numbers: their mean has a spread of 0.0096.
    assert abs(every.mean() - 0.5) < 0.05
