"""Count the bytes of a model's end: what the output layer and the loss keep for backward, and what
is there beside it for a while.

Symbols as in ``activations.py``; V vocabulary, C tokens of a chunk, or scores of a head.
"""

from megalora.model.head_chunk import CHUNK_BYTES, bytes_per_logit, chunk_tokens
from megalora.planner.activations import head_input_needs_gradient
from megalora.planner.layouts import ParallelLayout
from megalora.planner.microbatch import STATISTIC, Microbatch
from megalora.planner.mlp_activations import INDEX, low_rank
from megalora.planner.teacher_bytes import logits_beside_teacher
from megalora.planner.weights import Chunk, PlannedModel, stacked_rank
from megalora.planner.workload import Workload


def head_bytes(model: PlannedModel, layout: ParallelLayout, work: Workload) -> int:
    """Kept by final norm, output layer and loss for one microbatch, of which every token is taken
    for a target.

    Norm (T / t) (H e + 4), unless the head alone is adapted; per token an int64 target and the
    int64 place of its row; of a frozen head the gradient that forward makes, T H e. Of one with an
    adapter x before (or its dropped-out copy) and after tokens are selected, h, B and three float32
    results; of one that is trained x after, the results, and K rows where these alone are trained.
    """
    if model.shape.num_scores:
        return _score_head_bytes(model, layout, work)
    batch = Microbatch.of(model, layout, work)
    s = model.shape
    e = batch.element_bytes
    vocab = s.vocab // layout.parallel.tp
    head = model.modules_of(None).get("output_layer", [])
    total = batch.tokens * (s.hidden * e + 2 * INDEX)
    live = head_input_needs_gradient(model, layout)
    if live:
        total += batch.own_tokens * (s.hidden * e + STATISTIC)
    if head:
        total += batch.dropped(batch.own_tokens * s.hidden, live and model.has_dropout)
        total += low_rank(head, batch.tokens, vocab, e)
        total += batch.tokens * 3 * STATISTIC
    elif work.teacher is not None:
        # x in place of the gradient, which backward makes; distance and log-probability.
        total += batch.tokens * 2 * STATISTIC
    elif head_is_trained(model):
        # Those of the rank with all of them in its part of the vocabulary.
        total += batch.tokens * 3 * STATISTIC + len(s.tokens) * s.hidden * e
    return total


def head_is_trained(model: PlannedModel) -> bool:
    """Whether lm_head's weight is trained, or the embedding that it is tied to, or rows of it."""
    if model.shape.num_scores:
        return False
    tied = any(weight.tied for weight in model.whole.get(None, []))
    return tied or model.trains(None, "output_layer")


def head_gradient_bytes(
    model: PlannedModel, layout: ParallelLayout, work: Workload, chunk: Chunk
) -> int:
    """What a tied embedding's gradient takes from the head's backward to the embedding's, where
    both are in one chunk and add up to one: V / t H, or K H of trained rows."""
    if not (head_is_trained(model) and chunk.has_head and chunk.has_embedding):
        return 0
    s = model.shape
    if not s.tied_embeddings:
        return 0
    rows = len(s.tokens) or s.vocab // layout.parallel.tp
    return rows * s.hidden * work.element_bytes


def embedding_backward_bytes(
    model: PlannedModel, layout: ParallelLayout, work: Workload, chunk: Chunk
) -> int:
    """Of a trained embedding: gradients of its output T H and of its weight V / t H, or of K rows
    that are trained alone; over TP the former is copied once to leave out others' tokens."""
    s = model.shape
    if not (chunk.has_embedding and model.trains_embedding):
        return 0
    batch = Microbatch.of(model, layout, work)
    if s.tokens:
        rows = 2 * batch.own_tokens + len(s.tokens)
    else:
        rows = batch.tokens + max(s.vocab // layout.parallel.tp, batch.tokens)
    return rows * s.hidden * batch.element_bytes


def logits_bytes(model: PlannedModel, layout: ParallelLayout, work: Workload, chunk: Chunk) -> int:
    """Beside what the loss keeps with lm_head, the larger of

    forward: logits of a chunk of tokens, C V / t e on a GPU; on the CPU in float32, and with
        bfloat16 once more before they are widened, C V / t (4 + 2); x after tokens are selected, T
        H, unless an adapter's head keeps it; the head's input (T / t) H; and the embedding's
        output, if on this stage, which ``forward`` still holds (recomputing whole layers keeps it
        anyway);
    backward of an adapter's head: the same chunk, computed again, with gradients of x and h, T (H +
        R), and of B, V / t R, in float32 and once more rounded;
    backward of one that is trained: the same of x and of the weight, V / t H, in float32 and a
        chunk's part of it; of trained rows K H, and the chunk's gradient of x in three parts.
    """
    if model.shape.num_scores:
        return _scores_bytes(model, layout, work, chunk)
    if work.teacher is not None:
        return logits_beside_teacher(model, layout, work, chunk)
    batch = Microbatch.of(model, layout, work)
    s = model.shape
    e = batch.element_bytes
    vocab = s.vocab // layout.parallel.tp
    width = bytes_per_logit(e, by_kernel=not work.on_cpu)
    size = min(batch.tokens, chunk_tokens(CHUNK_BYTES, vocab, width))
    # Widening float32 makes no second tensor.
    at_once = STATISTIC if work.on_cpu and work.dtype == "float32" else width
    logits = size * vocab * at_once
    head = model.modules_of(None).get("output_layer", [])
    own = batch.own_tokens * s.hidden * e
    forward = logits + own
    # pp = 1: the embedding's output is still referenced when the loss is computed.
    if chunk.has_embedding and not chunk.levels(layout.recompute)[0]:
        forward += own
    if head_is_trained(model):
        live = head_input_needs_gradient(model, layout)
        sums = (len(s.tokens) or vocab) * s.hidden * STATISTIC
        sums += live * batch.tokens * s.hidden * e
        # The chunk's gradient of x, made when its part of the weight's is gone, may be larger.
        parts = max(vocab, size) * s.hidden * e
        if s.tokens:
            parts = (len(s.tokens) + 3 * size) * s.hidden * e
        # By then the logits' gradient is there alone, in the model's dtype.
        return max(forward, sums + max(logits, size * vocab * e + parts))
    if not head:
        return forward + batch.tokens * s.hidden * e
    rank = stacked_rank(head)
    backward = logits + batch.tokens * (s.hidden + rank) * e + vocab * rank * (STATISTIC + e)
    return max(forward, backward)


def _score_head_bytes(model: PlannedModel, layout: ParallelLayout, work: Workload) -> int:
    """Kept by final norm and score head: the norm's input and rms (T / t) (H e + 4), unless nothing
    below is adapted, and its output (T / t) H e, for the gradient of the head's weight. The loss
    keeps a few numbers of each sequence, which are not counted."""
    batch = Microbatch.of(model, layout, work)
    hidden = batch.own_tokens * model.shape.hidden * batch.element_bytes
    if not head_input_needs_gradient(model, layout):
        return hidden
    return 2 * hidden + batch.own_tokens * STATISTIC


def _scores_bytes(model: PlannedModel, layout: ParallelLayout, work: Workload, chunk: Chunk) -> int:
    """``logits_bytes`` of a score head with C scores, the larger of

    forward: scores of the rank's tokens (T / t) C, with bfloat16 once more in float32, and of all
        tokens T C in float32; and the embedding's output, if on this stage;
    backward: gradients of the same, of the head's input (T / t) H and of its weight C H.
    """
    batch = Microbatch.of(model, layout, work)
    s = model.shape
    e = batch.element_bytes
    scores = batch.own_tokens * s.num_scores * e
    # float32 scores are their own wide form.
    if work.dtype != "float32":
        scores += batch.own_tokens * s.num_scores * STATISTIC
    # Where TP has one rank, nothing is gathered.
    if layout.parallel.tp > 1:
        scores += batch.tokens * s.num_scores * STATISTIC
    own = batch.own_tokens * s.hidden * e
    backward = scores + own + s.num_scores * s.hidden * e
    # pp = 1: as with lm_head, the embedding's output is still referenced.
    if chunk.has_embedding and not chunk.levels(layout.recompute)[0]:
        return max(scores + own, backward)
    return max(scores, backward)
