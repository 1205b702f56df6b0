"""FLOPs that a token of a model costs to train with LoRA, in total and with what is recomputed.

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
    """By the formula, whatever is recomputed."""
    hardware: int
    """With what is computed again in backward."""


def flops_per_token(
    shape: ModelShape, adapted: list[Adapted], sequence_length: int, recompute: Recompute = "off"
) -> TokenFlops:
    """Of the whole model, whatever the layout.

    Args:
        sequence_length: S, positions per sample; every sample is that long.
        recompute: full computes every layer's forward again (not the head's), selective core
            attention, gate_up of routed experts
            and whole dense and shared MLPs.
    """
    frozen = active_parameters(shape) - (0 if shape.tied_embeddings else shape.vocab * shape.hidden)
    adapters = sum(_met(a, shape) for a in adapted)
    attention = 2 * sequence_length * shape.num_heads * shape.head_dim * shape.num_layers
    model = 4 * frozen + 6 * adapters + 3 * attention
    if recompute == "off":
        return TokenFlops(model, model)
    if recompute == "full":
        head = shape.vocab * shape.hidden
        again = (
            2 * (frozen - head)
            + 2 * sum(_met(a, shape) for a in adapted if a.layer is not None)
            + attention
        )
    else:
        again = (
            2 * _selective(shape)
            + 2 * sum(_met(a, shape) for a in adapted if _again(a))
            + attention
        )
    return TokenFlops(model, model + again)


def _met(a: Adapted, shape: ModelShape) -> int:
    """Adapter parameters of one token: of routed experts those it is sent to."""
    return (shape.top_k if a.num_experts else 1) * a.rank * (a.in_features + a.out_features)


def _selective(shape: ModelShape) -> int:
    """Frozen parameters that ``selective`` multiplies a token with once more."""
    num_moe = len(shape.moe_layers)
    moe = 2 * shape.top_k * shape.expert_intermediate + 3 * shape.shared_intermediate
    return shape.hidden * (num_moe * moe + (shape.num_layers - num_moe) * 3 * shape.intermediate)


def _again(a: Adapted) -> bool:
    """Whether ``selective`` runs this adapter again: of experts those of gate and up, and all of
    dense and shared MLPs."""
    if a.projection.is_expert:
        return a.projection.kind == "expert_column"
    return ".mlp." in f".{a.projection.module}" and a.projection.kind != "router"
