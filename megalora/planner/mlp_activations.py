"""Bytes that the MLP of one decoder layer keeps for backward: router, experts or dense MLP.

Symbols and what is assumed of a GPU as in ``activations.py``.
"""

from dataclasses import dataclass

from megalora.lora.spec import Adapted
from megalora.planner.layouts import ParallelLayout
from megalora.planner.magnitudes import dense_scaling, kept_for_scaling
from megalora.planner.microbatch import INT, STATISTIC, Microbatch
from megalora.planner.shared_factors import copied_elements
from megalora.planner.weights import PlannedModel, stacked_rank

INDEX = 8
"""Bytes of an int64, which ``torch.topk`` gives as an index."""


@dataclass(frozen=True)
class PlannedMLP:
    """The MLP of one decoder layer, and what is asked of it."""

    model: PlannedModel
    layout: ParallelLayout
    batch: Microbatch
    modules: dict[str, list[Adapted]]
    """Adapted projections of the layer, by Megatron module."""
    live: bool
    """Whether its input needs a gradient."""
    selective: bool
    """Whether the first product and the activation are computed again in backward."""
    trains_router: bool = False
    """Whether the router's own weight is trained."""

    def adapted(self, module: str) -> list[Adapted]:
        """Adapted projections of one module; empty where it has no adapter."""
        return self.modules.get(module, [])

    @property
    def has_dropout(self) -> bool:
        """Whether adapters read dropped-out copies of their inputs."""
        return self.model.has_dropout

    @property
    def adapts_experts(self) -> bool:
        """Whether routed experts have an adapter."""
        return bool(self.adapted("mlp.experts.gate_up") or self.adapted("mlp.experts.down"))

    def a_reads_input(self, adapted: list[Adapted]) -> bool:
        """Whether an adapter keeps its input itself; with dropout it keeps a copy."""
        return bool(adapted) and not self.has_dropout

    @property
    def norm_output_bytes(self) -> int:
        """(T / t) H e: the input of router, experts and dense MLP."""
        return self.batch.own_tokens * self.model.shape.hidden * self.batch.element_bytes

    @property
    def score_bytes(self) -> int:
        """Bytes of an element behind the router: a family that corrects its choice by a bias has
        products, scores and probabilities in float32."""
        return STATISTIC if self.model.shape.correction_bias else self.batch.element_bytes


def low_rank(adapted: list[Adapted], rows: int, out_features: int, e: int) -> int:
    """``add_low_rank``: h, rows R, and the stacked B, out R; both in the activations' dtype."""
    return (rows + out_features) * stacked_rank(adapted) * e


def mlp_bytes(mlp: PlannedMLP, is_moe: bool) -> int:
    """Kept by the MLP of one layer for one microbatch."""
    return _moe(mlp) if is_moe else _dense(mlp)


def _moe(mlp: PlannedMLP) -> int:
    """Router, both sorts, routed experts and the shared expert."""
    s = mlp.model.shape
    own = mlp.batch.own_tokens
    p = mlp.layout.parallel
    moved = p.ep * p.etp > 1
    router = mlp.adapted("mlp.router")
    total = low_rank(router, own, s.num_experts, mlp.score_bytes)
    # With an adapter on the router, or a trained weight, probabilities need a gradient though the
    # layer's input does not: so does all that they weight.
    live_router = mlp.live or bool(router) or mlp.trains_router
    if live_router:
        total += _routing(mlp, moved)
    # Copies of what experts share are made before the experts' node, and kept for it. With dropout
    # the scaled B's stand for them, unless all of it is recomputed.
    copied = copied_elements(mlp.model, p, mlp.adapted("mlp.experts.gate_up"))
    if mlp.selective or not mlp.has_dropout:
        copied += copied_elements(mlp.model, p, mlp.adapted("mlp.experts.down"))
    total += copied * mlp.batch.element_bytes
    # Experts without an adapter are one node in any case.
    if mlp.has_dropout and mlp.adapts_experts:
        total += experts_bytes_with_dropout(mlp, live_router)
    else:
        total += experts_bytes(mlp, live_router)

    # The norm's output is kept once, for whichever of the three reads it in backward. Recomputing
    # gate_up needs the experts' input wherever backward passes SwiGLU; behind an all-to-all the
    # experts keep the rows that it delivered instead.
    gate_up = mlp.adapted("mlp.experts.gate_up")
    experts_are_live = live_router or mlp.adapts_experts
    experts_keep_x = mlp.a_reads_input(gate_up) or (mlp.selective and experts_are_live)
    has_shared = bool(s.shared_intermediate)
    shared_is_live = mlp.live or any(name.startswith("mlp.shared_experts") for name in mlp.modules)
    fc1 = mlp.adapted("mlp.shared_experts.linear_fc1")
    shared_keeps_x = has_shared and (mlp.a_reads_input(fc1) or (mlp.selective and shared_is_live))
    router_keeps_x = mlp.a_reads_input(router) or mlp.trains_router
    if router_keeps_x or (experts_keep_x and not moved) or shared_keeps_x:
        total += mlp.norm_output_bytes
    if router and mlp.has_dropout:
        total += mlp.batch.dropped(own * s.hidden, mlp.live)
    if has_shared and shared_is_live:
        total += _shared_expert(mlp)
    return total


def _shared_expert(mlp: PlannedMLP) -> int:
    """A gated MLP over all tokens, and the gate of its output, if it has one."""
    s = mlp.model.shape
    total = _gated_mlp(mlp, "mlp.shared_experts", s.shared_intermediate)
    if s.shared_gate and not mlp.selective:
        # The output is multiplied by sigmoid(gate), of which each token keeps one. The gate is
        # frozen: the output is kept for the gradient of the gate's input alone.
        own = mlp.batch.own_tokens
        total += s.shared_gate * own * (s.hidden * mlp.live + 1) * mlp.batch.element_bytes
    return total


def _routing(mlp: PlannedMLP, moved: bool) -> int:
    """Top-k: an int64 index for each of the (T / t) k choices, a float32 softmax over the choices
    (over all experts where probabilities are not normed again, as in Qwen2-MoE). Where
    probabilities went: an int32 index, and one that the experts keep as well; with an all-to-all
    that one belongs to the pairs before it, and the M pairs that it delivered have one more. For
    the loss that keeps experts evenly used two more scores of every expert."""
    s = mlp.model.shape
    own = mlp.batch.own_tokens
    choices = own * s.top_k
    if s.correction_bias:
        # Sigmoids of all experts, those of the chosen ones and their sum.
        scores = own * (s.num_experts + s.top_k + 1) * STATISTIC
        # The weight is widened to float32, and kept for the gradient of the router's input.
        if mlp.live and mlp.batch.element_bytes < STATISTIC:
            scores += s.num_experts * s.hidden * STATISTIC
    elif s.softmax_over_all:
        scores = own * s.num_experts * STATISTIC
    else:
        scores = choices * STATISTIC
    if mlp.batch.balanced:
        # Scores over all experts, and what each is multiplied by; sigmoids have a sum.
        scores += own * (2 * s.num_experts + s.correction_bias) * STATISTIC
    kept = choices * (INDEX + INT) + scores
    if moved:
        kept += choices * INT + mlp.batch.rows * INT
    return kept


def experts_bytes(mlp: PlannedMLP, live: bool) -> int:
    """``expert_mlp``: rows as an all-to-all delivered them N H e (without one they are the norm's
    output), [gate | up] M 2 I / n e unless recomputed, S of gate and up and of down M (R + r) e,
    probabilities M e, an int32 a row, slots N min(k, E / ep) and E / ep offsets. DoRA keeps u of
    gate_up in place of [gate | up], and a float32 factor for each row of E / ep experts'
    weights. With an all-to-all also which tokens were sent and which rows a token's results are
    summed from: (T / t) min(k, ep) int32 each.

    ``live``: whether the rows or their probabilities need a gradient.
    """
    s = mlp.model.shape
    p = mlp.layout.parallel
    gate_up = mlp.adapted("mlp.experts.gate_up")
    down = mlp.adapted("mlp.experts.down")
    if not (live or gate_up or down):
        return 0
    per_row = stacked_rank(gate_up) + stacked_rank(down)
    if not mlp.selective:
        per_row += 2 * s.expert_intermediate // p.etp
    batch = mlp.batch
    local_experts = s.num_experts // p.ep
    total = batch.rows * (per_row * batch.element_bytes + mlp.score_bytes + INT)
    total += (batch.received * min(s.top_k, local_experts) + local_experts) * INT
    gates = 2 * s.expert_intermediate // p.etp
    for adapted, features in ((gate_up, gates), (down, s.hidden)):
        total += kept_for_scaling(adapted, local_experts * features)
    if p.ep * p.etp > 1:
        total += 2 * batch.own_tokens * min(s.top_k, p.ep) * INT
        # A's gradient reads the rows, and so does computing gate_up again.
        if gate_up or mlp.selective:
            total += batch.received * s.hidden * batch.element_bytes
    return total


def experts_bytes_with_dropout(mlp: PlannedMLP, live: bool) -> int:
    """The same where adapters read dropped-out inputs: not one node, but two grouped linears around
    SwiGLU (``megalora_kernels.dropout``).

    Copies of the permuted rows M H and of SwiGLU's result M I / n with their masks, S of both, the
    B's of all experts as one scaled matrix each E / ep (2 I / n R + H r) e; [gate | up] and
    probabilities for SwiGLU; indexes as before. Recomputed: the input and the probabilities alone.
    """
    s = mlp.model.shape
    p = mlp.layout.parallel
    batch = mlp.batch
    e = batch.element_bytes
    gate_up = mlp.adapted("mlp.experts.gate_up")
    down = mlp.adapted("mlp.experts.down")
    local_experts = s.num_experts // p.ep
    features = s.expert_intermediate // p.etp
    moved = p.ep * p.etp > 1
    total = batch.rows * INT + (batch.received * min(s.top_k, local_experts) + local_experts) * INT
    if moved:
        total += 2 * batch.own_tokens * min(s.top_k, p.ep) * INT
    if mlp.selective:
        total += batch.rows * mlp.score_bytes
        # Without an all-to-all the input is the norm's output, which is counted once for all.
        return total + moved * batch.received * s.hidden * e
    passes_swiglu = live or bool(gate_up)
    if gate_up:
        total += batch.dropped(batch.rows * s.hidden, mlp.live)
        total += low_rank(gate_up, batch.rows, local_experts * 2 * features, e)
    if passes_swiglu:
        total += batch.rows * (2 * features * e + mlp.score_bytes)
    if down:
        total += batch.dropped(batch.rows * features, passes_swiglu)
        total += low_rank(down, batch.rows, local_experts * s.hidden, e)
    return total


def _dense(mlp: PlannedMLP) -> int:
    """The MLP of a layer without experts, and its input where backward reads it."""
    fc1 = mlp.adapted("mlp.linear_fc1")
    fc2 = mlp.adapted("mlp.linear_fc2")
    total = _gated_mlp(mlp, "mlp", mlp.model.shape.intermediate)
    # fc1's A needs the input for its gradient; recomputing starts from it.
    if mlp.a_reads_input(fc1) or (mlp.selective and (mlp.live or fc1 or fc2)):
        total += mlp.norm_output_bytes
    return total


def _gated_mlp(mlp: PlannedMLP, name: str, intermediate: int) -> int:
    """fc1, silu(gate) * up, fc2, input left out: fc1's output T 2 I / t e, both factors T 2 I / t e
    (Megatron's glu makes new ones), the product T I / t e where fc2 is adapted, and what the
    adapters keep. Nothing when recomputed. With dropout a copy of the product, and one of fc1's
    input (T / t) H, with their masks."""
    if mlp.selective:
        return 0
    fc1 = mlp.adapted(f"{name}.linear_fc1")
    fc2 = mlp.adapted(f"{name}.linear_fc2")
    batch = mlp.batch
    e = batch.element_bytes
    features = intermediate // mlp.layout.parallel.tp
    # fc1 computes all tokens on this rank's features, fc2's adapter its own tokens in full width.
    total = low_rank(fc1, batch.tokens, 2 * features, e)
    total += low_rank(fc2, batch.own_tokens, mlp.model.shape.hidden, e)
    total += dense_scaling(fc1, batch.tokens, 2 * features, e)
    total += dense_scaling(fc2, batch.own_tokens, mlp.model.shape.hidden, e)
    if fc1 and mlp.has_dropout:
        total += batch.dropped(batch.own_tokens * mlp.model.shape.hidden, mlp.live)
    product_is_live = mlp.live or bool(fc1)
    if fc2:
        total += batch.dropped(batch.tokens * features, mlp.has_dropout and product_is_live)
    if product_is_live:
        total += batch.tokens * 4 * features * e
    return total
