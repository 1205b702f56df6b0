"""Hold a model's sizes and check that a layout can split them. Pure Python: planner, spec and
checks need no weights; ``fields.model_shape`` reads the sizes from a ``config.json``."""

from dataclasses import dataclass, replace

from megalora.config import ParallelConfig, Recompute, RecomputeLayers, RunConfig
from megalora.config.checks import require
from megalora.config.parallel import as_list, split_layers


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Every size LoRA and the layout checks depend on. Counts are whole-model, before any split."""

    model_type: str
    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    """Features of dense MLP layers."""
    vocab: int
    tied_embeddings: bool
    num_experts: int = 0
    top_k: int = 0
    expert_intermediate: int = 0
    shared_intermediate: int = 0
    """Features of the shared expert, which sees every token; 0 where there is none."""
    moe_layers: frozenset[int] = frozenset()
    """Numbers of the layers with experts; the others have a dense MLP."""
    qk_norm: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    """Whether o_proj has a bias too."""
    full_width_norms: bool = False
    """Whether the norms of q and k run over all heads at once, with a weight for each feature."""
    softmax_over_all: bool = False
    """Whether the router's softmax runs over all experts, not over the chosen ones."""
    correction_bias: bool = False
    """Whether the router scores by sigmoids and corrects its choice by a frozen bias per expert."""
    shared_gate: bool = True
    """Whether a shared expert's output is multiplied by a gate of its own, a vector of H."""
    initializer_range: float = 0.02
    """Standard deviation of new weights."""
    num_scores: int = 0
    """Numbers that a score head gives each token in place of lm_head; 0 where there is lm_head."""
    saved: tuple[str, ...] = ()
    """HF modules of the base that are trained whole (``lora.modules_to_save``)."""
    tokens: tuple[int, ...] = ()
    """Token ids whose rows of the embedding are trained (``lora.trainable_token_indices``), in
    ascending order."""
    biases: tuple[str, ...] = ()
    """HF linears of the base whose biases are trained (``lora.bias``), in the order of layers."""
    kept_cycles: int = 0
    """Adapters of earlier cycles that lie beside the one that trains at the end of a run
    (``train.relora`` on a folder's codes)."""
    rotary_dim: int | None = None
    """Features of a head that the rotary embedding turns, the first ones; None for all."""

    @property
    def turned_features(self) -> int:
        """Features of a head that the rotary embedding turns."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def of_base(self) -> "ModelShape":
        """The sizes without a score head and without what is trained of the base."""
        return replace(self, num_scores=0, saved=(), tokens=(), biases=(), kept_cycles=0)

    @property
    def has_tied_head(self) -> bool:
        """Whether lm_head is the embedding's weight; a score head in its place shares nothing."""
        return self.tied_embeddings and not self.num_scores

    def is_moe(self, layer: int) -> bool:
        """Whether the layer has experts in place of a dense MLP."""
        return layer in self.moe_layers

    def num_parameters(self) -> int:
        """Parameters of the base model, norms and embeddings included."""
        q = self.num_heads * self.head_dim
        kv = self.num_kv_heads * self.head_dim
        h = self.hidden
        # q, k, v and o, with their biases
        attention = h * (q + 2 * kv) + q * h
        attention += self.qkv_bias * (q + 2 * kv) + self.o_bias * h
        # A weight for every feature of all heads, or one head's weights for all of them.
        norm_features = q + kv if self.full_width_norms else 2 * self.head_dim
        attention += self.qk_norm * norm_features
        # For each expert its row of the router and gate, up and down.
        moe = self.num_experts * (h + 3 * h * self.expert_intermediate)
        if self.shared_intermediate:
            moe += 3 * h * self.shared_intermediate + self.shared_gate * h
        num_dense = self.num_layers - len(self.moe_layers)
        mlps = len(self.moe_layers) * moe + num_dense * 3 * h * self.intermediate
        # A score head is trained and does not belong to the base.
        one = self.tied_embeddings or self.num_scores
        embeddings = self.vocab * h * (1 if one else 2)
        # Two norms per layer, and one before the head.
        return self.num_layers * (attention + 2 * h) + mlps + embeddings + h

    def expected_rows(self, p: ParallelConfig, tokens: int) -> float:
        """Mean rows of an expert, for a microbatch of ``tokens`` on every data-parallel rank; 0
        without experts.

        Each of the ``tp * cp`` ranks that share out a microbatch has a part of the tokens; ``ep *
        etp`` ranks send theirs to an expert.
        """
        if not self.moe_layers:
            return 0.0
        return tokens / (p.tp * p.cp) * self.top_k * p.etp * p.ep / self.num_experts

    def rows_per_expert(self, config: RunConfig) -> float:
        """``expected_rows`` of a run's microbatches if every sample has the maximal length, or
        every row of ``train.micro_batch_tokens`` is full."""
        tokens = config.train.micro_batch_tokens
        if tokens is None:
            tokens = config.train.micro_batch_size * config.data.max_length
        return self.expected_rows(config.parallel, tokens)

    def check_layout(self, p: ParallelConfig, recompute: Recompute = "off") -> None:
        """Raise ``ValueError`` when this model cannot be split as ``p`` says, or a rank has fewer
        layers than it is to recompute."""
        # (option, its value, what it divides, how many of these there are)
        sizes = [("tp", p.tp, "vocabulary entries", self.vocab)]
        if len(self.moe_layers) < self.num_layers:
            sizes.append(("tp", p.tp, "dense MLP features", self.intermediate))
        if self.moe_layers:
            sizes += [
                ("ep", p.ep, "experts", self.num_experts),
                ("etp", p.etp, "features per expert", self.expert_intermediate),
                ("tp", p.tp, "features of the shared expert", self.shared_intermediate),
            ]
        elif p.ep > 1 or p.etp > 1:
            raise ValueError(
                f"parallel.ep={p.ep}, parallel.etp={p.etp}: this model ({self.model_type}) has no"
                " experts; set both to 1"
            )
        heads = self.num_heads
        kv = self.num_kv_heads
        possible = self._possible_tp()
        if p.tp not in possible:
            raise ValueError(
                f"parallel.tp={p.tp} does not fit the model's {heads} attention heads and {kv}"
                f" key/value heads; it can be one of {', '.join(map(str, possible))}"
            )
        if self.full_width_norms and p.tp > kv:
            raise ValueError(
                f"parallel.tp={p.tp} is more than the model's {kv} key/value heads, and its norm"
                f" of all keys cannot run over repeated heads; set it to {kv} or less"
            )
        for name, size, what, total in sizes:
            if total % size:
                raise ValueError(_does_not_divide(name, size, total, what))
        self._check_stages(p)
        if isinstance(recompute, RecomputeLayers):
            # Of unequal stages a smaller one may recompute all of its layers.
            of_rank = p.largest_stage(self.num_layers)
            require(
                recompute.layers <= of_rank,
                f"train.recompute.layers={recompute.layers}: a rank has {of_rank} of the model's"
                f" {self.num_layers} layers; train.recompute=full recomputes all of them",
            )

    def check_balance(self, coefficient: float) -> None:
        """Raise ``ValueError`` where ``train.router_aux_loss_coef`` would do nothing."""
        require(
            not coefficient or bool(self.moe_layers),
            f"train.router_aux_loss_coef={coefficient}: this model ({self.model_type}) has no"
            " experts to use evenly; leave it out",
        )

    def _check_stages(self, p: ParallelConfig) -> None:
        """Raise ``ValueError`` unless the layers can be divided into pipeline stages so."""
        if p.stage_layers is not None:
            total = sum(p.stage_layers)
            require(
                total == self.num_layers,
                f"parallel.stage_layers={as_list(p.stage_layers)} are {total} layers in all, and"
                f" the model has {self.num_layers}",
            )
            return
        parts = p.num_chunks
        if self.num_layers % parts == 0:
            return
        uneven = ""
        if parts <= self.num_layers:
            uneven = ", or set parallel.stage_layers"
            # A list to copy, as long as it keeps the message short.
            if parts <= 16:
                uneven += f"={as_list(split_layers(self.num_layers, parts))}"
        raise ValueError(
            f"{_does_not_divide('pp * vpp', parts, self.num_layers, 'layers')}{uneven}"
        )

    def _possible_tp(self) -> list[int]:
        """Sizes of tensor parallelism that leave whole heads on each rank."""
        possible: list[int] = []
        for tp in range(1, self.num_heads + 1):
            # Key/value heads are divided, or, on more ranks than there are, repeated.
            fits_kv = self.num_kv_heads % tp == 0 or tp % self.num_kv_heads == 0
            if self.num_heads % tp == 0 and fits_kv:
                possible.append(tp)
        return possible


def _does_not_divide(name: str, size: int, total: int, what: str) -> str:
    """The message for a size that does not divide what it is to divide, with those that do."""
    # No group has more than 1,024 ranks.
    divisors = [d for d in range(1, min(total, 1024) + 1) if total % d == 0]
    return (
        f"parallel.{name}={size} does not divide the model's {total} {what}; it can be one of"
        f" {', '.join(map(str, divisors))}"
    )
