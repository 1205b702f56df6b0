"""Count what backward of routed experts adds where their adapters read dropped-out inputs.

They are two grouped linears around SwiGLU then (``megalora_kernels.dropout``), and not one node.
Symbols as in ``activations.py``.
"""

from megalora.config import Level
from megalora.planner.layouts import ParallelLayout
from megalora.planner.microbatch import Microbatch
from megalora.planner.mlp_activations import PlannedMLP, experts_bytes_with_dropout
from megalora.planner.weights import PlannedModel, stacked_rank


def experts_have_dropout(model: PlannedModel, layer: int) -> bool:
    """Whether a layer's experts are computed this way. Without an adapter they are one node in any
    case."""
    modules = model.modules_of(layer)
    adapted = modules.get("mlp.experts.gate_up") or modules.get("mlp.experts.down")
    return model.has_dropout and bool(adapted)


def experts_backward_with_dropout(
    model: PlannedModel, layout: ParallelLayout, batch: Microbatch, layer: int, level: Level
) -> tuple[int, int, int]:
    """(workspace, what recomputation brings back, all-to-all), as ``pass_bytes`` has them of
    experts without dropout. Workspace: the layer's output or its gradient (T / t) H, and the most
    of forward, run again or of the last layer, and of backward."""
    modules = model.modules_of(layer)
    kept = []
    for selective in (False, True):
        mlp = PlannedMLP(model, layout, batch, modules, live=True, selective=selective)
        kept.append(experts_bytes_with_dropout(mlp, live=True))
    output = batch.own_tokens * model.shape.hidden * batch.element_bytes
    forward = _in_forward(model, layout, batch, level)
    backward = _in_backward(model, layout, batch, layer)
    return output + max(forward, backward), kept[0] - kept[1], 0


def _in_forward(
    model: PlannedModel, layout: ParallelLayout, batch: Microbatch, level: Level
) -> int:  # fmt: skip
    """While rows are summed: those that down gave M H and its input M I / n, their sum for each
    token and, in torch's form, the term that is added 2 (T / t) H, the norm's output (T / t) H;
    behind an all-to-all sums of the N received rows, these rows themselves and those that were
    sent.

    Selective recomputation starts behind the all-to-all: the norm's output is not there, or kept,
    and in place of the sent rows the gradient of the sums.
    """
    p = layout.parallel
    h = model.shape.hidden
    elements = batch.rows * (h + model.shape.expert_intermediate // p.etp)
    # The norm's output, which selective recomputation does not need.
    if level != "selective":
        elements += batch.own_tokens * h
    if p.ep * p.etp > 1:
        others = batch.received if level == "selective" else batch.sent
        elements += (3 * batch.received + others) * h
    else:
        elements += 2 * batch.own_tokens * h
    return elements * batch.element_bytes


def _in_backward(
    model: PlannedModel, layout: ParallelLayout, batch: Microbatch, layer: int
) -> int:  # fmt: skip
    """The larger of

    down: gradients of its rows M H and of SwiGLU's result, from the base and from A 2 M I / n, of
        S M r and of the factors.
    gate_up: gradients of [gate | up] M 2 I / n, of the rows, from the base and from A 2 M H, of S M
        R and of the factors; less what down and SwiGLU kept, which is gone by then.
    """
    s = model.shape
    modules = model.modules_of(layer)
    gate_up = stacked_rank(modules.get("mlp.experts.gate_up", []))
    down = stacked_rank(modules.get("mlp.experts.down", []))
    e = batch.element_bytes
    rows = batch.rows
    h = s.hidden
    i = s.expert_intermediate // layout.parallel.etp
    experts = s.num_experts // layout.parallel.ep
    # Without an adapter no gradient comes from an A.
    of_down = rows * (h + i)
    gone = rows * (2 * i * e + e)
    if down:
        of_down += rows * (i + down) + experts * (h + i) * down
        gone += batch.dropped(rows * i, True) + (rows + experts * h) * down * e
    of_gate_up = rows * (2 * i + h)
    if gate_up:
        of_gate_up += rows * (h + gate_up) + experts * (2 * i + h) * gate_up
    return max(of_down * e, of_gate_up * e - gone)
