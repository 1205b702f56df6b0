"""Compare an adapter in vLLM with megalora's own model, by log-probabilities of prompts and of
greedy continuations."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalora import host
from megalora.adapters.read.adapter import Adapter
from megalora.adapters.trained_on import model_config, notes_on_base
from megalora.config import ModelConfig
from megalora.hf.folder import local_folder
from megalora.model.account import open_folder
from megalora.model.quantised.scheme import Scheme
from megalora.model.shape import ModelShape
from megalora.serve.proof import largest_difference
from megalora.serve.server import Server
from megalora.serve.vllm import Client
from megalora.verify.peft import own_model, probe_batch, whole_adapter

PROMPT = 16
NEW = 16
"""Tokens of a prompt that is continued, and tokens to continue it with."""


@dataclass(frozen=True)
class Own:
    """Log-probabilities of one row of tokens, and a continuation, by megalora's model."""

    prompt: list[float]
    """Log-probability of each token but the first."""
    tokens: list[int]
    """Greedy continuation of the first ``PROMPT`` tokens."""
    logprobs: list[float]
    """Log-probability of each token of the continuation."""
    margins: list[float]
    """How far each of them leads the next best, in log-probability."""


@dataclass(frozen=True)
class VllmReport:
    """Largest differences over the probe batch, in log-probabilities; ``ok`` if vLLM agrees and the
    adapter acts."""

    adapter: Path
    atol: float
    prompt: float
    greedy: float
    effect: float
    parted: str | None
    """Where greedy tokens differ although they are not tied; None if they do not."""
    notes: tuple[str, ...] = ()
    """Lines about the base."""

    @property
    def ok(self) -> bool:
        return (
            self.prompt <= self.atol
            and self.greedy <= self.atol < self.effect
            and self.parted is None
        )

    def text(self) -> str:
        """The numbers and what they mean, for the user."""
        lines = [
            f"{self.adapter}: largest difference of a log-probability, vLLM against megalora:"
            f" prompts {self.prompt:.2e}, greedy tokens {self.greedy:.2e} (allowed"
            f" {self.atol:.0e}); the adapter moves them by up to {self.effect:.3g}"
        ]
        if self.parted:
            lines.append(f"greedy tokens part: {self.parted}")
        if self.effect <= self.atol:
            lines.append("vLLM serves the base model: the adapter does nothing there")
        lines.append("verified: vLLM computes the same model" if self.ok else "NOT the same model")
        return "\n".join([*lines, *self.notes])


def verify_vllm(adapter: Path, base: str, *, atol: float) -> VllmReport:
    """Run the same tokens through both, in float32, or vLLM in the dtype of ``served_dtype``.

    Raises:
        ValueError: a folder cannot be loaded, or vLLM is missing.
    """
    folder = local_folder(base, "--base")
    opened = open_folder(folder)
    shape = opened.shape
    dtype, rounding = served_dtype(opened.scheme)
    # Refuses what it can before a model is loaded.
    server = Server(folder, {"adapter": adapter}, dtype=dtype)
    tokens = probe_batch(shape.vocab)
    # vLLM has the folder as it is stored, which need not be what was trained on.
    notes = [*notes_on_base(adapter, folder, computed="plain"), *rounding]
    model = model_config(adapter, folder, "float32")
    own = _own_answers(model, shape, whole_adapter(adapter, shape, folder), tokens)
    host.release_memory()  # vLLM takes nearly all of a GPU
    with server, server.client() as client:
        return replace(_compare(adapter, atol, client, tokens, own), notes=tuple(notes))


def served_dtype(scheme: Scheme | None) -> tuple[str, list[str]]:
    """(dtype in which vLLM computes a base that is quantised so, lines about it)."""
    if scheme is None:
        return "float32", []
    # vLLM 0.32 refuses float32 for fp8, GPTQ and AWQ.
    return "bfloat16", [
        f"note: vLLM computes with a quantised base ({scheme.title}) in bfloat16, and megalora here"
        " in float32: rounding alone moves log-probabilities by some 1e-2, which --atol must allow"
    ]


def _own_answers(
    config: ModelConfig, shape: ModelShape, adapter: Adapter, tokens: Tensor
) -> list[Own]:
    """Answers of megalora's model to each row; nothing refers to the model afterwards."""
    with own_model(config, shape, adapter) as model:
        return [_own(model, row) for row in tokens]


@torch.no_grad()
def _own(model: Any, row: Tensor) -> Own:
    """Log-probabilities of a row, and ``NEW`` greedy tokens behind its first ``PROMPT``."""
    whole = _logprobs(model, row)
    # Position s predicts token s + 1.
    prompt = whole[:-1].gather(1, row[1:, None])[:, 0]
    text = row[:PROMPT]
    tokens = []
    logprobs = []
    margins = []
    for _ in range(NEW):
        # The whole text anew for each token: slow, and without a cache that could be wrong.
        best = _logprobs(model, text)[-1].topk(2)
        tokens.append(int(best.indices[0]))
        logprobs.append(best.values[0].item())
        margins.append((best.values[0] - best.values[1]).item())
        text = torch.cat([text, best.indices[:1]])
    return Own(prompt.tolist(), tokens, logprobs, margins)


def _logprobs(model: Any, row: Tensor) -> Tensor:
    """Log-probabilities ``[S, V]`` of every next token, on the CPU."""
    ids = row[None].to(host.device())
    return model(ids, None, None)[0].float().log_softmax(-1).cpu()


def _compare(
    adapter: Path, atol: float, client: Client, tokens: Tensor, own: list[Own]
) -> VllmReport:
    """Ask vLLM for what ``own`` has, and take the largest differences over all rows."""
    prompt = 0.0
    greedy = 0.0
    effect = 0.0
    parted = None
    for number, (row, ours) in enumerate(zip(tokens.tolist(), own, strict=True)):
        probe = client.probe("adapter", row)
        prompt = max(prompt, largest_difference(probe.adapter, ours.prompt))
        effect = max(effect, probe.largest_change)
        said = client.complete("adapter", row[:PROMPT], max_tokens=NEW, ignore_eos=True)
        for place, (mine, theirs) in enumerate(zip(ours.tokens, said.tokens, strict=True)):
            if mine != theirs:
                # Each side may be off by atol: of two tokens that are closer than twice that,
                # either is right.
                margin = ours.margins[place]
                if margin > 2 * atol:
                    parted = (
                        f"prompt {number}, token {place}: {mine} here, {theirs} in vLLM,"
                        f" {margin:.1e} apart"
                    )
                break  # what follows is another text
            one = slice(place, place + 1)
            difference = largest_difference(ours.logprobs[one], said.logprobs[one])
            greedy = max(greedy, difference)
    return VllmReport(adapter, atol, prompt, greedy, effect, parted)
