"""Hold a model's sizes and check that a layout can split them. Pure Python: planner, spec and
checks need no weights; ``fields.model_shape`` reads the sizes from a ``config.json``."""

from dataclasses import dataclass

from megalora.config import ParallelConfig, RunConfig


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
    """Of dense MLP layers."""
    vocab: int
    tied_embeddings: bool
    num_experts: int = 0
    top_k: int = 0
    expert_intermediate: int = 0
    shared_intermediate: int = 0
    """Of the shared expert, which sees every token; 0 where there is none."""
    moe_layers: frozenset[int] = frozenset()
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
    rotary_dim: int | None = None
    """Features of a head that the rotary embedding turns, the first ones; None for all."""

    @property
    def turned_features(self) -> int:
        """Features of a head that the rotary embedding turns."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    def is_moe(self, layer: int) -> bool:
        return layer in self.moe_layers

    def num_parameters(self) -> int:
        """Of the base model, norms and embeddings included."""
        q = self.num_heads * self.head_dim
        kv = self.num_kv_heads * self.head_dim
        h = self.hidden
        attention = (
            h * (q + 2 * kv)
            + q * h
            + self.qk_norm * (q + kv if self.full_width_norms else 2 * self.head_dim)
            + self.qkv_bias * (q + 2 * kv)
        )
        attention += self.o_bias * h
        moe = self.num_experts * (h + 3 * h * self.expert_intermediate)
        if self.shared_intermediate:
            moe += 3 * h * self.shared_intermediate + self.shared_gate * h
        mlps = (
            len(self.moe_layers) * moe
            + (self.num_layers - len(self.moe_layers)) * 3 * h * self.intermediate
        )
        embeddings = self.vocab * h * (1 if self.tied_embeddings else 2)
        return self.num_layers * (attention + 2 * h) + mlps + embeddings + h

    def expected_rows(self, p: ParallelConfig, tokens: int) -> float:
        """Mean rows of an expert, for a microbatch of so many tokens in every data-parallel rank; 0
        without experts.

        Each of the ranks that attention is split over has a part of the tokens; ``ep * etp`` ranks
        send theirs to an expert.
        """
        if not self.moe_layers:
            return 0.0
        return tokens / p.tp * self.top_k * p.etp * p.ep / self.num_experts

    def rows_per_expert(self, config: RunConfig) -> float:
        """As ``expected_rows`` for what a run trains, every sample as long as it may be."""
        return self.expected_rows(
            config.parallel, config.train.micro_batch_size * config.data.max_length
        )

    def check_layout(self, p: ParallelConfig) -> None:
        """Raise ``ValueError`` when this model cannot be split as ``p`` says."""
        sizes = [
            ("tp", p.tp, "vocabulary entries", self.vocab),
            ("pp * vpp", p.pp * p.vpp, "layers", self.num_layers),
        ]
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
        # Each rank holds whole heads: key/value heads are divided, or, on more ranks than there
        # are, repeated.
        heads = self.num_heads
        kv = self.num_kv_heads
        possible = [
            d for d in range(1, heads + 1) if heads % d == 0 and (kv % d == 0 or d % kv == 0)
        ]
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
                divisors = ", ".join(
                    str(d) for d in range(1, total + 1) if total % d == 0 and d <= 1024
                )
                raise ValueError(
                    f"parallel.{name}={size} does not divide the model's {total} {what}; it can be"
                    f" one of {divisors}"
                )
