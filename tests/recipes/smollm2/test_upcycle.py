"""A dense model and its mixture of experts are one function, by transformers' own classes."""

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from megalora.tiny import make_tiny
from recipes.smollm2 import base
from recipes.smollm2.upcycle import upcycle


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    # A theta and a tied head that are not Mixtral's defaults.
    folder = make_tiny(
        tmp_path_factory.mktemp("models") / "llama",
        arch="llama",
        rope_theta=12_345.0,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tokens(dense: LlamaForCausalLM) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(dense.config.vocab_size, (2, 150), generator=generator)


def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 2), (5, 3)])
def test_logits_are_those_of_the_dense_model(dense, tokens, num_experts, top_k) -> None:
    model = upcycle(dense, num_experts=num_experts, top_k=top_k)
    expected = logits(dense, tokens)
    # Logits have a spread of 1 here; float32 keeps 1e-6 of them.
    torch.testing.assert_close(logits(model, tokens), expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.5
    # One expert that differs shows: the equality above is not that of experts that nobody uses.
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[num_experts - 1].mul_(1.5)
    assert (logits(model, tokens) - expected).abs().max() > 1e-2


def test_tokens_spread_over_all_experts_of_every_layer(dense, tokens) -> None:
    model = upcycle(dense)
    chosen: list[torch.Tensor] = []
    for layer in model.model.layers:
        # The router returns logits, weights and experts of every token.
        layer.mlp.gate.register_forward_hook(lambda *given: chosen.append(given[-1][-1]))
    logits(model, tokens)
    assert len(chosen) == model.config.num_hidden_layers
    for experts in chosen:
        share = torch.bincount(experts.flatten(), minlength=4) / experts.numel()
        # An equal share is a quarter.
        assert share.min() > 0.05, share
    routers = [layer.mlp.gate.weight for layer in model.model.layers]
    assert not torch.equal(routers[0], routers[1])


def test_the_router_follows_from_the_seed_alone(dense) -> None:
    state = torch.get_rng_state()
    first = upcycle(dense, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    again = upcycle(dense, seed=3)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    other = upcycle(dense, seed=4).model.layers[0].mlp.gate.weight
    assert not torch.equal(first.model.layers[0].mlp.gate.weight, other)


def test_what_is_written_is_read_as_the_same_model(dense, tokens, tmp_path: Path) -> None:
    model = upcycle(dense)
    model.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(read, tokens), logits(model, tokens))


def test_a_model_with_biases_is_refused(dense) -> None:
    config = dataclasses.replace(dense.config, attention_bias=True)
    with pytest.raises(ValueError, match=r"cannot be upcycled: .*\n.*q_proj\.bias"):
        upcycle(LlamaForCausalLM(config))


class OneToken:
    """A tokenizer for ``compare``, which needs only tokens of some text."""

    def __call__(self, text: str, return_tensors: str) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.arange(len(text))[None]}


def test_another_function_is_an_error_of_ours(dense, capsys) -> None:
    model = upcycle(dense)
    base.compare(dense, model, OneToken())
    assert "logits of moe and dense differ by at most" in capsys.readouterr().out
    with torch.no_grad():
        model.model.layers[0].mlp.experts.gate_up_proj[0].mul_(1.01)
    with pytest.raises(RuntimeError, match="is not the dense model"):
        base.compare(dense, model, OneToken())
