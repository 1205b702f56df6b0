"""Have transformers' routers take the experts that they are given."""

from functools import partial
from typing import Any

from torch import Tensor

from tests.oracles.training import Oracle


def take_given_experts(oracle: Oracle) -> None:
    """From now on, the routers of the oracle's model take ``oracle.given`` where it is set."""
    blocks: list[Any] = []
    for module in oracle.model.modules():
        gate = getattr(module, "gate", None)
        # As in ``Oracle``: a dense MLP has a gate_proj.
        if hasattr(gate, "top_k") and hasattr(gate, "weight"):
            blocks.append(module)
    for place, block in enumerate(blocks):
        if hasattr(block, "route_tokens_to_experts"):
            # The router gives logits alone, and its block chooses.
            own = block.route_tokens_to_experts
            block.route_tokens_to_experts = partial(_by_sigmoid, oracle, place, block, own)
        else:
            block.gate.register_forward_hook(partial(_by_softmax, oracle, place))


def _by_softmax(oracle: Oracle, place: int, router: Any, _: Any, output: Any) -> Any:
    """(logits, weights, experts), as Qwen's, OLMoE's and Mixtral's routers return them."""
    if oracle.given is None:
        return output
    logits = output[0]
    experts = oracle.given[:, place]
    weights = logits.softmax(-1).gather(1, experts)
    # Mixtral's has no such option, and always does.
    if getattr(router, "norm_topk_prob", True):
        weights = weights / weights.sum(-1, keepdim=True)
    return logits, weights, experts


def _by_sigmoid(
    oracle: Oracle, place: int, block: Any, own: Any, logits: Tensor
) -> tuple[Tensor, Tensor]:
    """(experts, weights): DeepSeek-V3's, whose correction takes part in the choice alone."""
    if oracle.given is None:
        return own(logits)
    experts = oracle.given[:, place]
    weights = logits.sigmoid().gather(1, experts)
    if block.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    return experts, weights * block.routed_scaling_factor
