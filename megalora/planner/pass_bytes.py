"""Count the bytes that forward and backward of a pipeline stage add to what a rank always holds.

Symbols as in ``activations.py``.
"""

import math
from dataclasses import dataclass

from megalora.config import Level, ParallelConfig
from megalora.lora.spec import has_magnitudes
from megalora.planner import activations
from megalora.planner.dropout_backward import experts_backward_with_dropout, experts_have_dropout
from megalora.planner.head_bytes import (
    embedding_backward_bytes,
    head_bytes,
    head_gradient_bytes,
    logits_bytes,
)
from megalora.planner.layouts import ParallelLayout
from megalora.planner.microbatch import INT, Microbatch
from megalora.planner.mlp_activations import INDEX
from megalora.planner.schedule import Counts, held_in_backward, in_flight
from megalora.planner.state_bytes import has_room
from megalora.planner.weights import (
    Chunk,
    PlannedModel,
    attention_widths,
    content_of,
    stacked_rank,
)
from megalora.planner.workload import Workload


@dataclass(frozen=True)
class ChunkBytes:
    """What a model chunk adds to a rank's memory while it runs."""

    kept: int
    """Kept for backward for one microbatch: by its layers, and rotary angles that its recomputed
    ones share."""
    backward: tuple[int, int, int]
    """(workspace, what recomputation brings back, all-to-all) of the layer whose backward needs
    most."""


def of_chunks(
    model: PlannedModel, layout: ParallelLayout, work: Workload, chunks: list[Chunk]
) -> list[ChunkBytes]:
    """Bytes of every chunk of a stage."""
    # Most chunks of all layouts that cut layers alike hold the same; of many numbers of recomputed
    # layers each changes few.
    known = model.memo.setdefault(("chunk", layout.cut(work)), {})
    found = []
    for chunk in chunks:
        key = (content_of(model, chunk), chunk.levels(layout.recompute))
        if key not in known:
            kept = activations.bytes_by_layer(model, layout, work, chunk)
            known[key] = ChunkBytes(
                sum(kept)
                + activations.angles_bytes(model, layout, work, chunk)
                + activations.embedding_bytes(model, layout, work, chunk),
                _chunk_backward(model, layout, work, chunk, kept),
            )
        found.append(known[key])
    return found


def activation_bytes(
    layout: ParallelLayout, work: Workload, chunks: list[Chunk], found: list[ChunkBytes]
) -> int:
    """What the decoder layers keep for one microbatch, times the microbatches in flight, chunk by
    chunk."""
    held = in_flight(*_place(layout, work, chunks))
    return _most(found, held)


def _place(
    layout: ParallelLayout, work: Workload, chunks: list[Chunk]
) -> tuple[ParallelConfig, int, int]:
    """(sizes, stage, microbatches), by which a schedule is known."""
    return layout.parallel, chunks[0].stage, layout.num_microbatches(work)


def _most(found: list[ChunkBytes], held: tuple[Counts, ...]) -> int:
    """Bytes kept for the microbatches that are held. Chunks of a stage may keep different amounts:
    of the candidates the largest in bytes counts."""
    kept = [chunk.kept for chunk in found]
    most = 0
    for counts in held:
        most = max(most, int(math.sumprod(counts, kept)))
    return most


def row_bytes(
    model: PlannedModel, layout: ParallelLayout, work: Workload, chunks: list[Chunk]
) -> int:
    """Rows of all microbatches of a step, which are brought to the device at once: of each of this
    rank's tokens its position, on the first stage its id, on the last one its label and, as each is
    taken for a target, its place; all of them as int32 in the copy that travels and as int64. A
    score head reads one token of a sequence, which is not worth counting."""
    batch = Microbatch.of(model, layout, work)
    columns = 1 + chunks[0].has_embedding
    if chunks[-1].has_head and not model.shape.num_scores:
        columns += 2
    token = columns * (INT + INDEX)
    return layout.num_microbatches(work) * batch.tokens * token


def pipeline_bytes(model: PlannedModel, layout: ParallelLayout, work: Workload, stage: int) -> int:
    """Of size (T / t) H: the gradient sent for the microbatch before, which every stage but the
    first still holds; interleaved also inputs and gradients that came ahead of their turn, one on
    the first stage, three on the others (at most: with chunks of unequal size the peak may come
    while none is ahead). Inputs of microbatches in flight count as activations; outputs are freed
    once sent."""
    batch = Microbatch.of(model, layout, work)
    number = 0 if stage == 0 else 1
    # Interleaved, messages come a round ahead of the pass that needs them.
    if layout.parallel.vpp > 1:
        number += 1 if stage == 0 else 3
    return number * batch.own_tokens * model.shape.hidden * batch.element_bytes


def loss_bytes(
    model: PlannedModel,
    layout: ParallelLayout,
    work: Workload,
    chunks: list[Chunk],
    found: list[ChunkBytes],
) -> tuple[int, int]:
    """(what the loss keeps, ``logits_bytes``) beside all that is kept at most; zeros on stages
    without the head, which is on the last chunk of the last one."""
    if not chunks[-1].has_head:
        return 0, 0
    loss = head_bytes(model, layout, work)
    logits = logits_bytes(model, layout, work, chunks[-1])
    if len(chunks) == 1:
        return loss, logits
    # The head's chunk runs backward right after its forward. Where it has fewer layers than the
    # others, more is held at other times.
    place = _place(layout, work, chunks)
    at_peak = _most(found, in_flight(*place))
    freed = at_peak - _most(found, held_in_backward(*place)[-1])
    _, loss_left, logits_left = _less((0, loss, logits), freed)
    return loss_left, logits_left


def backward_bytes(
    layout: ParallelLayout, work: Workload, chunks: list[Chunk], found: list[ChunkBytes]
) -> tuple[int, int, int]:
    """(workspace, what recomputation brings back, all-to-all) of the layer whose backward needs
    most beside all that is kept at most."""
    if len(found) == 1:
        return found[0].backward
    # While one chunk runs backward, fewer microbatches of the others may be held than at the peak.
    place = _place(layout, work, chunks)
    at_peak = _most(found, in_flight(*place))
    most = (0, 0, 0)
    # The last chunk first: many need the same, and it runs backward while most is held.
    for chunk, held in zip(reversed(found), reversed(held_in_backward(*place)), strict=True):
        if sum(chunk.backward) > sum(most):
            most = max(most, _less(chunk.backward, at_peak - _most(found, held)), key=sum)
    return most


def _chunk_backward(
    model: PlannedModel, layout: ParallelLayout, work: Workload, chunk: Chunk, kept: list[int]
) -> tuple[int, int, int]:
    """The same of one chunk, whose layers kept so many bytes for the microbatch.

    Backward goes from a chunk's last layer to its first: what the layers above kept is gone by a
    layer's turn, and makes room for what it needs. The gradient received from the next stage stays.
    """
    batch = Microbatch.of(model, layout, work)
    received = 0 if chunk.has_head else batch.own_tokens * model.shape.hidden * batch.element_bytes
    known = model.memo.setdefault(("backward", layout.cut(work)), {})
    num_full, rest = chunk.levels(layout.recompute)
    # The head's part of a tied embedding's gradient waits for the embedding's.
    waiting = head_gradient_bytes(model, layout, work, chunk)
    most = (0, 0, 0)
    seen: set[tuple[int, Level]] = set()
    freed = 0
    for i in reversed(range(len(kept))):
        layer = chunk.layers[i]
        # On the stage of the embedding, backward ends at the first layer with an adapter.
        if chunk.has_embedding and layer < model.first_adapted:
            break
        level = "full" if i < num_full else rest
        key = (model.kinds[layer], level)
        # Of layers alike the last one is first in backward, when least is freed.
        if key not in seen:
            seen.add(key)
            if key not in known:
                known[key] = _layer_backward(model, layout, work, layer, level)
            workspace, again, moved = known[key]
            workspace += waiting
            # The last layer counts it as the gradient of its output.
            if freed:
                workspace += received
            most = max(most, _less((workspace, again, moved), freed), key=sum)
        freed += kept[i]
    if chunk.has_embedding and model.trains_embedding:
        # The last thing that backward reaches.
        embedding = waiting + received + embedding_backward_bytes(model, layout, work, chunk)
        most = max(most, _less((embedding, 0, 0), freed), key=sum)
    return most


def _less(needs: tuple[int, int, int], freed: int) -> tuple[int, int, int]:
    """What is needed beyond bytes that have become free, which serve recomputation first."""
    workspace, again, moved = needs
    of_again = min(again, freed)
    of_workspace = min(workspace, freed - of_again)
    of_moved = min(moved, freed - of_again - of_workspace)
    return workspace - of_workspace, again - of_again, moved - of_moved


def _layer_backward(
    model: PlannedModel, layout: ParallelLayout, work: Workload, layer: int, level: Level
) -> tuple[int, int, int]:
    """The MLP's backward with all of the layer kept, or attention's, when what the MLP kept is
    gone.

    Attention: gradients of q, k, v, of qkv's output and of the result T (3 q + 4 g) d, of its input
        and of the layer's output (T + T / t) H.
    """
    s = model.shape
    batch = Microbatch.of(model, layout, work)
    width, kv = attention_widths(s, layout.parallel)
    e = batch.element_bytes
    own = batch.own_tokens
    attention = (batch.tokens * (3 * width + 4 * kv + s.hidden) + own * s.hidden) * e
    # What backward finds of the layer, and what of it was kept since forward.
    whole = activations.kept(model, layout, batch, layer, True, selective=False)
    held = whole
    if level == "selective":
        held = activations.kept(model, layout, batch, layer, True, selective=True)
    if experts_have_dropout(model, layer):
        mlp, again, moved = experts_backward_with_dropout(model, layout, batch, layer, level)
    elif s.is_moe(layer):
        mlp, again, moved = _experts_backward(model, layout, work, layer)
    else:
        mlp = _dense_backward(model, layout, batch, layer)
        again = whole.mlp - held.mlp
        moved = 0
    if level == "full":
        again = whole.total - own * s.hidden * e  # its input was kept
        # By attention's turn the MLP has let go of what was recomputed for it.
        return max((mlp, again, moved), (attention, again - whole.mlp, 0), key=sum)
    back = again if level == "selective" else 0
    # What the MLP kept counts as activations, and is free again when attention's turn comes.
    in_mlp = (mlp, back, moved)
    in_attention = (attention - held.mlp, whole.attention - held.attention, 0)
    return max(in_mlp, in_attention, key=sum)


def _experts_backward(
    model: PlannedModel, layout: ParallelLayout, work: Workload, layer: int
) -> tuple[int, int, int]:
    """While the rows' gradients are summed for each token: gradients of the layer's output and of
    the experts' input 2 (T / t) H, in torch's form the term that is added (T / t) H, the rows M H,
    of [gate | up] with its dS M (2 I / n + R), of the layer's factors. grouped_mm, which weights
    with room stand for, has more a moment before: the output's gradient gathered M H beside dH M I
    / n.

    Behind an all-to-all these are gradients of the N received rows instead of T / t tokens, and the
    gradient of the layer's output stays beside them. Recomputed: [gate | up], S.
    """
    s = model.shape
    p = layout.parallel
    batch = Microbatch.of(model, layout, work)
    e = batch.element_bytes
    own = batch.own_tokens * s.hidden
    received = batch.received * s.hidden
    rows = batch.rows
    i = s.expert_intermediate // p.etp
    modules = model.modules_of(layer)
    gate_up = modules.get("mlp.experts.gate_up", [])
    down = modules.get("mlp.experts.down", [])
    # With DoRA perhaps more before dX: dH, [gate | up] made again from u, the gradient of down's u.
    before = 0
    if has_magnitudes([*gate_up, *down]):
        before = i + 2 * i * has_magnitudes(gate_up) + s.hidden * has_magnitudes(down)
    rank = stacked_rank(gate_up)
    # The experts' input and the layer's output, as gradients; or, with grouped_mm, dH if larger.
    result = 2 * own
    if has_room(model, layout, work) and (gate_up or down):
        result = max(2 * own, rows * i)
    # Each factor's gradient once, in its parameter's dtype.
    factors = s.num_experts // p.ep * (s.hidden + i) * (rank + stacked_rank(down))
    workspace = own + rows * (max(s.hidden, before) + 2 * i + rank) + result + factors
    again = rows * (2 * i + rank)
    moved = 0
    if p.ep * p.etp > 1:
        moved = received + max(0, 2 * received - result)
    return workspace * e, again * e, moved * e


def _dense_backward(
    model: PlannedModel, layout: ParallelLayout, batch: Microbatch, layer: int
) -> int:
    """Gradients of the product, of its two factors T 3 I / t, and of the layer's output (T / t) H;
    by then the product itself is gone, which was kept if fc2 has an adapter.

    With dropout its copy and the mask are gone; but while forward runs, for the last layer or
    again, the product itself is there beside them, with the norm's output, the result and the
    gradient T I / t + 3 (T / t) H.
    """
    s = model.shape
    e = batch.element_bytes
    product = batch.tokens * (s.intermediate // layout.parallel.tp)
    own = batch.own_tokens * s.hidden
    backward = (3 * product + own) * e
    if not model.modules_of(layer).get("mlp.linear_fc2"):
        return backward
    backward -= batch.dropped(product, model.has_dropout)
    return max(backward, (product + 3 * own) * e) if model.has_dropout else backward
