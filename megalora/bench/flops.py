"""Count the FLOPs that training with LoRA costs per token, without and with recomputation.

    FLOPs per token = 4 P + 6 A + 2 W + 6 S h d L

P: frozen parameters a token is multiplied with (the embedding is looked up), 2 FLOPs each forward
    and 2 backward for the gradient of the input; their weights get none. A: adapter parameters it
    meets, 2 more for their own gradient. W: parameters of the base, among those of P, that are
    trained themselves and meet a token in a product: lm_head, routers. Trained rows of a tied
    embedding are a product of their own, and count with A. S h d L: causal attention over S tokens,
    h heads of width d, L layers: 2 S h d forward (half of the square, two products) and twice that
    backward; what a flash kernel computes again by itself is not counted.
"""

from dataclasses import dataclass

from megalora.config import Level, ParallelConfig, Recompute
from megalora.hf.tensor_names import SCORE
from megalora.lora.spec import Adapted
from megalora.lora.trained_weight import trained_weights
from megalora.model.shape import ModelShape
from megalora.planner.models import active_layer_parameters, active_parameters
from megalora.planner.weights import chunks_of

FORMULA = (
    "4 P + 6 A + 2 W + 6 S h d L FLOPs per token (P parameters of the base that it meets, W the"
    " trained ones of these, A adapter parameters; S h d L causal attention)"
)


@dataclass(frozen=True)
class TokenFlops:
    model: int
    """FLOPs by the formula, whatever is recomputed."""
    hardware: int
    """FLOPs including those of recomputation in backward."""


def flops_per_token(
    shape: ModelShape,
    adapted: list[Adapted],
    sequence_length: int,
    recompute: Recompute = "off",
    parallel: ParallelConfig | None = None,
) -> TokenFlops:
    """FLOPs per token of the whole model.

    Args:
        sequence_length: S, positions per sample; every sample is that long.
        recompute: a layer that is recomputed fully runs its whole forward again; selective computes
            core attention, gate_up of routed experts, and whole dense and shared MLPs again.
        parallel: which layers are a rank's first, where some are recomputed fully; None for one
            rank.
    """
    frozen = active_parameters(shape)
    if not shape.tied_embeddings:
        # The embedding is looked up; where it is tied, the same weight is the head, which counts.
        frozen -= shape.vocab * shape.hidden
    # A token is multiplied with both factors: A [rank, in], B [out, rank].
    adapters = sum(_met(a, shape) for a in adapted)
    whole = 0
    for weight in trained_weights(shape):
        # A score head, or rows whose logits are computed apart.
        if weight.module == SCORE or (weight.tokens and weight.tied):
            adapters += weight.num_parameters
        elif weight.is_router or weight.path == "output_layer" or weight.tied:
            whole += weight.num_parameters
        # Norms have no product, and an embedding that is not tied is looked up.
    attention = 2 * sequence_length * shape.num_heads * shape.head_dim
    # The gradient of attention's inputs costs twice its forward.
    # Frozen: forward and the input's gradient. Trained whole: their own gradient besides.
    model = 4 * frozen + 6 * adapters + 2 * whole + 3 * attention * shape.num_layers
    levels = _levels(shape, recompute, parallel or ParallelConfig())
    # Recomputation repeats forward's products, and none of backward's.
    again = 0
    for layer, level in enumerate(levels):
        # A forward is 2 FLOPs for each parameter.
        if level == "full":
            again += 2 * active_layer_parameters(shape, layer) + attention
        elif level == "selective":
            again += 2 * _selective(shape, layer) + attention
    for a in adapted:
        # The head, which is in no layer, is never computed again.
        level = "off" if a.layer is None else levels[a.layer]
        if level == "full" or (level == "selective" and _again(a)):
            again += 2 * _met(a, shape)
    return TokenFlops(model, model + again)


def _levels(shape: ModelShape, recompute: Recompute, p: ParallelConfig) -> list[Level]:
    """What each layer of the model recomputes."""
    found: dict[int, Level] = {}
    for stage in range(p.pp):
        for chunk in chunks_of(shape, p, stage):
            num_full, rest = chunk.levels(recompute)
            for i, layer in enumerate(chunk.layers):
                found[layer] = "full" if i < num_full else rest
    return [found[layer] for layer in range(shape.num_layers)]


def _met(a: Adapted, shape: ModelShape) -> int:
    """Adapter parameters of one token: of routed experts those it is sent to."""
    # A token meets the adapters of the experts that it is sent to, each with its own.
    copies = shape.top_k if a.num_experts else 1
    return copies * a.rank * (a.in_features + a.out_features)


def _selective(shape: ModelShape, layer: int) -> int:
    """Frozen parameters of a layer that ``selective`` multiplies a token with once more."""
    # Widths that meet the hidden size: gate and up of each chosen expert; gate, up and down of
    # shared experts and dense MLPs.
    width = 3 * shape.intermediate
    if shape.is_moe(layer):
        width = 2 * shape.top_k * shape.expert_intermediate + 3 * shape.shared_intermediate
    return shape.hidden * width


def _again(a: Adapted) -> bool:
    """Whether ``selective`` runs this adapter again: of experts those of gate and up, and all of
    dense and shared MLPs."""
    if a.projection.is_expert:
        return a.projection.kind == "expert_column"
    # Everything below ``mlp`` but the router is a dense or a shared MLP here.
    return ".mlp." in f".{a.projection.module}" and a.projection.kind != "router"
