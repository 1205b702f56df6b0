"""Compare the live tensors of a real training step on CPU ranks with what the planner says of the
same step.

``count_step.py`` counts what one rank holds. What differs from a GPU is named here and nowhere
else:

    routing      made even, as the planner takes it to be: a constant on the router's logits that
                 cannot be outvoted. How many ranks a token's experts lie on is told to the planner
    experts      computed one at a time. For few rows the CPU has a single call, whose result is a
                 temporary, and takes SwiGLU's gradient of several experts at once, in float32:
                 2 % of the peak of these models. GPUs' kernels, which are planned, write in place
    optimizer    torch's AdamW is one kernel for all tensors, as ours is on GPUs
    batches      stay on the host: not counted
    norms        are composed of operations on the CPU and keep float32: planned beside the
                 product's formula, see ``widened_norms``
    planned      without the CUDA context and without room for adapters, which float32 and the
                 CPU's back end go without
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megalora.config import LoRAConfig, ObjectiveConfig, RunConfig
from megalora.config.recompute import recompute_from
from megalora.planner.dropout_backward import experts_have_dropout
from megalora.planner.layouts import ParallelLayout
from megalora.planner.memory import (
    BASE_VALUES,
    CONTEXT,
    ROOM,
    TEACHER,
    MemoryPlan,
    memory_of_model,
)
from megalora.planner.microbatch import Microbatch
from megalora.planner.models import shape_in
from megalora.planner.teacher import teacher_of
from megalora.planner.weights import Chunk, PlannedModel, attention_widths, chunks_of
from megalora.planner.workload import Workload
from megalora.tiny import make_tiny
from tests.distributed.ranks import run_ranks
from tests.paired import labelled_of, pairs_of
from tests.parity.runs import make_config
from tests.planner.count_step import MICROBATCHES, SEQUENCE, SFT, count_step, ranks_of_tokens

DISTILL = ObjectiveConfig(name="distill", teacher="base", sft_weight=0.1, temperature=2.0)
RANK = 8
"""Rank of the adapter."""
# Wide enough that indexes and scalars, which are not planned, are below a hundredth.
_SIZES = {
    "hidden_size": 160, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32,
    "vocab_size": 640,
    "num_hidden_layers": 4,
}  # fmt: skip
_EXPERTS = {"moe_intermediate_size": 60, "num_experts": 16, "num_experts_per_tok": 4}
_WIDE = {"arch": "qwen3", "hidden_size": 640, "num_hidden_layers": 2}
MODELS: dict[str, dict[str, Any]] = {
    "moe": _SIZES | _EXPERTS,
    "vocab": _SIZES | _EXPERTS | {"vocab_size": 8192, "num_hidden_layers": 2},
    "tied": _SIZES | _EXPERTS
    | {"vocab_size": 8192, "num_hidden_layers": 2, "tie_word_embeddings": True},
    "tied layers": _SIZES | _EXPERTS | {"vocab_size": 1280, "tie_word_embeddings": True},
    "many": _SIZES | _EXPERTS | {"num_experts": 40},
    "seven": _SIZES | _EXPERTS | {"num_hidden_layers": 7},
    "dense": _SIZES | {"arch": "qwen3", "intermediate_size": 420},
    "biased": _SIZES | _EXPERTS | {"attention_bias": True},
    "shared": _SIZES | _EXPERTS
    | {"arch": "qwen2_moe", "intermediate_size": 420, "shared_expert_intermediate_size": 140,
       "mlp_only_layers": [1]},
    "wide": _SIZES | _WIDE | {"intermediate_size": 2500},
    "many heads": _SIZES | _WIDE
    | {"intermediate_size": 100, "num_attention_heads": 64, "num_key_value_heads": 16},
    "wide experts": _SIZES | _EXPERTS
    | {"hidden_size": 640, "moe_intermediate_size": 300, "num_hidden_layers": 2},
}  # fmt: skip
"""In proportions like those of Qwen3-30B. ``vocab``: the loss is the peak; ``tied layers``: a
layer's backward is; ``many``: more experts than are given room. Those behind ``shared`` teach
others."""
CATEGORIES = (
    "weights",
    "adapters",
    "gradients",
    "optimizer",
    "activations",
    "pass",
    "step",
    "peak",
)
"""What bytes are counted and planned as; ``pass`` and ``step`` are what they add to what is always
there."""


SCALARS = 1024
"""Bytes of single numbers that are not worth planning, at most."""


@dataclass(frozen=True)
class Case:
    """A layout of one of ``MODELS``."""

    world: int
    parallel: dict[str, Any]
    micro: int = 1
    recompute: str = "off"
    model: str = "moe"
    dtype: Any = "float32"
    dropout: float = 0.0
    balanced: bool = False
    """Whether a loss keeps experts evenly used."""
    share_outer: bool = False
    init: str = "lora"
    dora: bool = False
    objective: ObjectiveConfig = SFT
    teacher: str = ""
    """One of ``MODELS`` that it learns from, or ``base``."""
    saved: tuple[str, ...] = ()
    """What is trained whole."""
    tokens: tuple[int, ...] = ()
    """Rows of the embedding that are trained."""
    bias: str = "none"

    @property
    def name(self) -> str:
        """The case in a test's id."""
        sizes = " ".join(f"{name}{n}" for name, n in self.parallel.items()) or "alone"
        name = f"{self.world} {sizes} micro{self.micro} {self.recompute} {self.model} {self.dtype}"
        name += " balanced" if self.balanced else ""
        name += " dropout" if self.dropout else ""
        name += "" if self.init == "lora" else f" {self.init}"
        name += " dora" if self.dora else ""
        name += "" if self.objective.name == "sft" else f" {self.objective.name}"
        name += f" taught by {self.teacher}" * bool(self.teacher)
        name += f" saved {' '.join(self.saved)}" if self.saved else ""
        name += " rows" if self.tokens else ""
        name += "" if self.bias == "none" else f" biases {self.bias}"
        return f"{name} share outer" if self.share_outer else name

    def config(self, folder: Path, chats: Path) -> RunConfig:
        """The run, on a model that is made in ``folder``."""
        base = make_model(self.model, folder)
        objective = self.objective
        if self.teacher:
            teacher = self.teacher
            if teacher != "base":
                teacher = str(make_model(teacher, folder))
            objective = replace(DISTILL, teacher=teacher)
        # Read and not trained on; it must be what the objective learns.
        data = chats
        if self.objective.num_scores or self.objective.pairs:
            data = pairs_of(chats) if self.objective.pairs else labelled_of(chats)
        sizes = {
            "micro_batch_size": self.micro,
            "global_batch_size": MICROBATCHES * self.micro * self.world,
        }
        config = make_config(
            base, data, folder / "run", self.parallel, self.recompute,
            lora=LoRAConfig(
                rank=RANK, dropout=self.dropout, share_outer=self.share_outer, init=self.init,
                use_dora=self.dora, modules_to_save=list(self.saved),
                trainable_token_indices=list(self.tokens), bias=self.bias,
            ),
            dtype=self.dtype, objective=objective,
            router_aux_loss_coef=0.01 * self.balanced, **sizes
        )  # fmt: skip
        # The batches of the count are made by hand; the config must be one that could run.
        dp, _ = config.parallel.data_parallel_sizes(self.world)
        assert sizes["global_batch_size"] % (dp * self.micro) == 0
        return config


def make_model(model: str, folder: Path) -> Path:
    """Its folder inside ``folder``, made where it is not yet."""
    base = folder / f"counted {model}"
    return base if base.exists() else make_tiny(base, **MODELS[model])


def compare(case: Case, folder: Path, chats: Path) -> list[dict[str, Any]]:
    """For each pipeline stage: bytes found on its fullest rank and said by the planner, by
    category. Ranks of a stage are alike, which is checked."""
    config = case.config(folder, chats)
    model = PlannedModel.of(shape_in(config), config.lora)
    layout = ParallelLayout(
        parallel=config.parallel,
        num_ranks=case.world,
        micro_batch_size=case.micro,
        recompute=recompute_from(case.recompute),
    )
    global_batch = MICROBATCHES * case.micro * layout.dp
    work = Workload(
        sequence_length=SEQUENCE,
        global_batch_size=global_batch,
        dtype=case.dtype,
        on_cpu=True,
        balanced=case.balanced,
        sequences=case.objective.sequences,
        references=config.objective.num_references,
        teacher=teacher_of(config.objective),
        asks_base=config.objective.asks_base,
    )
    top_k = 0
    if model.shape.moe_layers:
        top_k = model.shape.top_k
        # A rank's own tokens: their choice begins anew on every rank.
        sequences = case.micro * case.objective.sequences
        own = SEQUENCE * sequences // (config.parallel.tp * config.parallel.cp)
        spread = ranks_of_tokens(own, model.shape.num_experts, top_k, config.parallel.ep)
        work = replace(work, ranks_per_token=spread)
    found = run_ranks(count_step, case.world, config, top_k)
    # Ranks are numbered with the pipeline stage outermost.
    ranks_per_stage = case.world // config.parallel.pp
    rows = []
    for stage in range(config.parallel.pp):
        first = stage * ranks_per_stage
        ranks = sorted(found[first : first + ranks_per_stage], key=lambda rank: rank["peak"])
        fullest = ranks[-1]
        assert ranks[0]["peak"] > 0.99 * fullest["peak"], ranks
        said = categories(memory_of_model(model, layout, work, stage))
        if case.dtype == "bfloat16" or any("norm" in name for name in case.saved):
            assert config.parallel.pp == 1 and case.recompute in ("off", "selective"), (
                "what norms keep is counted for one microbatch alone"
            )
            batch = Microbatch.of(model, layout, work)
            (chunk,) = chunks_of(model.shape, config.parallel, 0)
            wide = norm_outputs(model, layout, batch, chunk)
            if case.dtype == "bfloat16":
                wide += widened_norms(model, layout, batch, chunk)
            for name in ("activations", "pass", "peak"):
                said[name] += wide
        rows.append({"stage": stage, "found": fullest, "said": said})
    return rows


def error(said: int, found: int) -> float:
    """Relative error of a planned number of bytes; none below a kilobyte, which is that of the norm
    of each gradient."""
    if max(said, found) <= SCALARS:
        return 0.0
    # No ratio to nothing: memory that was predicted in vain counts as 100 % too much.
    return said / found - 1 if found else 1.0


def categories(plan: MemoryPlan) -> dict[str, int]:
    """A plan in the categories that a step is counted in; ``pass`` and ``step`` are what they add
    to what is always there."""
    # The loss and a layer's backward come one after the other, and a teacher's pass before both.
    passes = plan.sum_of("pass") + max(plan.sum_of("loss"), plan.sum_of("layer"))
    passes = max(passes, plan.sum_of("teacher"))
    second = sum(part.num_bytes for part in plan.parts if part.name == TEACHER)
    step = plan.sum_of("step")
    base_values = sum(part.num_bytes for part in plan.parts if part.name == BASE_VALUES)
    return {
        "weights": plan["weights"] + second,
        "adapters": plan["adapters"] + plan["buffer padding"] + base_values,
        "gradients": plan["gradients"],
        "optimizer": plan["optimizer"], "activations": plan["activations"] + plan["loss"],
        "pass": passes, "step": step, "peak": plan.peak_bytes - plan[CONTEXT] - plan[ROOM],
    }  # fmt: skip


def routing_of_call(
    model: PlannedModel, layout: ParallelLayout, batch: Microbatch, layer: int
) -> int:
    """Bytes of a layer's routing that selective recomputation keeps as an argument of the experts
    with dropout, and that no node saves: int32 sources of the rows and ends of experts; and the
    slots, which probabilities save unless they came by an all-to-all or need no gradient. Hooks of
    saved tensors do not see them, ``LiveTensors`` does."""
    if not experts_have_dropout(model, layer) or not model.shape.is_moe(layer):
        return 0
    p = layout.parallel
    local_experts = model.shape.num_experts // p.ep
    total = batch.rows + local_experts
    others = [name for name in model.modules_of(layer) if not name.startswith("mlp.experts.")]
    probabilities_save = layer > model.first_adapted or bool(others)
    if p.ep * p.etp > 1 or not probabilities_save:
        total += batch.received * min(model.shape.top_k, local_experts)
    return 4 * total


def routing_of_calls(
    model: PlannedModel, layout: ParallelLayout, batch: Microbatch, chunk: Chunk
) -> int:
    """The same of a chunk, as what a count of saved tensors has less than the plan."""
    num_full, rest = chunk.levels(layout.recompute)
    if rest != "selective":
        return 0
    return -sum(routing_of_call(model, layout, batch, n) for n in chunk.layers[num_full:])


def norm_outputs(
    model: PlannedModel, layout: ParallelLayout, batch: Microbatch, chunk: Chunk
) -> int:
    """Bytes by which the CPU keeps other things for trained weights of norms than a GPU: each
    norm's result before it is multiplied, in float32; of a norm whose input needs no gradient that
    alone, without the input and its rms. A norm over all heads is one node on both."""
    s = model.shape
    width, kv = attention_widths(s, layout.parallel)
    e = batch.element_bytes
    # What backward reads of the input, where nothing else keeps it: k is a part of qkv's output, of
    # which q is a copy where there are several groups.
    copy = width * e * (kv > s.head_dim)
    hidden = (batch.own_tokens, s.hidden, s.hidden * e + 4)
    kept = {
        "input_layernorm": hidden,
        "pre_mlp_layernorm": hidden,
        "self_attention.q_layernorm": (batch.tokens, width, copy + width // s.head_dim * 4),
        "self_attention.k_layernorm": (batch.tokens, kv, kv // s.head_dim * 4),
        "decoder.final_layernorm": hidden,
    }
    num_full, _ = chunk.levels(layout.recompute)
    layers: list[int | None] = list(chunk.layers[num_full:])
    if chunk.has_head:
        layers.append(None)
    total = 0
    for layer in layers:
        for weight in model.whole.get(layer, []):
            if weight.path not in kept or (s.full_width_norms and "self_attention" in weight.path):
                continue
            tokens, features, of_input = kept[weight.path]
            total += tokens * features * 4
            if not _input_is_live(model, chunk, layer, weight.path):
                total -= tokens * of_input
    return total


def _input_is_live(model: PlannedModel, chunk: Chunk, layer: int | None, path: str) -> bool:
    """Whether the input of a norm needs a gradient."""
    first = model.first_adapted
    if not chunk.has_embedding or first < (model.shape.num_layers if layer is None else layer):
        return True
    if layer is None:
        return False
    before = model.trains(layer, "input_layernorm")
    adapted = model.modules_of(layer)
    if path == "pre_mlp_layernorm":
        # Norms and biases, that of o_proj too.
        inside = any(w.path.startswith("self_attention.") for w in model.whole.get(layer, []))
        return before or inside or any("attention" in m for m in adapted)
    if path == "input_layernorm":
        return False
    return before or "self_attention.linear_qkv" in adapted


def widened_norms(
    model: PlannedModel, layout: ParallelLayout, batch: Microbatch, chunk: Chunk
) -> int:
    """Bytes by which float32 inputs of a chunk's norms exceed the bfloat16 ones that are counted;
    every linear adapted.

    On the CPU a norm is composed of float32 operations and keeps its input widened; a GPU has it as
    one kernel that does not.
    """
    s = model.shape
    q, kv = attention_widths(model.shape, layout.parallel)
    # Two in each layer and one before the head. Where the first one's input is the frozen
    # embedding's output, nothing of it is kept.
    is_frozen = chunk.has_embedding and not model.trains_embedding
    num_norms = 2 * len(chunk.layers) - is_frozen + chunk.has_head
    # Hidden states [T, H] that are kept with 4 bytes where the plan has 2.
    hidden_states = num_norms * batch.own_tokens * s.hidden * 2
    if not s.qk_norm:
        return hidden_states
    # Norms of heads keep q and k, 4 bytes each. Of their bfloat16 inputs the plan has a copy of q
    # where there are several groups of heads; k's, and one group's q, are parts of qkv's output.
    heads = 4 * (q + kv)
    if kv > s.head_dim:
        heads -= 2 * q
    return hidden_states + len(chunk.layers) * batch.tokens * heads
