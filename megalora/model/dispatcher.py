"""Dispatch tokens to experts, and leave sorting rows by expert to the kernels that read them.

Megatron's dispatcher writes each token k times, sorted by expert, before the experts run, and sends
all of these rows. Here the experts get rows as they are with a ``Routing`` that maps rows to
experts: without expert parallelism the hidden states themselves, gathered as they are read and
never written; with it a token is sent once to each rank that has experts of it, whose kernels
gather it for those experts and sum their results before one row goes back.

    T  tokens of this rank      k  experts per token      R  ranks of expert parallelism
    E  experts      H  hidden      N  rows that this rank sends or receives
    M  pairs of a token and an expert that it sends or receives
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megalora_kernels import (
    Arrivals,
    Destinations,
    Routing,
    permute,
    regroup_values,
    route_to_ranks,
    route_values,
    unpermute,
)
from megatron.core.tensor_parallel import (
    all_to_all,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import Tensor

from megalora import host

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
        self.pair_ends_E = self.routing.offsets_E
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


@dataclass(frozen=True)
class Splits:
    """Numbers of rows, or of pairs, that an exchange moves; on the host, which it needs them on."""

    sent: list[int]
    """``[R]``, to each rank."""
    received: list[int]
    """``[R]``, from each rank."""
    over_tp: list[int]
    """What each rank of expert tensor parallelism receives so; they all read all of it."""


class AllToAllDispatcher(MoETokenDispatcher):
    """Send each token once to every rank that has experts of it.

    Beside the rows go the pairs of token and expert, sorted by expert: the routing probability, and
    the place by which the receiver finds the pair's row. Results of a token's experts on one rank
    are summed there, in float32 and in the order of the experts, and those of its ranks here.
    Gradients gather instead of scattering, so that they add up in the same order on every run.
    """

    def __init__(self, num_local_experts: int, *, config: Any, pg_collection: Any) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.num_local_experts = num_local_experts

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        # Keep nothing that carries a graph: it would keep the activations of a recomputed layer
        # alive until the layer's next forward.
        self.hidden_shape = hidden_states.shape
        self.probs_dtype = probs.dtype
        top_k = self.config.moe_router_topk
        sending, values_M = route_to_ranks(routing_map, probs, top_k, self.ep_size)
        self.pair_ends_E = sending.pair_ends_E
        self.rows, self.pairs = self._exchange_counts(sending)
        self.sending = sending.rows(sum(self.rows.sent))
        packed_M2 = _packed(values_M, sending.places_M)
        return permute(hidden_states.reshape(-1, self.hidden_shape[-1]), self.sending), packed_M2

    def _exchange_counts(self, sending: Destinations) -> tuple[Splits, Splits]:
        """Splits of rows and of pairs; what the receiver needs of them stays on the device."""
        R = self.ep_size
        ends = gather_from_sequence_parallel_region(sending.ends(), group=self.tp_ep_group)
        # Ranks of expert tensor parallelism are neighbours: [R, ETP, E + R] becomes [ETP, R, ...].
        counts = ends.view(R, self.tp_size, -1).diff(dim=2).transpose(0, 1)
        copy = host.HostCopy(counts)
        pairs, rows = self._for_this_rank(counts)
        self.counts_RE = pairs.flatten(0, 1)
        self.rows_R = rows.flatten()
        # The all-to-all needs its row counts on the host: the one wait that remains.
        counts = copy.wait()
        pairs, rows = self._for_this_rank(counts)
        mine = counts[self.tp_rank, self.ep_rank]
        return (
            self._splits(mine[-R:], rows),
            self._splits(mine[:-R].view(R, -1).sum(1), pairs.sum(2)),
        )

    def _for_this_rank(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """What each sender has for this rank: pairs ``[ETP, R, E / R]``, rows ``[ETP, R]``."""
        first = self.ep_rank * self.num_local_experts
        pairs = counts[..., first : first + self.num_local_experts]
        return pairs, counts[..., counts.shape[-1] - self.ep_size + self.ep_rank]

    def _splits(self, sent_R: Tensor, received: Tensor) -> Splits:
        """``received``: ``[ETP, R]``."""
        over_tp = received.sum(1).tolist()
        return Splits(sent_R.tolist(), received[self.tp_rank].tolist(), over_tp)

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        rows = all_to_all(self.ep_group, hidden_states, self.rows.received, self.rows.sent)
        return rows, all_to_all(self.ep_group, probs, self.pairs.received, self.pairs.sent)

    def dispatch_postprocess(
        self, hidden_states: Tensor, probs: Tensor
    ) -> tuple[Tensor, Routing, Tensor]:
        if self.tp_size > 1:
            # Every rank of ETP has part of each expert's features and needs the rows of them all.
            gather = partial(gather_from_sequence_parallel_region, group=self.tp_group)
            hidden_states = gather(hidden_states, output_split_sizes=self.rows.over_tp)
            probs = gather(probs, output_split_sizes=self.pairs.over_tp)
        values_M, places_M = _unpacked(probs, self.probs_dtype)
        num_slots = min(self.config.moe_router_topk, self.num_local_experts)
        num_rows = hidden_states.shape[0]
        arrivals = Arrivals(self.counts_RE, self.rows_R, places_M, num_rows, num_slots)
        return hidden_states, *regroup_values(arrivals, values_M)

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        if self.tp_size == 1:
            return hidden_states
        # Partial sums of the ranks' features are added in the wider dtype of the probabilities.
        wide = hidden_states.to(self.probs_dtype)
        summed = reduce_scatter_to_sequence_parallel_region(
            wide, group=self.tp_group, input_split_sizes=self.rows.over_tp
        )
        return summed.to(hidden_states.dtype)

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        return all_to_all(self.ep_group, hidden_states, self.rows.sent, self.rows.received)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        return unpermute(hidden_states, self.sending).view(self.hidden_shape)


def _packed(values_M: Tensor, places_M: Tensor) -> Tensor:
    """``[M, 2]``: values and places in one tensor, so that one exchange moves both. Places keep
    their bits as floating-point numbers, with which nobody computes; their gradient is zero."""
    wide_M = values_M.to(torch.promote_types(values_M.dtype, torch.float32))
    if wide_M.dtype == torch.float64:
        places_M = places_M.long()
    return torch.stack((wide_M, places_M.view(wide_M.dtype)), 1)


def _unpacked(packed_M2: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values in ``dtype``, and int32 places."""
    as_integer = torch.int64 if packed_M2.dtype == torch.float64 else torch.int32
    values_M, places_M = packed_M2.unbind(1)
    return values_M.to(dtype), places_M.detach().view(as_integer).int()


class RoutedMoELayer(MoELayer):
    """Megatron's MoE layer with one of the two dispatchers above."""

    load: Any = None
    """The ``ExpertLoad`` that counts this layer's choices; None for none."""

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
            self.token_dispatcher = AllToAllDispatcher(self.num_local_experts, **settings)

    def preprocess(
        self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows = super().preprocess(hidden_states, probs, routing_map)
        if self.load is not None:
            made: Any = self.token_dispatcher
            number = self.layer_number
            assert number is not None, "a decoder numbers its layers"
            # Megatron counts from 1, through all stages.
            self.load.add(number - 1, made.pair_ends_E, routing_map)
        return rows
