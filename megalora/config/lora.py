"""The ``lora`` section: which linear layers get adapters, their rank and their scale."""

import re
from dataclasses import dataclass, field
from typing import Literal

from megalora.config.checks import require

PISSA_NITER = "pissa_niter_"


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    rank: int = 16
    """Rank r of the adapters: A is [r, in] and B is [out, r]."""
    alpha: float = 32.0
    """Scale of the adapters: ``B A`` is multiplied by alpha / rank, or by alpha / sqrt(rank) with
    ``lora.use_rslora``."""
    dropout: float = 0.0
    """Probability that an element of A's input is set to zero. Each process draws its own mask."""
    target_modules: str | list[str] = "all-linear"
    """Linear layers to adapt: Hugging Face names (q_proj ... down_proj, gate for the router,
    lm_head), regular expressions on full module names, the fused names of other stacks (linear_qkv,
    gate_up_proj), or ``all-linear`` for all except lm_head and gate. A target that matches nothing
    is an error."""
    exclude_modules: list[str] = field(default_factory=list)
    """Linear layers to leave out: Hugging Face names, or regular expressions on full module
    names."""
    layers: list[int] | str | None = None
    """Decoder layers to adapt: a list of numbers, or ranges such as ``"0-3,8,12-"``. null adapts
    all."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks that differ from ``lora.rank``. Maps a Hugging Face name, or a regular expression on
    the full module name, to a rank. The first entry that matches wins, as in PEFT. Experts of a
    layer may have different ones; all have the scale of the largest."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Alphas that differ from ``lora.alpha``, in the same form as ``lora.rank_pattern``."""
    expert_rank: int | Literal["top_k", "experts"] | None = None
    """Rank of the adapters on routed experts, unless ``lora.rank_pattern`` matches. null means
    ``lora.rank``. ``top_k`` divides ``lora.rank`` by the number of experts that a token is sent to,
    so that a token meets as many parameters as in a dense MLP, and ``experts`` by the number of
    experts; with these two alpha is lowered, too, so that experts have the scale of all others."""
    share_outer: bool = False
    """Whether the routed experts of a layer share the factors that touch the hidden size: one A of
    gate, one of up, and one B of down. Each expert keeps its own B of gate and up, and its own A of
    down. The files hold a copy for each expert."""
    use_rslora: bool = False
    """Whether to scale by alpha / sqrt(rank) instead of alpha / rank (rsLoRA)."""
    use_dora: bool | list[str] = False
    """Whether to train a magnitude for every row of each adapted weight beside A and B (DoRA):
    ``y = m / |W + s B A| * (W x + s B A x)``. ``true`` for all of ``lora.target_modules``, or a
    list of names or expressions for some of them, the others having plain LoRA. For attention,
    MLPs, shared and routed experts; needs ``lora.dropout=0``. PEFT loads DoRA on attention;
    vLLM and SGLang need it merged, and so does DoRA on experts (``megalora merge``)."""

    lora_bias: bool = False
    """Whether to train a bias of every B, which is added times the scale: ``y = W x + bias +
    s (B A x + c)``. For attention of models with biases (Qwen2-MoE's q, k and v, GLM's); without
    use_dora, init and train.relora. Loads in PEFT; vLLM and SGLang need it merged."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the base are trained, as PEFT's option of that name says: of every linear
    that has one (``all``), or of the adapted ones (``lora_only``). Without lora_bias and
    train.relora and with a language model's head alone. Loads in PEFT; vLLM and SGLang need it
    merged."""
    init: str = "lora"
    """How A and B begin. ``lora``: A uniform, B zero. ``pissa``: as the singular vectors of the
    largest singular values of each weight, which the adapter then changes, and ``pissa_niter_N``
    the same by N subspace iterations, which is faster and less exact. ``olora``: as the first
    columns and rows of its QR decomposition. The base stays as published; files hold an adapter of
    twice the rank for it. Not for lm_head; without use_dora, share_outer, train.relora,
    train.ema_decay and train.weight_decay."""

    modules_to_save: list[str] = field(default_factory=list)
    """Modules that are trained whole beside the adapters: ``embed_tokens``, ``lm_head``, ``gate``
    (the router), ``norm`` (the last one), ``input_layernorm``, ``post_attention_layernorm``,
    ``q_norm``, ``k_norm``, or regular expressions on full module names. A tied embedding and
    lm_head are one weight. Loads in PEFT; vLLM and SGLang need it merged. Without train.relora and
    with a language model's head alone."""
    trainable_token_indices: list[int] = field(default_factory=list)
    """Token ids whose rows of the embedding are trained, and of a head that is tied to it, such as
    those of new special tokens. Loads in PEFT; vLLM and SGLang need it merged."""

    def __post_init__(self) -> None:
        ranks = {"rank": self.rank, **self.rank_pattern}
        # It may be unset, or a rule that needs the model's sizes.
        if isinstance(self.expert_rank, int):
            ranks["expert_rank"] = self.expert_rank
        for name, rank in ranks.items():
            require(rank >= 1, f"lora: {name} must be a rank of at least 1, got {rank}")
        # A scale of 0 would make an adapter that never does anything.
        for name, alpha in {"alpha": self.alpha, **self.alpha_pattern}.items():
            require(alpha > 0, f"lora: {name} must be an alpha above 0, got {alpha}")
        require(0 <= self.dropout < 1, f"lora.dropout must be in [0, 1), got {self.dropout}")
        tokens = self.trainable_token_indices
        require(
            all(token >= 0 for token in tokens) and len(set(tokens)) == len(tokens),
            f"lora.trainable_token_indices must be different token ids of at least 0, got {tokens}",
        )
        require(self.use_dora != [], "lora.use_dora=[] names nothing; leave it out")
        # Dropout acts on what B A reads and not on what W does: V x would be two products.
        require(
            not (self.use_dora and self.dropout),
            f"lora.use_dora needs lora.dropout=0, got {self.dropout}: with dropout the base would"
            " have to be computed twice",
        )
        require(
            re.fullmatch(rf"lora|pissa|{PISSA_NITER}[1-9]\d?|olora", self.init) is not None,
            f"lora.init must be lora, pissa, {PISSA_NITER}N with N of 1 to 99, or olora, got"
            f" {self.init}",
        )
        require(
            not (self.use_dora and self.lora_bias),
            "lora.lora_bias is not there with lora.use_dora, as in PEFT: leave one of them out",
        )
        require(
            not (self.lora_bias and self.bias != "none"),
            f"lora.bias={self.bias} and lora.lora_bias change the same biases: leave one of them"
            " out",
        )
        for option in ("use_dora", "share_outer", "lora_bias"):
            require(
                self.init == "lora" or not getattr(self, option),
                f"lora.init={self.init} is not there with lora.{option}: leave one of them out",
            )

    @property
    def whole_options(self) -> list[str]:
        """Options that are set and train something of the base itself."""
        found: list[str] = []
        for option in ("modules_to_save", "trainable_token_indices"):
            if getattr(self, option):
                found.append(option)
        if self.bias != "none":
            found.append("bias")
        return found
