"""Bytes that one microbatch leaves behind for backward, from the code that saves them.

The base is frozen, so a linear without adapter keeps nothing of its input: what is kept is kept by
norms, attention, router, activations and adapters alone. ``tests/planner/test_activations.py``
counts them in a training step on the CPU. Assumed of a GPU: norms and attention are single kernels
(torch's fused RMSNorm and flash attention), which keep the same but for a norm's input, widened to
float32 on the CPU. Dropout is not counted; ``PlannedModel`` refuses it.

    T  tokens of a microbatch, S B     t, n  TP, ETP size     e  bytes per element
    r, R  rank, sum of stacked ranks   q, g  query, key/value heads / t     d  head dim
    M  rows of this rank's experts: (T / t) k n on average, times the imbalance
"""

import math
from dataclasses import dataclass

from megalora.lora.spec import Adapted
from megalora.planner.layouts import ParallelLayout, Recompute, Workload
from megalora.planner.weights import Chunk, PlannedModel, attention_widths

STATISTIC = INT = 4
"""Bytes of a float32 (rms, log-sum-exp, probability) and of an int32 index."""


@dataclass(frozen=True)
class Microbatch:
    """Sizes of one microbatch on one rank, in elements."""

    samples: int
    sequence: int
    """Padded to a multiple of TP."""
    tokens: int
    """T."""
    own_tokens: int
    """T / t: between attention and experts each rank holds its part of the sequence."""
    rows: int
    """M."""
    element_bytes: int

    @classmethod
    def of(cls, model: PlannedModel, layout: ParallelLayout, work: Workload) -> "Microbatch":
        p = layout.parallel
        sequence = p.tp * math.ceil(work.sequence_length / p.tp)
        tokens = layout.micro_batch_size * sequence
        own = tokens // p.tp
        rows = own * model.shape.top_k * p.etp
        rows = math.ceil(rows * work.imbalance) if p.ep > 1 else rows
        return cls(layout.micro_batch_size, sequence, tokens, own, rows, work.element_bytes)


@dataclass(frozen=True)
class Kept:
    """What one layer keeps, in bytes, by the part that keeps it."""

    attention: int
    """Core attention's operands and result, which adapters around it share."""
    mlp: int
    """Router, experts or dense MLP."""
    rest: int
    """Norms, and what adapters of attention keep."""

    @property
    def total(self) -> int:
        return self.attention + self.mlp + self.rest


def chunk_bytes(model: PlannedModel, layout: ParallelLayout, work: Workload, chunk: Chunk) -> int:
    """Kept by the decoder layers of a chunk for one microbatch, head and loss left out:
    ``layer_bytes`` of each."""
    total = 0
    known = model.memo.setdefault(("kept", layout, work), {})
    for layer in chunk.layers:
        live = _input_needs_gradient(model, chunk, layer)
        if not live and layer < model.first_adapted:
            continue  # no node of it takes part in backward
        key = (model.kinds[layer], live)
        if key not in known:
            known[key] = layer_bytes(model, layout, work, layer, live, layout.recompute)
        total += known[key]
    return total


def angles_bytes(model: PlannedModel, layout: ParallelLayout, work: Workload, chunk: Chunk) -> int:
    """Recomputed layers keep the angles of rotary embeddings, S d 4, of the features of a head that
    are turned: one tensor for all layers of a
    chunk and all microbatches."""
    if layout.recompute != "full" or chunk.layers.stop <= model.first_adapted * chunk.has_embedding:
        return 0
    return Microbatch.of(model, layout, work).sequence * model.shape.turned_features * STATISTIC


def layer_bytes(
    model: PlannedModel,
    layout: ParallelLayout,
    work: Workload,
    layer: int,
    live: bool,
    level: Recompute,
) -> int:
    """Kept by one decoder layer for one microbatch, at a level of recomputation.

    ``full``: the layer's input (T / t) H e, also where it needs no gradient. ``selective``: core
    attention's operands, without its statistics and, where no adapter reads it, its result; of
    experts all but [gate | up]; of a dense or shared MLP the input alone.
    """
    batch = Microbatch.of(model, layout, work)
    if level == "full":
        return batch.own_tokens * model.shape.hidden * batch.element_bytes
    return kept(model, layout, batch, layer, live, selective=level == "selective").total


def kept(
    model: PlannedModel, layout: ParallelLayout, batch: Microbatch, layer: int, live: bool, *,
    selective: bool
) -> Kept:  # fmt: skip
    """The same by parts.

    Norm: its input (T / t) H e and rms, where that needs a gradient. Adapter of a linear: its
        input, unless someone else keeps it, h and the block matrix of its B's.
    """
    s = model.shape
    e = batch.element_bytes
    own = batch.own_tokens
    modules = model.by_layer.get(layer, {})
    norm = own * (s.hidden * e + STATISTIC)
    hidden = own * s.hidden * e
    qkv = modules.get("self_attention.linear_qkv", [])
    o = modules.get("self_attention.linear_proj", [])
    width, kv = attention_widths(s, layout.parallel)
    rest = norm * live
    if qkv:
        rest += hidden + low_rank(qkv, batch.tokens, width + 2 * kv, e)
    attention = 0
    if live or qkv:
        attention = _core_attention(model, layout, batch, selective, result_is_read=bool(o))
    elif o:
        attention = batch.tokens * width * e
    if o:
        rest += low_rank(o, own, s.hidden, e)
    live = live or bool(qkv or o)
    rest += norm * live
    mlp = _moe if s.is_moe(layer) else _dense
    return Kept(attention, mlp(model, layout, batch, modules, live, selective), rest)


def low_rank(adapted: list[Adapted], rows: int, out_features: int, e: int) -> int:
    """``add_low_rank``: h, rows R, and the stacked B, out R; both in the activations' dtype."""
    return (rows + out_features) * sum(a.rank for a in adapted) * e


def _core_attention(
    model: PlannedModel,
    layout: ParallelLayout,
    batch: Microbatch,
    selective: bool,
    result_is_read: bool,
) -> int:
    """From the output of qkv to the input of o: T (q + 2 g) d e of qkv itself (v, and what the
    norms of q and k read; q once more where several key/value heads make it a copy), their rms T (q
    + g) 4, four tables of S d e for rotary embeddings, and attention's q, k and result T (2 q + g)
    d e with its log-sum-exp T q 4."""
    s = model.shape
    e = batch.element_bytes
    tokens = batch.tokens
    width, kv = attention_widths(s, layout.parallel)
    heads = width // s.head_dim
    groups = kv // s.head_dim
    total = (
        tokens * (width + 2 * kv) * e
        + 4 * batch.sequence * s.turned_features * e
        + tokens * (width + kv) * e
    )
    if s.qk_norm:
        norms = 2 if s.full_width_norms else heads + groups
        total += tokens * norms * STATISTIC + (tokens * width * e if groups > 1 else 0)
    if result_is_read or not selective:
        total += tokens * width * e
    return total if selective else total + tokens * heads * STATISTIC


def _moe(
    model: PlannedModel,
    layout: ParallelLayout,
    batch: Microbatch,
    modules: dict[str, list[Adapted]],
    live: bool,
    selective: bool,
) -> int:
    """Router, both sorts, routed experts and the shared expert."""
    s = model.shape
    e = batch.element_bytes
    own = batch.own_tokens
    router = modules.get("mlp.router", [])
    gate_up = modules.get("mlp.experts.gate_up", [])
    down = modules.get("mlp.experts.down", [])
    shared = any(m.startswith("mlp.shared_experts") for m in modules)
    moved = layout.parallel.ep * layout.parallel.etp > 1
    total = 0
    if router:
        total += low_rank(router, own, s.num_experts, _router_bytes(model, batch))
    live_router = live or bool(router)
    if live_router:
        total += _routing(model, batch, moved, live)
    total += _experts(model, layout, batch, modules, live_router, selective)
    # Recomputing gate_up needs the experts' input wherever backward passes SwiGLU.
    x_kept = bool(gate_up) or (selective and (live_router or bool(down)))
    fc1 = bool(modules.get("mlp.shared_experts.linear_fc1"))
    shared_x_kept = fc1 or (selective and (live or shared))
    if router or (x_kept and not moved) or (s.shared_intermediate and shared_x_kept):
        total += own * s.hidden * e  # the norm's output, once for all who keep it
    if s.shared_intermediate and (live or shared):
        total += _gated_mlp(
            model,
            layout,
            batch,
            modules,
            "mlp.shared_experts",
            s.shared_intermediate,
            live,
            selective,
        )
        # Its output is multiplied by sigmoid(gate), which is frozen: the output is kept for the
        # gradient of the gate's input alone.
        total += 0 if selective else s.shared_gate * own * (s.hidden * live + 1) * e
    return total


def _routing(model: PlannedModel, batch: Microbatch, moved: bool, live: bool) -> int:
    """Top-k: an int64 index for each of the (T / t) k choices, a float32 softmax over the choices
    (over all experts where probabilities are not normed again, as in Qwen2-MoE). Where
    probabilities went: an int32 index, and one that the experts keep as well; with an all-to-all
    that one and another belong to the rows before it."""
    s = model.shape
    own = batch.own_tokens
    choices = own * s.top_k
    if s.correction_bias:
        # Sigmoids of all experts, those of the chosen ones and their sum. The weight is widened to
        # float32, and kept for the gradient of the router's input.
        is_widened = batch.element_bytes < STATISTIC
        scores = own * (s.num_experts + s.top_k + 1) * STATISTIC
        scores += s.num_experts * s.hidden * STATISTIC * (live and is_widened)
    else:
        scores = (own * s.num_experts if s.softmax_over_all else choices) * STATISTIC
    kept = choices * (8 + INT) + scores
    return kept + choices * 2 * INT * moved


def _router_bytes(model: PlannedModel, batch: Microbatch) -> int:
    """Bytes of an element behind the router: a family that corrects its choice by a bias has
    products, scores and probabilities in float32."""
    return STATISTIC if model.shape.correction_bias else batch.element_bytes


def _experts(
    model: PlannedModel,
    layout: ParallelLayout,
    batch: Microbatch,
    modules: dict[str, list[Adapted]],
    live: bool,
    selective: bool,
) -> int:
    """``expert_mlp``: rows as an all-to-all delivered them M H e (without one they are the norm's
    output), [gate | up] M 2 I / n e unless recomputed, S of gate and up and of down M (R + r) e,
    probabilities M e, two int32 a row and E / ep offsets."""
    s = model.shape
    p = layout.parallel
    e = batch.element_bytes
    gate_up = modules.get("mlp.experts.gate_up", [])
    down = modules.get("mlp.experts.down", [])
    live = live or bool(gate_up or down)
    if not live:
        return 0
    elements = sum(a.rank for a in gate_up + down)
    if p.ep * p.etp > 1 and (gate_up or selective):
        elements += s.hidden
    if not selective:
        elements += 2 * s.expert_intermediate // p.etp
    probability = _router_bytes(model, batch)
    return batch.rows * (elements * e + probability + 2 * INT) + s.num_experts // p.ep * INT


def _dense(
    model: PlannedModel,
    layout: ParallelLayout,
    batch: Microbatch,
    modules: dict[str, list[Adapted]],
    live: bool,
    selective: bool,
) -> int:
    s = model.shape
    adapted = any(modules.get(f"mlp.linear_{name}") for name in ("fc1", "fc2"))
    x_kept = bool(modules.get("mlp.linear_fc1")) or (selective and (live or adapted))
    total = batch.own_tokens * s.hidden * batch.element_bytes * x_kept
    return total + _gated_mlp(model, layout, batch, modules, "mlp", s.intermediate, live, selective)


def _gated_mlp(
    model: PlannedModel,
    layout: ParallelLayout,
    batch: Microbatch,
    modules: dict[str, list[Adapted]],
    name: str,
    intermediate: int,
    live: bool,
    selective: bool,
) -> int:
    """fc1, silu(gate) * up, fc2, input left out: fc1's output T 2 I / t e, both factors T 2 I / t e
    (Megatron's glu makes new ones), the product T I / t e where fc2 is adapted, and what the
    adapters keep. Nothing when recomputed."""
    if selective:
        return 0
    fc1 = modules.get(f"{name}.linear_fc1", [])
    fc2 = modules.get(f"{name}.linear_fc2", [])
    e = batch.element_bytes
    features = intermediate // layout.parallel.tp
    total = low_rank(fc1, batch.tokens, 2 * features, e) + low_rank(
        fc2, batch.own_tokens, model.shape.hidden, e
    )
    total += batch.tokens * features * e * bool(fc2)
    return total + batch.tokens * 4 * features * e * (live or bool(fc1))


def head_bytes(model: PlannedModel, layout: ParallelLayout, work: Workload) -> int:
    """Kept by final norm, output layer and loss for one microbatch.

    Norm (T / t) (H e + 4), unless the head alone is adapted; softmax T V / t 4; per token a mask,
    an int64 target and the loss mask; with an adapter on the head also its input, h and B.
    """
    batch = Microbatch.of(model, layout, work)
    s = model.shape
    e = batch.element_bytes
    vocab = s.vocab // layout.parallel.tp
    head = model.by_layer.get(None, {}).get("output_layer", [])
    norm = batch.own_tokens * (s.hidden * e + STATISTIC)
    total = norm * head_input_needs_gradient(model, layout) + batch.tokens * (vocab * 4 + 1 + 8 + 4)
    return total + (
        batch.own_tokens * s.hidden * e + low_rank(head, batch.tokens, vocab, e) if head else 0
    )


def head_input_needs_gradient(model: PlannedModel, layout: ParallelLayout) -> bool:
    """Whether backward goes on below the head: some layer has an adapter, or another stage is
    there to receive the gradient."""
    return model.first_adapted < model.shape.num_layers or layout.parallel.pp > 1


def _input_needs_gradient(model: PlannedModel, chunk: Chunk, layer: int) -> bool:
    """True behind the first adapted layer, and everywhere on a stage that receives its input:
    Megatron asks for its gradient."""
    return layer > model.first_adapted or not chunk.has_embedding
