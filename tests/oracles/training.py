"""Train adapters with plain transformers and PyTorch in float64, without a line of megalora's
layers, parallelism or optimizer.

Adapters are merged into stock ``Qwen3MoeForCausalLM`` weights as ``W + scale * B A`` and
differentiated by autograd.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from tests.oracles.routing import corrected_margin, lead, unevenness

PREFIX = "base_model.model."
EMBEDDING = "model.embed_tokens"
ROWS = "token_adapter.trainable_tokens_delta"
SCORE = "base_model.model.score.weight"
PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
"""Mixtral's name of an expert's linear -> what it computes, as other families call it."""


class Oracle:
    """A base model and adapter factors by PEFT tensor name; every sample runs alone and
    unpadded."""

    def __init__(
        self,
        base: Path,
        factors: dict[str, Tensor],
        scale: float | dict[str, float],
        dtype: torch.dtype = torch.float64,
        balance: float = 0.0,
        teacher: Path | None = None,
        tokens: Sequence[int] = (),
    ) -> None:
        """``scale``: one for all, or by HF module name. ``dtype``: of weights and activations;
        factors are float64. ``balance``: coefficient of the loss that keeps experts evenly used.
        ``teacher``: a second model to learn from; None for the base. ``tokens``: whose rows of the
        embedding are among the factors."""
        self.dtype = dtype
        self.model = frozen(base, dtype)
        self.teacher = self.model if teacher is None else frozen(teacher, dtype)
        # Copies: training changes them, and several oracles start from the same factors.
        self.factors: dict[str, Tensor] = {}
        for name, t in factors.items():
            # What an adapter began as stays so.
            is_trained = re.search(r"\.lora_[AB]0\.", name) is None
            self.factors[name] = t.clone().double().requires_grad_(is_trained)
        self.scale = scale
        self.tokens = list(tokens)
        self.balance = balance
        self.routed: list[Tensor] = []
        """What each layer that has routed since the list was emptied adds to that loss."""
        self.reference: dict[str, Tensor] = {}
        """Weights of the model that preferences compare with, where they differ from the base's."""
        self.given: Tensor | None = None
        """[T, L, K] experts that tokens go to, where ``take_given_experts`` is in effect."""
        self._places: dict[int, int] = {}
        """Router, by ``id`` -> its place among those of the model."""
        self.margin = math.inf
        """The smallest lead, in router logits, of a chosen expert over the best that was not, of
        all tokens so far."""
        # Routers of all families have these two attributes in transformers; nothing else has both.
        for module in dict.fromkeys([*self.model.modules(), *self.teacher.modules()]):
            if hasattr(module, "top_k") and hasattr(module, "weight"):
                self._places[id(module)] = len(self._places)
                module.register_forward_hook(self._measure_margin)

    def _measure_margin(self, router: Any, _: Any, output: Any) -> None:
        # Most families' routers return a tuple that begins with the logits.
        logits = output[0] if isinstance(output, tuple) else output
        given = None if self.given is None else self.given[:, self._places[id(router)]]
        # Neither a reference nor an evaluation is balanced.
        if self.balance and torch.is_grad_enabled():
            self.routed.append(unevenness(router, logits, given))
        # Nothing hangs on the logits.
        if given is not None:
            return
        logits = logits.detach()
        if hasattr(router, "e_score_correction_bias"):
            margin = corrected_margin(router, logits)
        else:
            margin = lead(logits, router.top_k)
        self.margin = min(self.margin, margin)

    def modules(self) -> list[str]:
        """HF names of the adapted linears; a factor that all experts share has no number in its
        name, and is none."""
        found: dict[str, None] = {}
        for name in self.factors:
            # What is trained whole, a score head or weights of the base, is no linear's factor.
            if ".lora_" not in name:
                continue
            module = name.removeprefix(PREFIX).split(".lora_")[0]
            if ".experts." not in module or re.search(r"\.experts\.\d+\.", module):
                found[module] = None
        return list(found)

    def factor(self, module: str, factor: str) -> Tensor:
        """A or B of a linear, its own or the one that experts share."""
        for name in (module, re.sub(r"\.experts\.\d+\.", ".experts.", module)):
            if (found := self.factors.get(f"{PREFIX}{name}.lora_{factor}.weight")) is not None:
                return found
        raise KeyError(module)

    def merged(self) -> dict[str, Tensor]:
        """Every adapted weight as ``W + scale * B A``, by transformers' parameter name."""
        # Tied weights appear under both names: an adapter of the head asks for lm_head.weight.
        weights = dict(self.model.named_parameters(remove_duplicate=False))
        deltas: dict[str, dict[int, tuple[Tensor, Tensor | None]]] = {}
        merged: dict[str, Tensor] = {}
        for module in self.modules():
            scale = self.scale[module] if isinstance(self.scale, dict) else self.scale
            a = self.factor(module, "A")
            b = self.factor(module, "B")
            delta = scale * b @ a
            # A and B are differences there to what is part of the base.
            if f"{PREFIX}{module}.lora_A0.weight" in self.factors:
                a0 = self.factor(module, "A0")
                b0 = self.factor(module, "B0")
                delta = scale * ((b0 + b) @ (a0 + a) - b0 @ a0)
            magnitude = self.factors.get(f"{PREFIX}{module}.lora_magnitude_vector")
            # transformers renames Mixtral's modules on loading
            module = module.replace(".block_sparse_moe.", ".mlp.")
            # transformers holds the experts of a layer in one tensor; all else has its own.
            bias = self.factors.get(f"{PREFIX}{module}.lora_B.bias")
            if bias is not None:
                merged[f"{module}.bias"] = weights[f"{module}.bias"] + scale * bias
            if ".experts." not in module:
                whole = weights[f"{module}.weight"] + delta
                merged[f"{module}.weight"] = with_magnitude(whole, magnitude)
                continue
            stem, rest = module.split(".experts.")
            expert, projection = rest.split(".")
            projection = PARTS.get(projection, projection)
            deltas.setdefault(f"{stem}.experts.{projection}", {})[int(expert)] = (
                delta,
                magnitude,
            )
        # Gate and up are one tensor there: what belongs to a layer's experts is put together first.
        stems = {key.rsplit(".", 1)[0] for key in deltas}
        for stem in stems:
            # gate_up_proj is [E, 2 I, H], gate's rows first; down_proj [E, H, I].
            gate, up = weights[f"{stem}.gate_up_proj"].chunk(2, dim=1)
            parts = {"gate_proj": gate, "up_proj": up, "down_proj": weights[f"{stem}.down_proj"]}
            for projection, of_experts in deltas.items():
                if projection.startswith(stem + "."):
                    name = projection.removeprefix(stem + ".")
                    # Names of a file come in the order of text: expert 10 before expert 2.
                    in_order = []
                    for expert, weight in enumerate(parts[name]):
                        delta, magnitude = of_experts[expert]
                        in_order.append(with_magnitude(weight + delta, magnitude))
                    parts[name] = torch.stack(in_order)
            merged[f"{stem}.gate_up_proj"] = torch.cat(
                [parts["gate_proj"], parts["up_proj"]], dim=1
            )
            merged[f"{stem}.down_proj"] = parts["down_proj"]
        merged |= self.whole(weights)
        # Rounded once, after the sum: the closest that this dtype has to the exact weight.
        return {name: weight.to(self.dtype) for name, weight in merged.items()}

    def whole(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the base that are trained themselves, by transformers' parameter name; a tied
        embedding under both of its names."""
        found: dict[str, Tensor] = {}
        for name, value in self.factors.items():
            plain = name.removeprefix(PREFIX)
            if plain == f"{EMBEDDING}.{ROWS}":
                rows = torch.tensor(self.tokens)
                plain = f"{EMBEDDING}.weight"
                value = weights[plain].double().index_copy(0, rows, value)
            elif ".lora_" in name or name == SCORE:
                continue
            found[plain] = value
            if plain == f"{EMBEDDING}.weight" and self.model.config.tie_word_embeddings:
                found["lm_head.weight"] = value
        return found

    def compare_with_start(self) -> None:
        """Let preferences compare with the adapter as it is now, and not with the base."""
        for name, weight in self.merged().items():
            self.reference[name] = weight.detach()

    def loss(self, samples: list) -> Tensor:
        """Mean over the target tokens of all samples."""
        merged = self.merged()
        total = torch.zeros((), dtype=torch.float64)
        count = 0
        for sample in samples:
            ids = torch.tensor(sample.input_ids).long()
            mask = torch.tensor(sample.loss_mask)
            # Tied weights stay as they are: an adapter of the head leaves the embedding alone.
            output = functional_call(self.model, merged, (ids[None, :-1],), tie_weights=False)
            logits = output.logits[0].double()
            # Position i predicts token i + 1, and counts where that token is a target.
            losses = F.cross_entropy(logits, ids[1:], reduction="none")
            total = total + (losses * mask[1:]).sum()
            count = count + int(mask[1:].sum())
        return total / count

    def train(
        self,
        batches: list[list],
        lr: float,
        clip: float,
        eps: float = 1e-8,
        lr_b: float | None = None,
        lr_whole: float | None = None,
        loss_of: Callable[[list], Tensor] | None = None,
    ) -> "Trained":
        """AdamW without decay at a constant rate.

        Args:
            lr_b: rate of B factors where it differs.
            lr_whole: rate of what is trained whole where it differs.
            loss_of: what a batch adds up to; None for ``loss``.
        """
        # DoRA's magnitudes have the rate of B, and a score head that of the A factors, as in PEFT.
        like_b = (".lora_B.", ".lora_magnitude_vector")
        of_b = [t for name, t in self.factors.items() if any(part in name for part in like_b)]
        of_whole = [t for name, t in self.factors.items() if ".lora_" not in name]
        others = {*map(id, of_b), *map(id, of_whole)}
        of_a = [t for t in self.factors.values() if id(t) not in others and t.requires_grad]
        groups = [
            {"params": of_a},
            {"params": of_b, "lr": lr_b or lr},
            {"params": of_whole, "lr": lr_whole or lr},
        ]
        optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.0, eps=eps)
        losses = []
        uneven: list[float] = []
        norms = []
        gradients = []
        # One batch is one step: a global batch has no microbatches here.
        for batch in batches:
            optimizer.zero_grad()
            self.routed = []
            loss = (loss_of or self.loss)(batch)
            balanced = loss
            if self.balance and self.routed:
                num_sequences = sum(2 if sample.second else 1 for sample in batch)
                total = torch.stack(self.routed).sum() / num_sequences
                uneven.append(total.item() * num_sequences / len(self.routed))
                balanced = loss + self.balance * total
            balanced.backward()
            of_step = {}
            for name, t in self.factors.items():
                if t.grad is not None:
                    # Clipping scales gradients in place.
                    of_step[name] = t.grad.clone()
            gradients.append(of_step)
            norms.append(torch.nn.utils.clip_grad_norm_(self.factors.values(), clip).item())
            optimizer.step()
            losses.append(loss.item())
        adapter = {}
        exp_avg = {}
        exp_avg_sq = {}
        for name, t in self.factors.items():
            adapter[name] = t.detach()
            if not t.requires_grad:
                continue
            exp_avg[name] = optimizer.state[t]["exp_avg"]
            exp_avg_sq[name] = optimizer.state[t]["exp_avg_sq"]
        return Trained(losses, norms, gradients, adapter, exp_avg, exp_avg_sq, uneven)


def with_magnitude(whole: Tensor, magnitude: Tensor | None) -> Tensor:
    """The rows of ``W + s B A`` with these lengths, if there are any (DoRA, 2402.09353)."""
    if magnitude is None:
        return whole
    # The norm of a row is taken for a constant, section 4.3.
    norms = whole.detach().norm(dim=1)
    return (magnitude / norms)[:, None] * whole


def frozen(base: Path, dtype: torch.dtype) -> Any:
    """A model as transformers computes it, experts one by one."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, experts_implementation="eager")
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Trained:
    """What a training came to; all tensors float64, by PEFT tensor name."""

    losses: list[float]
    norms: list[float]
    """Of the whole gradient, before clipping."""
    gradients: list[dict[str, Tensor]]
    """Of every step, before clipping."""
    adapter: dict[str, Tensor]
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    unevenness: list[float] = field(default_factory=list)
    """Of every step, mean over layers and sequences, where it is in the loss."""


def read_adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")
