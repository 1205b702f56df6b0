"""Count the bytes that one microbatch leaves behind for backward, by the code that saves them.

The base is frozen, so a linear without adapter keeps nothing of its input: what is kept is kept by
norms, attention, router, activations and adapters alone. ``tests/planner/test_activations.py``
counts them in a training step on the CPU. Assumed of a GPU: norms and attention are single kernels
(torch's fused RMSNorm and flash attention), which keep the same but for a norm's input, widened to
float32 on the CPU. With dropout each A reads a copy of its input, which is kept in place of the
input, and a mask (``Microbatch.dropped``); the two are counted where the adapter is.

    T  tokens of a microbatch, S B     t, n  TP, ETP size     e  bytes per element
    r, R  rank, sum of stacked ranks   q, g  query, key/value heads / t     d  head dim
    M  rows of this rank's experts: (T / t) k n on average, times the imbalance
    N  rows that this rank receives and gathers those from; T / t without expert parallelism
"""

from dataclasses import dataclass

from megalora.config import Level
from megalora.model.projections import O_PROJ, QKV
from megalora.planner.layouts import ParallelLayout
from megalora.planner.magnitudes import dense_scaling
from megalora.planner.microbatch import STATISTIC, Microbatch
from megalora.planner.mlp_activations import INDEX, PlannedMLP, low_rank, mlp_bytes
from megalora.planner.weights import Chunk, PlannedModel, attention_widths
from megalora.planner.workload import Workload


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
    """Kept by the decoder layers of a chunk for one microbatch, head and loss left out."""
    return sum(bytes_by_layer(model, layout, work, chunk))


def bytes_by_layer(
    model: PlannedModel, layout: ParallelLayout, work: Workload, chunk: Chunk
) -> list[int]:
    """``layer_bytes`` of each layer of a chunk, at its own level of recomputation."""
    found = []
    # Layers of one kind and level are counted once for all layouts that cut them alike.
    known = model.memo.setdefault(("kept", layout.cut(work)), {})
    num_full, rest = chunk.levels(layout.recompute)
    for i, layer in enumerate(chunk.layers):
        live = _input_needs_gradient(model, chunk, layer)
        if not live and layer < model.first_adapted:
            found.append(0)  # no node of it takes part in backward
            continue
        level = "full" if i < num_full else rest
        key = (model.kinds[layer], live, level)
        if key not in known:
            known[key] = layer_bytes(model, layout, work, layer, live, level)
        found.append(known[key])
    return found


def angles_bytes(model: PlannedModel, layout: ParallelLayout, work: Workload, chunk: Chunk) -> int:
    """Recomputed layers keep the angles of rotary embeddings, T d 4, of the features of a head that
    are turned: one tensor for all layers of a chunk, of each microbatch."""
    num_full, _ = chunk.levels(layout.recompute)
    # Nothing between the embedding and the first adapter takes part in backward.
    below = max(model.first_adapted - chunk.layers.start, 0) if chunk.has_embedding else 0
    if num_full <= below:
        return 0
    return Microbatch.of(model, layout, work).tokens * model.shape.turned_features * STATISTIC


def layer_bytes(
    model: PlannedModel,
    layout: ParallelLayout,
    work: Workload,
    layer: int,
    live: bool,
    level: Level,
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
    """The same by parts, without and with selective recomputation.

    Norm: its input (T / t) H e and rms, where that needs a gradient or its weight is trained.
        Adapter of a linear: its input, unless someone else keeps it, or its dropped-out copy, which
        nobody else does; h and the block matrix of its B's.
    """
    s = model.shape
    e = batch.element_bytes
    own = batch.own_tokens
    modules = model.modules_of(layer)
    trains_router = model.trains(layer, "mlp.router")
    norm = own * (s.hidden * e + STATISTIC)
    hidden = own * s.hidden * e
    qkv = modules.get(QKV, [])
    o = modules.get(O_PROJ, [])
    width, kv = attention_widths(s, layout.parallel)

    # A trained weight of a norm makes all behind it need a gradient, as the norm's input does.
    live = live or model.trains(layer, "input_layernorm")
    rest = norm if live else 0
    if qkv:
        rest += low_rank(qkv, batch.tokens, width + 2 * kv, e)
        rest += dense_scaling(qkv, batch.tokens, width + 2 * kv, e)
        rest += batch.dropped(own * s.hidden, live) if model.has_dropout else hidden
    attention = 0
    # With dropout o's adapter keeps a copy of the result instead of the result.
    reads_result = bool(o) and not model.has_dropout
    result_is_live = live or bool(qkv) or model.trains_in_attention(layer)
    if result_is_live:
        attention = _core_attention(model, layout, batch, selective, reads_result)
    elif reads_result:
        # No gradient passes core attention: its result is kept as the input of o's adapter.
        attention = batch.tokens * width * e
    if o:
        rest += low_rank(o, own, s.hidden, e)
        rest += dense_scaling(o, own, s.hidden, e)
        if model.has_dropout:
            rest += batch.dropped(batch.tokens * width, result_is_live)

    # What is trained of attention makes the residual stream need a gradient from here on.
    trained_behind = model.trains(layer, O_PROJ) or model.trains(layer, "pre_mlp_layernorm")
    live = result_is_live or bool(o) or trained_behind
    if live:
        rest += norm
    mlp = PlannedMLP(model, layout, batch, modules, live, selective, trains_router)
    return Kept(attention, mlp_bytes(mlp, s.is_moe(layer)), rest)


def _core_attention(
    model: PlannedModel,
    layout: ParallelLayout,
    batch: Microbatch,
    selective: bool,
    result_is_read: bool,
) -> int:
    """From the output of qkv to the input of o: T (q + 2 g) d e of qkv itself (v, and what the
    norms of q and k read; q once more where several key/value heads make it a copy), their rms T (q
    + g) 4, four tables of T d e for rotary embeddings, and attention's q, k and result T (2 q + g)
    d e with its log-sum-exp T q 4.

    Context parallelism: attention keeps k and v of the whole row, c T 2 g d e, in place of this
    rank's own; its result is in two chunks, which o's input is a copy of. Recomputing it gathers
    them anew.
    """
    s = model.shape
    e = batch.element_bytes
    tokens = batch.tokens
    width, kv = attention_widths(s, layout.parallel)
    heads = width // s.head_dim
    groups = kv // s.head_dim
    of_qkv = tokens * (width + 2 * kv) * e
    # Cosines and sines, of q and of k.
    rotary = 4 * tokens * s.turned_features * e
    q_and_k = tokens * (width + kv) * e
    total = rotary + q_and_k
    gathers = layout.parallel.cp > 1 and not selective
    if gathers:
        total += (2 * batch.row_tokens - tokens) * kv * e
        if result_is_read:
            total += tokens * width * e
    # Of qkv's output gathered attention keeps nothing: it is there for the norms alone.
    if s.qk_norm or not gathers:
        total += of_qkv
    if s.qk_norm:
        # One rms for each head, or one for all heads of q and one for those of k.
        norms = 2 if s.full_width_norms else heads + groups
        total += tokens * norms * STATISTIC
        if groups > 1:
            total += tokens * width * e
    if result_is_read or not selective:
        total += tokens * width * e
    if not selective:
        total += tokens * heads * STATISTIC
    return total


def embedding_bytes(
    model: PlannedModel, layout: ParallelLayout, work: Workload, chunk: Chunk
) -> int:
    """Kept by a trained embedding for one microbatch: over TP the ids on this rank, T int64, and
    which tokens are others', T booleans; of trained rows each token's place among them and whether
    it is one, T / t each. On one rank the ids of the batch serve."""
    if not (chunk.has_embedding and model.trains_embedding):
        return 0
    batch = Microbatch.of(model, layout, work)
    # A boolean is one byte.
    if model.shape.tokens:
        return batch.own_tokens * (INDEX + 1)
    return batch.tokens * (INDEX + 1) if layout.parallel.tp > 1 else 0


def head_input_needs_gradient(model: PlannedModel, layout: ParallelLayout) -> bool:
    """Whether backward goes on below the head: some layer has an adapter, or another stage is
    there to receive the gradient; or the last norm's weight is trained."""
    below = model.first_adapted < model.shape.num_layers or layout.parallel.pp > 1
    return below or model.trains(None, "decoder.final_layernorm")


def _input_needs_gradient(model: PlannedModel, chunk: Chunk, layer: int) -> bool:
    """True behind the first adapted layer, and everywhere on a stage that receives its input:
    Megatron asks for its gradient."""
    return layer > model.first_adapted or not chunk.has_embedding
