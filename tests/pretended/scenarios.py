"""Layouts, dtypes and options of which one rank each trains on the pretended GPU."""

from dataclasses import dataclass, field
from typing import Any

from megalora.config import (
    DataConfig,
    LoRAConfig,
    ModelConfig,
    ObjectiveConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)

TARGETS = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "gate",
    "lm_head",
]
MAX_LENGTH = 32768
"""Tokens that a sample may have."""


@dataclass(frozen=True)
class Scenario:
    """What one rank of one layout trains."""

    name: str
    hf: dict[str, Any]
    parallel: dict[str, int] = field(default_factory=dict)
    world: int = 1
    rank: int = 0
    dtype: str = "bfloat16"
    recompute: str = "off"
    dropout: float = 0.0
    tokens: int = 33
    """Length of every sample."""
    row_tokens: int | None = None
    """Rows are packed up to this many tokens, and samples have several lengths; None for rows of
    two samples."""
    pairs: bool = False
    """Samples are pairs of sequences, of which DPO learns."""
    whole_run: bool = False
    """Not a step alone, but what comes before and between steps as well."""

    @property
    def max_length(self) -> int:
        """Of a sequence: what just fits into a packed row."""
        if self.row_tokens is None:
            return MAX_LENGTH
        return self.row_tokens // (2 if self.pairs else 1) + 1

    def config(self) -> RunConfig:
        parallel = ParallelConfig(**self.parallel)
        # Two where there is something to accumulate or to pipeline, as pp and vpp need.
        micro_batches = 1 if parallel.pp == 1 and not self.whole_run else 2
        size = micro_batches * 2 * parallel.data_parallel_sizes(self.world)[0]
        train: dict[str, Any] = {
            "global_batch_size": size,
            "micro_batch_size": 2,
            "recompute": self.recompute,
        }
        if self.row_tokens is not None:
            train |= {"micro_batch_tokens": self.row_tokens, "micro_batch_size": 1}
        return RunConfig(
            model=ModelConfig(path="pretended", dtype=self.dtype),  # type: ignore[arg-type]
            parallel=parallel,
            lora=LoRAConfig(rank=4, alpha=8.0, dropout=self.dropout, target_modules=TARGETS),
            data=DataConfig(train="pretended", eval=8, max_length=self.max_length),
            objective=ObjectiveConfig(name="dpo" if self.pairs else "sft"),
            train=TrainConfig(steps=3, **train),
        )


MOE: dict[str, Any] = {
    "model_type": "qwen3_moe", "num_hidden_layers": 1, "hidden_size": 96, "intermediate_size": 144,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512,
    "max_position_embeddings": 4096, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": False, "moe_intermediate_size": 80, "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 1, "hidden_act": "silu",
}  # fmt: skip

# One layer per pipeline chunk: two stages, and two stages of two chunks each.
TWO_LAYERS = MOE | {"num_hidden_layers": 2}
FOUR_LAYERS = MOE | {"num_hidden_layers": 4}
SHARED: dict[str, Any] = MOE | {
    "model_type": "qwen2_moe", "shared_expert_intermediate_size": 112, "norm_topk_prob": False,
    "mlp_only_layers": [1],
    "qkv_bias": True, "num_hidden_layers": 2,
}  # fmt: skip
"""A routed layer with a shared expert, and a dense layer."""
del SHARED["attention_bias"]  # Qwen2 calls it qkv_bias, and its config has no other

SCENARIOS = (
    Scenario("one_gpu", MOE, whole_run=True),
    Scenario("float32_full", MOE, dtype="float32", recompute="full"),
    # 2 samples x 16,384 positions x 2 experts a token = 65,536 rows for 8 experts, 8,192 each:
    # far above the 1,024 from which torch's grouped GEMM is used.
    Scenario("many_rows", MOE, tokens=16385),
    Scenario("many_rows_dropout_selective", MOE, tokens=16385, dropout=0.1, recompute="selective"),
    Scenario("tp2_shared_dropout", SHARED, {"tp": 2}, 2, dropout=0.1),
    # The last rank of four: what only the first rank does must not be asked of it.
    Scenario("tp2_ep2", MOE, {"tp": 2, "ep": 2}, 4, 3, whole_run=True),
    Scenario("ep2_selective", SHARED, {"ep": 2}, 2, 1, recompute="selective"),
    Scenario(
        "ep2_etp2_float32_dropout_full", MOE, {"ep": 2, "etp": 2}, 4, 1, "float32", "full", 0.1
    ),
    # The first stage has the embedding and no loss, the last one the other way round.
    Scenario("pp2_first_stage", TWO_LAYERS, {"pp": 2, "ep": 2}, 4, 0),
    Scenario("pp2_last_stage", TWO_LAYERS, {"pp": 2, "tp": 2}, 4, 3, recompute="full"),
    Scenario("pp2_vpp2_etp2", FOUR_LAYERS, {"pp": 2, "vpp": 2, "etp": 2}, 4, 0),
    # Packed rows, and rows that are cut: every rank attends to documents by flash attention.
    Scenario("packed", MOE, row_tokens=90),
    Scenario("cp2_packed", MOE, {"cp": 2}, 2, 1, row_tokens=90),
    Scenario(
        "tp2_cp2_ep2_packed_full",
        MOE,
        {"tp": 2, "cp": 2, "ep": 2},
        4,
        3,
        recompute="full",
        row_tokens=90,
    ),
    Scenario(
        "pp2_cp2_packed_selective",
        TWO_LAYERS,
        {"pp": 2, "cp": 2},
        4,
        3,
        recompute="selective",
        row_tokens=90,
    ),
    # The interleaved schedule has rows of one length: filler is a document there.
    Scenario("pp2_vpp2_cp2_packed", FOUR_LAYERS, {"pp": 2, "vpp": 2, "cp": 2}, 4, 0, row_tokens=90),
    # The reference's pass, with the adapters switched off, comes before the step's own.
    Scenario("pairs_cp2_ep2_packed", MOE, {"cp": 2, "ep": 2}, 2, 1, row_tokens=180, pairs=True),
)
