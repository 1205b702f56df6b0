"""Build the training steps to compare: one model of random weights with LoRA on attention and
experts, trained in several ways.

Each arm is a context manager that gives a ``Training``. Packages are imported inside it, so that a
missing one costs its own row alone.

Shape legend: T tokens    k experts per token    E experts of this rank    H hidden    M routed rows
"""

import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megalora_kernels import (
    Arrivals,
    AugmentedWeight,
    ExpertFactors,
    expert_mlp,
    permute_values,
    regroup_values,
    route,
)
from torch import Tensor, nn

from benchmarks.random_weights import RandomWeights
from benchmarks.train_case import ATTENTION

ALPHA_OVER_RANK = 2.0


@dataclass(frozen=True)
class Setup:
    """The model, the batch and the device that all arms have."""

    config: dict[str, Any]
    rank: int
    num_tokens: int
    """Tokens of a step, which has one sequence."""
    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0

    def weights(self) -> RandomWeights:
        """Weights of the frozen base, the same in every arm and process."""
        return RandomWeights(self.config, self.dtype, self.device, self.seed)

    def batch(self) -> Tensor:
        """``[1, T]``: the same sequence in every step, so that the loss must fall."""
        g = torch.Generator().manual_seed(self.seed)
        # Drawn on the CPU: a GPU's generator gives other tokens for the same seed.
        tokens = torch.randint(self.config["vocab_size"], (1, self.num_tokens), generator=g)
        return tokens.to(self.device)


@dataclass(frozen=True)
class Training:
    """A training step in its two parts, which are timed apart."""

    forward_backward: Callable[[], Tensor]
    """Computes gradients and returns the loss."""
    update: Callable[[], object]
    """Takes the optimizer's step."""
    num_adapter_parameters: int
    note: str
    """Text for the table that says what is trained."""
    gate_up_is_one: bool = False
    """Whether gate and up share one A, which counts in the FLOPs."""


# ---- transformers, with PEFT or with our experts -------------------------------------------------


def base_model(setup: Setup) -> nn.Module:
    """Transformers' model with the weights that all arms share, attention through SDPA, experts
    through grouped_mm."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    fields = dict(setup.config)
    # The class stands for it and takes no such argument.
    del fields["model_type"]
    config = Qwen3MoeConfig(**fields)
    with torch.device(setup.device):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=setup.dtype,
            attn_implementation="sdpa",
            experts_implementation="grouped_mm",
        )
    # ``from_config`` has drawn weights of its own; those are overwritten.
    setup.weights().fill(model)
    return model


def adapted(model: nn.Module, setup: Setup, parameters: tuple[str, ...] = ()) -> nn.Module:
    """PEFT's adapters on attention and on whole ``parameters``, in float32 as PEFT makes them."""
    from peft import LoraConfig, get_peft_model

    settings: dict[str, Any] = {"target_parameters": list(parameters)} if parameters else {}
    config = LoraConfig(
        r=setup.rank, lora_alpha=ALPHA_OVER_RANK * setup.rank, target_modules=list(ATTENTION),
        **settings
    )  # fmt: skip
    return get_peft_model(model, config)


def training(model: nn.Module, setup: Setup, note: str, gate_up_is_one: bool) -> Training:
    """Steps as transformers' Trainer takes them with bf16: autocast, and fused AdamW on the
    trainable parameters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    # 1e-3: large enough for the loss to fall in the few steps that are taken.
    optimizer = torch.optim.AdamW(
        parameters, lr=1e-3, weight_decay=0.0, fused=setup.device.type == "cuda"
    )
    tokens = setup.batch()
    model.train()

    def forward_backward() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        # A float32 model on a CPU has nothing to cast.
        with torch.autocast(
            setup.device.type, torch.bfloat16, enabled=setup.dtype == torch.bfloat16
        ):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        return loss.detach()

    return Training(
        forward_backward, optimizer.step, sum(p.numel() for p in parameters), note, gate_up_is_one
    )


@contextmanager
def peft(setup: Setup) -> Iterator[Training]:
    """Stock PEFT: ``target_modules`` on attention, ``target_parameters`` on experts."""
    model = adapted(base_model(setup), setup, ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"))
    yield training(model, setup, "transformers + PEFT target_parameters", gate_up_is_one=True)


class KernelExperts(nn.Module):
    """Our kernels in the place of transformers' experts, with the adapters that PEFT would put
    there."""

    def __init__(self, base: Any, rank: int, joined: bool) -> None:
        super().__init__()
        # transformers has the experts of a layer in two tensors, [E, 2I, H] and [E, H, I].
        w1 = base.gate_up_proj.data
        w2 = base.down_proj.data
        self.weights: tuple[Tensor | AugmentedWeight, Tensor | AugmentedWeight] = (w1, w2)
        if joined:
            self.weights = (AugmentedWeight(w1, rank), AugmentedWeight(w2, rank))
        self.dtype = w1.dtype
        # J = 2I rows: gate's, then up's.
        E, J, H = w1.shape
        inner = w2.shape[2]
        # In float32, as PEFT makes adapters beside a base in bfloat16.
        new = {"device": w1.device, "dtype": torch.float32}
        self.a1 = nn.Parameter(torch.empty(E, rank, H, **new))
        self.b1 = nn.Parameter(torch.zeros(E, J, rank, **new))
        self.a2 = nn.Parameter(torch.empty(E, rank, inner, **new))
        self.b2 = nn.Parameter(torch.zeros(E, H, rank, **new))
        # B is zero, as LoRA starts, so A decides its gradient alone.
        for a in (self.a1, self.a2):
            nn.init.normal_(a, std=a.shape[-1] ** -0.5)

    def forward(self, x_TH: Tensor, experts_TK: Tensor, probs_TK: Tensor) -> Tensor:
        E = self.a1.shape[0]
        top_k = experts_TK.shape[1]
        num_tokens = x_TH.shape[0]
        map_TE = torch.zeros(num_tokens, E, dtype=torch.bool, device=x_TH.device)
        map_TE.scatter_(1, experts_TK, True)
        # Out of place: gradients of the router's probabilities go through it.
        probs_TE = torch.zeros(num_tokens, E, dtype=probs_TK.dtype, device=x_TH.device)
        probs_TE = probs_TE.scatter(1, experts_TK, probs_TK)
        # A token's experts in ascending order, not in the router's.
        routing, ordered_TK = route(map_TE, top_k)
        return self.compute(x_TH, permute_values(probs_TE.gather(1, ordered_TK), routing), routing)

    def compute(self, x: Tensor, probs_M: Tensor, routing: Any) -> Tensor:
        # Autocast does so before each GEMM, and norms may return float32.
        x = x.to(self.dtype)
        scales = (ALPHA_OVER_RANK,)
        gate_up = ExpertFactors(self.a1.to(x.dtype), (self.b1.to(x.dtype),), scales)
        down = ExpertFactors(self.a2.to(x.dtype), (self.b2.to(x.dtype),), scales)
        return expert_mlp(
            x, *self.weights, probs_M.to(x.dtype), routing, gate_up=gate_up, down=down
        )


class ShareOfExperts(KernelExperts):
    """Experts of one expert-parallel rank, to which k ranks send one row for each of their tokens,
    k T in all and evenly for each expert.

    Copies of this rank's own tokens stand for what the all-to-all would bring; nothing is
    communicated.
    """

    def forward(self, x_TH: Tensor, experts_TK: Tensor, probs_TK: Tensor) -> Tensor:
        num_tokens, H = x_TH.shape
        num_ranks = experts_TK.shape[1]
        E = self.a1.shape[0]
        # Each rank sends a row of every token, so T rows spread over E experts.
        counts_E = torch.full((E,), num_tokens // E, device=x_TH.device)
        counts_E[: num_tokens % E] += 1
        arrivals = Arrivals.single(counts_E.expand(num_ranks, E), num_ranks * num_tokens)
        received = x_TH.expand(num_ranks, num_tokens, H).reshape(-1, H)
        routing, probs_M = regroup_values(arrivals, probs_TK.t().reshape(-1))
        return self.compute(received, probs_M, routing).view(num_ranks, num_tokens, H).sum(0)


def with_experts(setup: Setup, kind: type[KernelExperts], joined: bool) -> nn.Module:
    """PEFT on attention, ``kind`` in place of every layer's experts."""
    model = adapted(base_model(setup), setup)
    # A list first: the loop replaces modules of the tree that it walks.
    for module in list(model.modules()):
        if type(module).__name__ == "Qwen3MoeSparseMoeBlock":
            module.experts = kind(module.experts, setup.rank, joined)
    return model


@contextmanager
def kernels(setup: Setup) -> Iterator[Training]:
    """The model of ``peft`` with our experts in place of its own."""
    model = with_experts(setup, KernelExperts, joined=False)
    yield training(model, setup, "transformers + our experts", gate_up_is_one=True)


@contextmanager
def share(setup: Setup) -> Iterator[Training]:
    """One of 8 expert-parallel ranks. Weights have room for adapters, which megalora makes where a
    rank has few experts."""
    # 128 / 8 = 16 experts. With as many ranks as a token has experts, this rank gets k rows for
    # each of its own tokens: as many as one rank alone would have.
    E = setup.config["num_experts"] // setup.config["num_experts_per_tok"]
    fewer = Setup(
        {**setup.config, "num_experts": E}, setup.rank, setup.num_tokens, setup.device, setup.dtype
    )
    model = with_experts(fewer, ShareOfExperts, joined=True)
    yield training(
        model,
        setup,
        f"transformers + our experts, {E} of them, no communication",
        gate_up_is_one=True,
    )


# ---- Unsloth -------------------------------------------------------------------------------------


@contextmanager
def unsloth(setup: Setup) -> Iterator[Training]:
    """Unsloth as its notebooks use it."""
    with unsloth_model(setup) as model:
        yield training(model, setup, "Unsloth FastModel", gate_up_is_one=True)


@contextmanager
def unsloth_model(setup: Setup) -> Iterator[nn.Module]:
    """Unsloth's model with its adapters. It loads folders only, so the shared weights go through
    one."""
    # It counts its users through the network, which a lent machine lacks.
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as code:
        # Where it writes the modules that it makes; otherwise below the working directory.
        os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", os.path.join(code, "unsloth_code"))
        # Before transformers, which it changes.
        from unsloth import FastModel

        with tempfile.TemporaryDirectory() as folder:
            model = base_model(setup)
            model.save_pretrained(folder)
            _tokenizer().save_pretrained(folder)
            del model
            # Where it puts the weights depends on the memory that is free.
            gc.collect()
            torch.cuda.empty_cache()
            loaded, _ = FastModel.from_pretrained(
                folder,
                max_seq_length=setup.num_tokens,
                dtype=setup.dtype,
                load_in_4bit=False,
                full_finetuning=False,
                # Else it takes buffers for checkpoints, which would count as its peak.
                use_gradient_checkpointing=False,
            )
        yield FastModel.get_peft_model(
            loaded,
            r=setup.rank,
            lora_alpha=ALPHA_OVER_RANK * setup.rank,
            lora_dropout=0,
            bias="none",
            # Those of the experts, which it finds by the names of the linears they stand for.
            target_modules=[*ATTENTION, "gate_proj", "up_proj", "down_proj"],
            use_gradient_checkpointing=False,
        )


def _tokenizer() -> Any:
    """The least that Unsloth loads from a folder: it insists on a tokenizer, which nothing uses."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<unk>", eos_token="<end>"
    )
