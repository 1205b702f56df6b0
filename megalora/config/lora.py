"""The ``lora`` section: which linears get adapters, and of what rank."""

from dataclasses import dataclass, field

from megalora.config.checks import require


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    rank: int = 16
    alpha: float = 32.0
    """The delta is scaled by alpha / rank (alpha / sqrt(rank) with use_rslora)."""
    dropout: float = 0.0
    """Probability with which an input of A is zeroed, drawn per rank."""
    target_modules: str | list[str] = "all-linear"
    """HF names (q_proj ... down_proj, gate, lm_head), fused names as aliases, or all-linear (all
    but lm_head, gate)."""
    exclude_modules: list[str] = field(default_factory=list)
    """HF names, or regular expressions on full HF module names."""
    layers: list[int] | str | None = None
    """Layers to adapt: a list, or ranges such as "0-3,8,12-". None means all."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """HF name, or regular expression on the full HF module name, to rank. The first that matches
    wins, as in PEFT."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """The same for alpha."""
    expert_rank: int | None = None
    """Rank of routed experts where rank_pattern says nothing; None means rank."""
    use_rslora: bool = False

    def __post_init__(self) -> None:
        for name, rank in {
            "rank": self.rank,
            "expert_rank": self.expert_rank,
            **self.rank_pattern,
        }.items():
            require(
                rank is None or rank >= 1, f"lora: {name} must be a rank of at least 1, got {rank}"
            )
        for name, alpha in {"alpha": self.alpha, **self.alpha_pattern}.items():
            require(alpha > 0, f"lora: {name} must be an alpha above 0, got {alpha}")
        require(0 <= self.dropout < 1, f"lora.dropout must be in [0, 1), got {self.dropout}")
