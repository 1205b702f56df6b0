"""Count the bytes that a teacher adds to a rank: its weights and its pass where it is a second
model, the states that the pass leaves, and its logits beside the model's.

Symbols as in ``activations.py``, of the teacher where a t stands below them; V vocabulary, C tokens
of a chunk, K tokens of a file.
"""

from dataclasses import replace

from megalora.model.head_chunk import CHUNK_BYTES_BESIDE_TEACHER, chunk_tokens
from megalora.model.second_model import cut_second
from megalora.planner.layouts import ParallelLayout
from megalora.planner.microbatch import INT, STATISTIC, Microbatch
from megalora.planner.mlp_activations import INDEX
from megalora.planner.teacher import PlannedTeacher
from megalora.planner.weights import (
    Chunk,
    PlannedModel,
    attention_widths,
    base_parameters,
    stacked_rank,
    stage_chunks,
)
from megalora.planner.workload import Workload

TENSORS_OF_CHUNK = {"forward": (7, 7), "reverse": (7, 7), "jsd": (8, 11)}
"""Distance from a model -> float32 tensors [C, V / t] that are there at once in forward and in
backward: both models' logits and log-probabilities, and terms of the sums."""
TENSORS_OF_FILE = (2, 5)
"""The same of the distance from the tokens of a file, whose logits of other tokens are a copy."""


def second_layout(teacher: PlannedTeacher, layout: ParallelLayout) -> ParallelLayout:
    """How the second model runs beside the first; nothing of it is recomputed."""
    assert teacher.shape is not None, f"{teacher.name} is no second model"
    cut = cut_second(layout.parallel, teacher.shape, teacher.name)
    return replace(layout, parallel=cut, recompute="off")


def weight_bytes(layout: ParallelLayout, work: Workload, stage: int) -> int:
    """Frozen weights of a second model on a rank of this stage."""
    teacher = work.teacher
    if teacher is None or teacher.model is None:
        return 0
    p = second_layout(teacher, layout).parallel
    total = 0
    for chunk in stage_chunks(teacher.model, p, stage):
        total += base_parameters(teacher.model.shape, p, chunk)
    return total * work.element_bytes


def state_bytes(
    model: PlannedModel, layout: ParallelLayout, work: Workload, chunks: list[Chunk]
) -> int:
    """What a teacher's pass leaves for the step's own: on the last stage, of all microbatches, last
    hidden states of every token T H_t e; or what a file gives: K tokens and logarithms of
    probabilities, and that of the rest, each as it travels and as it is read. Chunks of a second
    model keep the last input (T / t) H_t that they received."""
    teacher = work.teacher
    if teacher is None:
        return 0
    batch = Microbatch.of(model, layout, work)
    received = 0
    if teacher.shape is not None:
        number = len(chunks) - chunks[0].has_embedding
        received = number * batch.own_tokens * teacher.shape.hidden * batch.element_bytes
    if not chunks[-1].has_head:
        return received
    if teacher.top:
        token = teacher.top * (INT + INDEX) + (teacher.top + 1) * (INT + STATISTIC)
    else:
        shape = teacher.shape or model.shape
        token = shape.hidden * batch.element_bytes
    return received + layout.num_microbatches(work) * batch.tokens * token


def pass_bytes(layout: ParallelLayout, work: Workload, chunks: list[Chunk], states: int) -> int:
    """Most that a second model's forward pass needs beside its weights, in the layer that needs
    most of its last microbatch, with the states of those before it; nothing is kept for backward.

    Beside a layer's parts a table of angles, its input, the norm's output and, on the first stage,
    the embedding's output, (T / t) H_t each; in the MLP also what attention made of the input.

    Args:
        chunks: those of the model in training on this stage.
        states: what ``state_bytes`` says.
    """
    teacher = work.teacher
    if teacher is None or teacher.model is None:
        return 0
    beside = second_layout(teacher, layout)
    model = teacher.model
    batch = Microbatch.of(model, beside, _alone(work))
    own = batch.own_tokens * model.shape.hidden
    table = batch.tokens * model.shape.turned_features * STATISTIC
    common = own * (2 + chunks[0].has_embedding)
    most = 0
    for chunk in stage_chunks(model, beside.parallel, chunks[0].stage):
        for layer in {model.kinds[n] for n in chunk.layers}:
            most = max(most, _attention(model, beside, batch), _mlp(model, beside, batch, layer))
    before = 0
    if chunks[-1].has_head:
        number = layout.num_microbatches(work)
        before = states * (number - 1) // number
    return before + (common + most) * batch.element_bytes + table


def _alone(work: Workload) -> Workload:
    """The same samples without what belongs to the model in training."""
    return replace(work, teacher=None, references=0, balanced=False)


def _attention(model: PlannedModel, layout: ParallelLayout, batch: Microbatch) -> int:
    """Elements: the output of qkv T (q + 2 g) d, k normed T g d, and q normed, its halves changed
    places, and the products with cosine and sine T 4 q d. Composed of operations; one kernel for
    rotary embeddings would need less."""
    width, kv = attention_widths(model.shape, layout.parallel)
    return batch.tokens * (5 * width + 3 * kv + 2 * model.shape.turned_features)


def _mlp(model: PlannedModel, layout: ParallelLayout, batch: Microbatch, layer: int) -> int:
    """Elements: what attention made (T / t) H; [gate | up], silu(gate), up and the product, T 5 I /
    t. Of experts [gate | up] and the product M 3 I / n, the rows M H, their sum and what is added
    to it 2 (T / t) H; behind an all-to-all these two are of the N received rows, which are there
    beside the rows that were sent."""
    s = model.shape
    own = batch.own_tokens * s.hidden
    if not s.is_moe(layer):
        return own + batch.tokens * 5 * (s.intermediate // layout.parallel.tp)
    inner = s.expert_intermediate // layout.parallel.etp
    elements = batch.rows * (3 * inner + s.hidden)
    if layout.parallel.ep * layout.parallel.etp > 1:
        return elements + own + (batch.sent + 3 * batch.received) * s.hidden
    return elements + 3 * own


def logits_beside_teacher(
    model: PlannedModel, layout: ParallelLayout, work: Workload, chunk: Chunk
) -> int:
    """``head_bytes.logits_bytes`` of the head's general path, the larger of

    forward: tensors of a chunk, C V / t 4 each, the head's input (T / t) H and, if on this stage,
        the embedding's output;
    backward: more such tensors, and gradients of x T H, of h and B of an adapter.
    """
    teacher = work.teacher
    assert teacher is not None, "nobody's logits stand beside the model's"
    batch = Microbatch.of(model, layout, work)
    s = model.shape
    e = batch.element_bytes
    vocab = s.vocab // layout.parallel.tp
    size = chunk_tokens(CHUNK_BYTES_BESIDE_TEACHER, vocab, 4 * STATISTIC + e)
    of_chunk = min(batch.tokens, size) * vocab
    there, back = TENSORS_OF_FILE if teacher.top else TENSORS_OF_CHUNK[teacher.divergence]
    # A copy that a temperature divides is kept for backward; of a second model forward's is gone
    # by the time that most is there.
    back += teacher.is_scaled
    there += teacher.is_scaled and bool(teacher.top)
    listed = of_chunk if teacher.top else 0
    own = batch.own_tokens * s.hidden * e
    forward = there * of_chunk * STATISTIC + listed + own
    if chunk.has_embedding and not chunk.levels(layout.recompute)[0]:
        forward += own
    backward = back * of_chunk * STATISTIC + listed + batch.tokens * s.hidden * e
    head = model.modules_of(None).get("output_layer", [])
    if head:
        rank = stacked_rank(head)
        # B's gradient is added up in float32, chunk by chunk.
        backward += batch.tokens * rank * e + vocab * rank * (STATISTIC + e)
    return max(forward, backward)
