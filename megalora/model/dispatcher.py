"""Dispatch tokens to experts, and leave sorting rows by expert to the kernels that read them.

Megatron's dispatcher writes each token k times, sorted by expert, before the experts run, and
copies counts to the host for it. Here the experts get rows as they are with a ``Routing`` that maps
rows to experts: without expert parallelism the hidden states themselves, gathered as they are read
and never written; with it the rows as the all-to-all delivered them.

    T  tokens of this rank      k  experts per token      M  rows of this rank's experts
    E  experts      H  hidden
"""

from functools import partial
from typing import Any

from megalora_kernels import Routing, permute, regroup_values, route_values, unpermute
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAlltoAllTokenDispatcher,
    MoETokenDispatcher,
)
from torch import Tensor

NOT_KEPT = (
    "moe_expert_capacity_factor", "moe_pad_expert_input_to_capacity",
    "moe_router_padding_for_quantization",
    "moe_shared_expert_overlap",
)  # fmt: skip
"""Settings of Megatron's own dispatchers that these do not implement."""


class LocalDispatcher(MoETokenDispatcher):
    """For a rank that holds all experts whole (EP = ETP = 1): nothing moves, and nothing waits for
    the device."""

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        self.hidden_shape = hidden_states.shape
        self.routing, values_M = route_values(routing_map, probs, self.config.moe_router_topk)
        return hidden_states.reshape(-1, self.hidden_shape[-1]), values_M

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        return hidden_states, probs

    def dispatch_postprocess(
        self, hidden_states: Tensor, probs: Tensor
    ) -> tuple[Tensor, Routing, Tensor]:
        return hidden_states, self.routing, probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        return hidden_states

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        return hidden_states

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.view(self.hidden_shape)


class AllToAllDispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron's all-to-all; both sorts around it are ours: by expert before it, and as a
    ``Routing`` behind it.

    Gradients of the sorts gather instead of scattering, so that they add up in the same order on
    every run.
    """

    def preprocess(self, routing_map: Tensor) -> Tensor:
        counts_E = super().preprocess(routing_map)
        # [ranks that send, experts of this rank], before Megatron moves it to the host. With one
        # expert per rank it has none.
        if self.num_local_experts > 1:
            counts = self.num_global_tokens_per_local_expert
        else:
            counts = counts_E[None]
        self.counts_RE = counts.to(routing_map.device)
        return counts_E

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        # Keep nothing that carries a graph: it would keep the activations of a recomputed layer
        # alive until the layer's next forward.
        self.hidden_shape = hidden_states.shape
        self.probs_dtype = probs.dtype
        self.routing_map = routing_map
        self.tokens_per_expert = self.preprocess(routing_map)
        # The all-to-all needs its row counts on the host: the one wait that remains.
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize(
            "before_permutation_1", self.tokens_per_expert
        )
        # Sorted by expert, so that the rows for each rank lie together.
        self.sending, values_M = route_values(routing_map, probs, self.config.moe_router_topk)
        return permute(hidden_states.reshape(-1, self.hidden_shape[-1]), self.sending), values_M

    def dispatch_postprocess(self, global_input_tokens: Tensor, global_probs: Tensor) -> Any:
        if self.tp_size > 1:
            # Every rank of ETP has part of each expert's features and needs the rows of them all.
            gather = partial(
                gather_from_sequence_parallel_region,
                group=self.tp_group,
                output_split_sizes=self._sizes_over_tp(),
            )
            global_input_tokens = gather(global_input_tokens)
            global_probs = gather(global_probs)
        # Rows are ordered by the rank that sent them, then by expert; counts_RE has the bounds.
        return global_input_tokens, *regroup_values(self.counts_RE, global_probs)

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        if self.tp_size == 1:
            return hidden_states
        # Partial sums of the ranks' features are added in the wider dtype of the probabilities.
        wide = hidden_states.to(self.probs_dtype)
        summed = reduce_scatter_to_sequence_parallel_region(
            wide, group=self.tp_group, input_split_sizes=self._sizes_over_tp()
        )
        return summed.to(hidden_states.dtype)

    def _sizes_over_tp(self) -> list[int] | None:
        """Rows of each rank of expert tensor parallelism; None where all have as many."""
        if self.output_splits_tp is None:
            return None
        return self.output_splits_tp.tolist()

    def combine_postprocess(self, permutated_local_input_tokens: Tensor) -> Tensor:
        return unpermute(permutated_local_input_tokens, self.sending).view(self.hidden_shape)


class RoutedMoELayer(MoELayer):
    """Megatron's MoE layer with one of the two dispatchers above."""

    def __init__(self, config: Any, **kwargs: Any) -> None:
        for name in NOT_KEPT:
            assert not getattr(config, name, None), (
                f"{name} is not implemented by these dispatchers"
            )
        super().__init__(config=config, **kwargs)
        groups = kwargs.get("pg_collection")
        settings = {"config": self.config, "pg_collection": groups}
        # Megatron has made one of its own by the config's name; its groups tell which is needed.
        made: Any = self.token_dispatcher
        if made.ep_size * made.tp_size == 1:
            self.token_dispatcher = LocalDispatcher(**settings)
        else:
            local = (self.num_local_experts, self.local_expert_indices)
            self.token_dispatcher = AllToAllDispatcher(*local, **settings)
