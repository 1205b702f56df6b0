"""Count the FLOPs that training with LoRA costs per token, without and with recomputation.

    FLOPs per token = 4 P + 6 A + 6 S h d L

P: frozen parameters a token is multiplied with (the embedding is looked up), 2 FLOPs each forward
    and 2 backward for the gradient of the input; their weights get none. A: adapter parameters it
    meets, 2 more for their own gradient. S h d L: causal attention over S tokens, h heads of width
    d, L layers: 2 S h d forward (half of the square, two products) and twice that backward; what a
    flash kernel computes again by itself is not counted.
"""

from dataclasses import dataclass

from megalora.lora.spec import Adapted
from megalora.model.shape import ModelShape
from megalora.planner.layouts import Recompute
from megalora.planner.models import active_parameters

FORMULA = (
    "4 P + 6 A + 6 S h d L FLOPs per token (P frozen, A adapter parameters it meets; S h d L causal"
    " attention)"
)


@dataclass(frozen=True)
class TokenFlops:
    model: int
    """FLOPs by the formula, whatever is recomputed."""
    hardware: int
    """FLOPs including those of recomputation in backward."""


def flops_per_token(
    shape: ModelShape, adapted: list[Adapted], sequence_length: int, recompute: Recompute = "off"
) -> TokenFlops:
    """FLOPs per token of the whole model, whatever the layout.

    Args:
        sequence_length: S, positions per sample; every sample is that long.
        recompute: full computes every layer's forward again (not the head's); selective computes
            core attention, gate_up of routed experts, and whole dense and shared MLPs again.
    """
    frozen = active_parameters(shape)
    if not shape.tied_embeddings:
        # The embedding is looked up; where it is tied, the same weight is the head, which counts.
        frozen -= shape.vocab * shape.hidden
    # A token is multiplied with both factors: A [rank, in], B [out, rank].
    adapters = sum(_met(a, shape) for a in adapted)
    attention = 2 * sequence_length * shape.num_heads * shape.head_dim * shape.num_layers
    # The gradient of attention's inputs costs twice its forward.
    model = 4 * frozen + 6 * adapters + 3 * attention
    if recompute == "off":
        return TokenFlops(model, model)
    if recompute == "full":
        weights = frozen - shape.vocab * shape.hidden
        again = [a for a in adapted if a.layer is not None]
    else:
        weights = _selective(shape)
        again = [a for a in adapted if _again(a)]
    # A forward is 2 FLOPs for each parameter.
    parameters = weights + sum(_met(a, shape) for a in again)
    return TokenFlops(model, model + 2 * parameters + attention)


def _met(a: Adapted, shape: ModelShape) -> int:
    """Adapter parameters of one token: of routed experts those it is sent to."""
    copies = shape.top_k if a.num_experts else 1
    return copies * a.rank * (a.in_features + a.out_features)


def _selective(shape: ModelShape) -> int:
    """Frozen parameters that ``selective`` multiplies a token with once more."""
    num_moe = len(shape.moe_layers)
    num_dense = shape.num_layers - num_moe
    # Widths that meet the hidden size: gate and up of each chosen expert; gate, up and down of
    # shared experts and dense MLPs.
    moe = 2 * shape.top_k * shape.expert_intermediate + 3 * shape.shared_intermediate
    dense = 3 * shape.intermediate
    return shape.hidden * (num_moe * moe + num_dense * dense)


def _again(a: Adapted) -> bool:
    """Whether ``selective`` runs this adapter again: of experts those of gate and up, and all of
    dense and shared MLPs."""
    if a.projection.is_expert:
        return a.projection.kind == "expert_column"
    # Everything below ``mlp`` but the router is a dense or a shared MLP here.
    return ".mlp." in f".{a.projection.module}" and a.projection.kind != "router"
