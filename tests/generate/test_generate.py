"""Answers of our model against transformers' and stock PEFT's, and of layouts against one rank."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megalora.adapters.write.form import write_adapter
from megalora.config import LoRAConfig, ParallelConfig
from megalora.generate.cache import cache_bytes, cached
from megalora.generate.generate import _logits, generate
from megalora.generate.options import Sampling, stop_tokens
from megalora.generate.row import lay_out
from megalora.generate.sequences import Answer
from megalora.hf.json_file import read_hf_config
from megalora.model.fields import model_shape
from megalora.tiny import make_tiny
from tests.distributed.ranks import run_ranks
from tests.generate.models import our_answers, prompts, their_answers
from tests.model.test_rotary import LLAMA3, THETA, YARN
from tests.parity.built import built, random_adapter
from tests.parity.runs import make_config

LORA = LoRAConfig(rank=3, alpha=12.0)
GREEDY = {"max_new_tokens": 8}
DRAWN = {"max_new_tokens": 8, "temperature": 0.9, "top_p": 0.9, "top_k": 40, "seed": 5}
# A log-probability is a difference of float32 logits of up to 10, after layers that sum in another
# order: some units of 1e-6.
ATOL = 2e-5
ROPES: dict[str, dict[str, Any]] = {
    "llama3": {"arch": "llama", "rope_parameters": {"rope_type": "llama3", **THETA, **LLAMA3}},
    "yarn": {"arch": "qwen3_moe", "rope_parameters": {"rope_type": "yarn", **THETA, **YARN}},
}


def tokens_of(answers: list[Answer]) -> list[list[int]]:
    return [answer.tokens for answer in answers]


def check_against(theirs: list[tuple[list[int], list[float]]], ours: list[Answer]) -> None:
    """The same tokens, and the same log-probabilities as of one pass without a cache."""
    assert tokens_of(ours) == [tokens for tokens, _ in theirs]
    for answer, (_, logprobs) in zip(ours, theirs, strict=True):
        assert answer.logprobs == pytest.approx(logprobs, abs=ATOL)


def test_stock_peft_s_tokens_and_log_probabilities(tiny: Path, chats: Path, tmp_path: Path) -> None:
    """More prompts than are generated at a time: later ones begin while others go on."""
    adapted, factors = random_adapter(tmp_path / "weights.safetensors", LORA, tiny)
    (tmp_path / "adapter").mkdir()
    shape = model_shape(read_hf_config(tiny))
    write_adapter(tmp_path / "adapter", adapted, shape, factors, str(tiny))
    call = {"sampling": GREEDY, "stop": stop_tokens(tiny), "max_sequences": 2}
    weights = tmp_path / "weights.safetensors"
    arguments = (tiny, chats, tmp_path / "run", {}, [call], weights, LORA)
    ours = run_ranks(our_answers, 1, *arguments)[0][0]
    check_against(their_answers(tiny, prompts(), 8, tmp_path / "adapter"), ours)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["qwen3", "glm4_moe", *ROPES])
def test_transformers_tokens_and_log_probabilities(model: str, chats: Path, tmp_path: Path) -> None:
    """A dense model, one with half of each head turned, and two kinds of rotary scaling."""
    base = make_tiny(tmp_path / "base", **ROPES.get(model, {"arch": model}))
    call = {"sampling": GREEDY, "stop": stop_tokens(base)}
    ours = run_ranks(our_answers, 1, base, chats, tmp_path / "run", {}, [call])
    check_against(their_answers(base, prompts(), 8), ours[0][0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "num_ranks"),
    [({"tp": 2, "ep": 2}, 4), ({"tp": 2, "etp": 2}, 2), ({"ep": 4}, 4), ({"tp": 4, "ep": 2}, 4)],
)
def test_a_layout_says_what_one_rank_says(
    parallel: dict[str, int], num_ranks: int, everything: Path, chats: Path, tmp_path: Path
) -> None:
    """Greedy and drawn, on every rank. Five prompts do not divide over two ranks, three leave a
    rank of four without any, and a first token that ends its answer leaves one waiting."""
    weights = tmp_path / "weights.safetensors"
    random_adapter(weights, LORA, everything)
    arguments = (everything, chats, tmp_path / "run")
    first = run_ranks(our_answers, 1, *arguments, {}, [{"sampling": GREEDY}], weights, LORA)
    stop = {first[0][0][1].tokens[0]}
    calls = [
        {"sampling": GREEDY, "max_sequences": 1},
        {"sampling": DRAWN},
        {"sampling": GREEDY, "stop": stop, "prompts": prompts()[:3]},
    ]
    one = run_ranks(our_answers, 1, *arguments, {}, calls, weights, LORA)[0]
    every = run_ranks(our_answers, num_ranks, *arguments, parallel, calls, weights, LORA)
    assert len(one[2][1].tokens) == 1
    assert one[2][1].ended
    assert len({tuple(answer.tokens) for answer in one[1]}) == 5
    for found in every:
        for ours, alone in zip(found, one, strict=True):
            assert tokens_of(ours) == tokens_of(alone)
            for answer, other in zip(ours, alone, strict=True):
                assert answer.logprobs == pytest.approx(other.logprobs, abs=ATOL)
                assert answer.ended == other.ended


@pytest.mark.slow
def test_an_answer_does_not_depend_on_its_batch(tiny: Path, chats: Path, tmp_path: Path) -> None:
    calls = [
        {"sampling": DRAWN},
        {"sampling": DRAWN, "prompts": prompts()[::-1][:3], "numbers": [4, 3, 2]},
        {"sampling": DRAWN, "max_sequences": 1, "pass_tokens": 1},
        {"sampling": {**DRAWN, "seed": 6}},
    ]
    arguments = (tiny, chats, tmp_path / "run", {}, calls)
    every, some, one_by_one, other_seed = run_ranks(our_answers, 1, *arguments)[0]
    tokens = tokens_of(every)
    assert tokens_of(some) == tokens[:1:-1]
    assert tokens_of(one_by_one) == tokens
    assert tokens_of(other_seed) != tokens


def bytes_and_logits(config: Any, tp: int) -> tuple[int, int, bool]:
    """(bytes of a rank's cache, what the formula says, whether the model is as it was); a rank
    function."""
    with built(config) as run:
        chunk: Any = run.model.chunks[0]
        own = [layer.self_attention.core_attention for layer in chunk.decoder.layers]
        with cached(chunk, 3 * 50 + tp) as caches:
            row = lay_out([], num_slots=3, length=50, multiple_of=tp)
            _logits(chunk, row)
            found = 0
            for cache in caches:
                assert cache.stored is not None
                found += sum(tensor.nbytes for tensor in cache.stored)
        after = [layer.self_attention.core_attention for layer in chunk.decoder.layers]
        formula = cache_bytes(run.model.shape, tp=tp, num_slots=3, length=50, dtype_bytes=4)
        is_back = all(a is b for a, b in zip(own, after, strict=True))
        return found, formula, is_back


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 4])
def test_bytes_of_the_cache(everything: Path, chats: Path, tmp_path: Path, tp: int) -> None:
    """Of tensors as they are; four ranks share two key/value heads, so each has a copy of one."""
    config = make_config(everything, chats, tmp_path / "run", {"tp": tp})
    for found, formula, is_back in run_ranks(bytes_and_logits, tp, config, tp):
        # Two layers, keys and values, heads of 16 in float32
        assert found == formula == 2 * 2 * (3 * 50 + tp) * (2 if tp == 1 else 1) * 16 * 4
        assert is_back


def refused(config: Any, asked: list[list[int]]) -> str:
    """What ``generate`` raises; a rank function."""
    with built(config) as run, pytest.raises(ValueError) as caught:
        generate(run.model, asked, Sampling())
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "asked", "message"),
    [
        ({"pp": 2}, [[1]], "generation does not run with parallel.pp=2"),
        ({"cp": 2}, [[1]], "generation does not run with parallel.cp=2"),
        ({}, [[1], []], "prompt 1 is empty"),
        ({}, [[512]], "prompt 0 holds token 512, but the model has tokens 0 to 511"),
    ],
)
def test_refusals(parallel, asked, message, tiny: Path, chats: Path, tmp_path: Path) -> None:
    config = make_config(tiny, chats, tmp_path / "run", parallel)
    num_ranks = ParallelConfig(**parallel).pp * ParallelConfig(**parallel).cp
    for said in run_ranks(refused, num_ranks, config, asked):
        assert said.startswith(message)


def test_the_model_is_left_without_a_gradient() -> None:
    """Generation inside training must not keep a graph."""
    chunk = torch.nn.Module()
    chunk.decoder = torch.nn.Module()  # type: ignore
    chunk.decoder.layers = torch.nn.ModuleList()  # type: ignore
    weight = torch.ones(1, requires_grad=True)
    with cached(chunk, 1):
        assert not (weight * 2).requires_grad
    assert (weight * 2).requires_grad
